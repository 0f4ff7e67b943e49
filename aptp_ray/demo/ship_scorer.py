"""Puts a trained image-text encoder and its heads into the package: python -m aptp_ray.demo.ship_scorer RUN_DIR."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from aptp_ray.demo.ship import WEIGHTS
from aptp_ray.storage import replacing_folder

SCORER = WEIGHTS / "scorer"

_CARD = """# The demo's image-text encoder

It scores the demo's images: a Swin transformer and a small BERT with a tokenizer of their own, trained from scratch on captioned
drawings made from OpenMoji 17 (training combinations only), and linear heads that say which subject, color, style and number
an image shows. Numbers made with it say how images of this demo compare with one another; they are no FID and no CLIP score of
the literature.

- Emoji designed by OpenMoji, the open-source emoji and icon project (openmoji.org). License: CC BY-SA 4.0. These weights were
  trained on renders of them and ship under the same license, CC BY-SA 4.0, with this attribution.
- Layout: transformers' `VisionTextDualEncoder`, weights in half precision; `heads.safetensors` and `heads.json`; `scorer.json`.
- Made by `python jobs/train_scorer.py jobs/configs/openmoji_scorer.yaml`, then `python -m aptp_ray.demo.ship_scorer` on its run.

On validation images (retrieval: recall@1 among {gallery} captions or images; heads: share of right answers):

| | combinations seen in training | held-out combinations |
|---|---|---|
{rows}
"""


def ship_scorer(run_dir: str, target: Path = SCORER) -> int:
    """Writes ``target`` from a run's ``scorer`` folder; returns its size in bytes.

    Raises:
        FileNotFoundError: if the run has none.
    """
    source = Path(run_dir) / "scorer"
    if not (source / "scorer.json").is_file():
        raise FileNotFoundError(f"{source} holds no scorer: run jobs/train_scorer.py first")
    figures = json.loads((source / "scorer.json").read_text(encoding="utf-8"))
    with replacing_folder(target) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)
        (new / "README.md").write_text(_CARD.format(gallery=figures["seen"]["retrieval"]["gallery"], rows=_rows(figures)))
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def _rows(figures: dict) -> str:
    parts = [figures[name] for name in ("seen", "held_out")]
    lines = [
        f"| {text} | " + " | ".join(f"{part['retrieval'][name]:.1%}" for part in parts) + " |"
        for name, text in (("image_to_text", "image to caption"), ("text_to_image", "caption to image"))
    ]
    for question in parts[0]["heads"]["questions"]:
        answers = [part["heads"]["questions"].get(question) for part in parts]
        lines.append(f"| {question} | " + " | ".join(f"{one['right']:.1%}" if one else "-" for one in answers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run_dir", help="run directory of jobs/train_scorer.py")
    print(f"{ship_scorer(arguments.parse_args().run_dir) / 1e6:.1f} MB in {SCORER}")
