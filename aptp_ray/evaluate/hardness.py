"""Do hard prompts get more MACs? What is hard is measured on the images of an evaluation, where routing had no say."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from aptp_ray.artifacts import RunDir
from aptp_ray.core.importance import spearman
from aptp_ray.evaluate.bootstrap import draws, estimate, replicate
from aptp_ray.evaluate.captions import ERROR, FILE, IMAGE_TEXT, KEY, TEXT, UNET, column
from aptp_ray.evaluate.measures import psnr

_HARDEST = 6


@dataclass(frozen=True)
class Hardness:
    """A measure of how hard each caption is.

    Attributes:
        kind: ``one_code``, ``random_routing``, ``one_expert`` or ``image_text``.
        system: on whose images it was measured.
        values: [captions], larger is harder.
    """

    kind: str
    system: str
    values: np.ndarray


def hardness_of(table: pa.Table, scores: dict[str, Any]) -> list[Hardness]:
    """What there is to tell hard captions by, the most telling first.

    Squared errors against the teacher's image: of one code that was fine-tuned on all captions and drew all, another run's (the
    cheapest of these, which is at its limits first); of this run's experts, dealt at random; of one of them, which was fine-tuned
    on its own captions. The mixture's own error says nothing: a caption that got a large expert loses little. Last, the teacher's
    image-text score, negated.
    """
    systems, home = scores["systems"], scores["systems"][scores["differences"]["against"]]["unets"][0]["run_dir"]

    def cheapest(kind: str, what: str) -> list[Hardness]:
        of_kind = [
            name for name, one in systems.items() if _kind(one, home) == kind and column(what, name) in table.column_names
        ]
        # Of teachers the whole one, not one that takes fewer steps.
        sign = -1 if what == IMAGE_TEXT else 1
        chosen = sorted(of_kind, key=lambda name: sign * systems[name]["macs_per_image"])[:1]
        return [Hardness(kind, name, sign * table[column(what, name)].to_numpy()) for name in chosen]

    by_error = [one for kind in ("one_code", "random_routing", "one_expert") for one in cheapest(kind, ERROR)]
    return by_error + cheapest("image_text", IMAGE_TEXT)


def _kind(system: dict[str, Any], home: str) -> str:
    """Which measure of hardness a system's images give."""
    if system["kind"] == "teacher":
        return "image_text"
    if system["kind"] == "random_routing":
        return "random_routing"
    if len(system["unets"]) > 1:
        return "none"
    elsewhere = system["kind"] == "mixture" and system["unets"][0]["run_dir"] != home
    return "one_code" if elsewhere else "one_expert"


def hardness_figures(table: pa.Table | None, scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rank correlations, over held-out captions, of the MACs that routing gives with how hard a caption is.

    Args:
        table: ``evaluation/captions.parquet``.
        scores: ``evaluation/scores.json`` of the same evaluation.

    Returns:
        None where nothing tells hard captions, or the mixture has one expert. Else ``captions`` (their number), ``measures``:
        [{"kind", "system", "correlation": estimate, null where all experts cost the same}], and the ``hardest`` captions by the
        first measure: {"prompt", "expert", "macs_ratio", "psnr" (of one code's or random routing's image) or "image_text",
        "key", "files": {system: file}}.
    """
    if table is None or scores is None or table.num_rows < 3:
        return None
    own = scores["differences"]["against"]
    systems, measures = scores["systems"], hardness_of(table, scores)
    unets = systems[own]["unets"]
    # An evaluation that was killed between the two files leaves them unlike.
    if not measures or len(unets) < 2 or column(UNET, own) not in table.column_names or scores["images"] != table.num_rows:
        return None
    who = table[column(UNET, own)].to_numpy()
    macs = np.array([unet["macs"] for unet in unets], dtype=np.float64)[who]
    # The full teacher's MACs, where it was drawn; sizes of experts compare without it, too.
    teacher = max((unet["macs"] for one in systems.values() for unet in one["unets"] if unet["expert"] is None), default=None)
    evaluation = scores["evaluation"]
    correlations = [
        {
            "kind": one.kind,
            "system": one.system,
            "correlation": _correlation(macs, one.values, replicates=evaluation["replicates"], seed=evaluation["seed"]),
        }
        for one in measures
    ]
    first = measures[0]
    teachers = sorted(
        (name for name, one in systems.items() if one["kind"] == "teacher"), key=lambda name: -systems[name]["macs_per_image"]
    )
    shown = [name for name in dict.fromkeys([own, first.system, *teachers[:1]]) if column(FILE, name) in table.column_names]
    hardest = []
    for row in np.argsort(-first.values, kind="stable")[:_HARDEST].tolist():
        value = float(first.values[row])
        hardest.append(
            {
                "prompt": table[TEXT][row].as_py(),
                "expert": unets[who[row]]["expert"],
                "macs_ratio": None if teacher is None else float(macs[row] / teacher),
                **({"image_text": -value} if first.kind == "image_text" else {"psnr": psnr([value**0.5])}),
                "key": table[KEY][row].as_py(),
                "files": {name: table[column(FILE, name)][row].as_py() for name in shown},
            }
        )
    return {"captions": table.num_rows, "measures": correlations, "hardest": hardest}


def hardest_images(run: RunDir, hardest: Sequence[dict[str, Any]]) -> list[dict[str, Image.Image]]:
    """Reads the images of the hardest captions, as far as they are still there: of each {system: image}."""
    wanted: dict[str, set[str]] = {}
    for one in hardest:
        for file in one["files"].values():
            wanted.setdefault(file, set()).add(one["key"])
    found: dict[tuple[str, str], Image.Image] = {}
    for file, keys in wanted.items():
        if not run.exists(*file.split("/")):
            continue  # images are large, and may have been removed
        with run.fs.open(run.path(*file.split("/")), "rb") as stream, tarfile.open(fileobj=stream) as archive:
            for key in keys:
                content = archive.extractfile(f"{key}.png")
                assert content is not None
                with Image.open(content) as image:
                    found[file, key] = image.convert("RGB")
    return [
        {name: found[file, one["key"]] for name, file in one["files"].items() if (file, one["key"]) in found} for one in hardest
    ]


def _correlation(macs: np.ndarray, hard: np.ndarray, *, replicates: int, seed: int) -> dict[str, float] | None:
    """Spearman's correlation with an interval over captions; None where either does not vary."""
    if len(np.unique(macs)) < 2 or len(np.unique(hard)) < 2:
        return None

    def score(weights: np.ndarray) -> float:
        rows = np.repeat(np.arange(len(macs)), np.rint(weights).astype(np.int64))
        return spearman(torch.from_numpy(macs[rows]), torch.from_numpy(hard[rows]))

    found = estimate(*replicate(score, draws(len(macs), replicates, seed=seed)))
    return {"value": found.value, "low": max(found.low, -1.0), "high": min(found.high, 1.0)}
