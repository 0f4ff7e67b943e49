"""What training puts into the log besides losses: pictures of fixed prompts, and the prompts of each code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from aptp_ray.config import Config, parse_config
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.running import compile_unet
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.tracking import Tracker
from aptp_ray.train.pictures import SampleGrid
from aptp_ray.train.watch import CodeWatch
from tests.core.objectives import make_batch, make_objective, randn
from tests.core.small_pipeline import sampler_of, small_pipeline
from tests.test_tracking import read_back

PROMPTS = ["a red apple", "a green fox runs", "blue sky"]


def config(steps: int = 10) -> Config:
    return parse_config(
        {
            "name": "t", "run_dir": "r", "teacher": {"source": "t"},
            "data": {"source": {"kind": "webdataset", "train": "a.tar", "validation": "b.tar"}, "resolution": 16},
            "sampling": {"scheduler": "DDIMScheduler", "num_inference_steps": 3, "guidance_scale": 2.0},
            "prune": {"loop": {"steps": steps}},
        }
    )  # fmt: skip


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = Tracker(project="p", name="t", config=config(), directory=str(tmp_path), mode="offline", revision="0")
    yield run
    run.finish()


def test_pictures_are_the_samplers_own_with_the_teachers_beside_them(tmp_path: Path, tracker: Tracker) -> None:
    pipeline = small_pipeline("bert", DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "teacher")
    space = ArchitectureSpace.of(pipeline.unet)
    codes = [space.random_code(0.5, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = compile_unet(deepcopy(pipeline.unet).train())
    experts = [prune_unet(whole, code) for code in codes]

    def artists() -> Iterator[tuple[Any, list[int]]]:
        yield experts[0], [0, 2]
        yield experts[1], [1]

    grid = SampleGrid(config(), str(tmp_path / "teacher"), torch.device("cpu"), PROMPTS, artists, whole)
    experts[1].eval()
    for step in (1, 2):
        grid(tracker, step)
    assert experts[0].training and not experts[1].training and whole.training and "forward" in vars(whole)
    tracker.finish()
    _, history, _, _, files = read_back(tmp_path)
    logged = [row["samples"] for row in history if "samples" in row]
    assert [row["_step"] for row in history if "samples" in row] == [1, 2]
    assert logged[0]["captions"][1] == "a green fox runs (teacher | step 1)"
    first, again = ([np.asarray(Image.open(files / name)) for name in row["filenames"]] for row in logged)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))  # the same prompts from the same noise
    assert first[0].shape == (16, 32, 3) and not np.array_equal(first[0][:, :16], first[0][:, 16:])
    # The right half of each is its own expert's, drawn as the service draws.
    from aptp_ray.core.randomness import key_seed

    for number, expert in ((0, 0), (1, 1), (2, 0)):
        pipeline.unet = experts[expert]
        seed = key_seed(config().report.seed, "samples", number) % 2**31
        options = {"num_inference_steps": 3, "guidance_scale": 2.0}
        (image,) = sampler_of(pipeline).generate([PROMPTS[number]], [seed], **options)
        assert np.abs(first[number][:, 16:].astype(int) - np.asarray(image).astype(int)).max() <= 1


def test_nothing_is_loaded_where_nothing_is_logged(tmp_path: Path) -> None:
    off = Tracker(project="p", name="t", config=config(), mode="disabled")
    SampleGrid(config(), str(tmp_path / "absent"), torch.device("cpu"), PROMPTS, lambda: [], None)(off, 1)


def test_the_prompts_of_each_code_are_listed(tmp_path: Path, tracker: Tracker) -> None:
    objective = make_objective().train()
    _, stats = objective(**make_batch(objective))
    z = randn(40, 12, seed=9)
    captions = [f"prompt {number}" for number in range(40)]
    CodeWatch(config(), objective, "prune", captions, z)(tracker, 10, stats)
    tracker.finish()
    _, history, _, _, files = read_back(tmp_path)
    (row,) = [row for row in history if "experts/prompts" in row]
    table = json.loads((files / row["experts/prompts"]["path"]).read_text())
    assert table["columns"] == ["expert", "similarity", "prompt"] and "codes/similarity_table" in row
    routed = objective.router.assign(z)
    counts = routed.expert.bincount(minlength=3).clamp(max=8)
    assert len(table["data"]) == int(counts.sum()) and counts.min() > 0
    for expert, similarity, prompt in table["data"]:
        index = captions.index(prompt)
        assert int(routed.expert[index]) == expert
        assert similarity == pytest.approx(float(routed.similarity[index, expert]), abs=1e-4)
