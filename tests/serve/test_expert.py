"""The deployment's class, called without Ray: what it loads, measures, says and frees."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from aptp_ray.artifacts import load_run
from aptp_ray.core.batch_profile import BatchProfile
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.int8 import weight_bytes
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.expert import Expert, _load, memory_mb
from aptp_ray.serve.protocol import TEACHER, DrawJob, Outcome


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _draw(expert: Expert, steps: int = 3) -> np.ndarray:
    async def main() -> Outcome:
        job = DrawJob("a", "a red apple", "", 1, seed=4, num_inference_steps=steps, guidance_scale=3.0)
        items = [item async for item in expert.draw([job])]
        assert isinstance(items[-1], Outcome) and items[-1].error is None
        return items[-1]

    return asyncio.run(main()).images[0]


@pytest.mark.parametrize(("name", "unet"), [(0, ("experts", "0")), (TEACHER, ("teacher", "unet"))])
def test_it_draws_with_its_own_unet_and_says_what_it_loaded(
    run_dir: Path, name: int | str, unet: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        logging.getLogger("ray.serve").propagate = True
        expert = Expert(str(run_dir), {}, name)
    try:
        line = next(record.getMessage() for record in caplog.records if "is loaded in" in record.getMessage())
        assert line.startswith(TEACHER if name == TEACHER else f"expert-{name}")
        assert all(word in line for word in ("UNet", "VAE", "text encoder", "MB", "Largest batch", "multiples of 4"))
        lone = Sampler.from_components(
            load_unet(run_dir.joinpath(*unet)), load_components(run_dir / "teacher"), scheduler="DDIMScheduler"
        )
        expected = np.asarray(lone.generate(["a red apple"], [4], num_inference_steps=3)[0], dtype=int)
        assert np.abs(expected - _draw(expert)).max() <= 1
        status = asyncio.run(expert.status())
        assert status["done"] == 1 and status["memory_mb"] > 50 and status["max_batch_size"] in (1, 2, 3)
    finally:
        expert.__del__()
    with pytest.raises(RuntimeError, match="has ended"):
        asyncio.run(expert.status())
    assert not any(thread.name in ("denoising", "beside-denoising") for thread in threading.enumerate())


@pytest.mark.parametrize(("limit", "sizes"), [(3, (1, 2, 3)), (None, (1, 2, 4, 8, 16, 32)), (1, (1,))])
def test_the_largest_batch_is_measured_and_kept_out_of_the_run(
    run_dir: Path, tmp_path: Path, cache: Path, limit: int | None, sizes: tuple[int, ...]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    before = sorted(path for path in run.rglob("*"))
    expert = Expert(str(run), {}, 1, {"max_batch_size": limit})
    (record,) = (cache / "batch_profiles").glob("*.json")
    profile = BatchProfile.from_json(record.read_text())
    assert profile.sizes == sizes
    assert asyncio.run(expert.status())["max_batch_size"] == profile.best()
    expert.__del__()
    assert sorted(path for path in run.rglob("*")) == before
    # The next start reads it.
    told = BatchProfile("d", (1, 2), (10.0, 11.0), (9.0, 10.0))
    record.write_text(told.to_json())
    again = Expert(str(run), {}, 1, {"max_batch_size": limit})
    assert asyncio.run(again.status())["max_batch_size"] == 2
    again.__del__()


def test_int8_weights_take_less_and_draw_almost_the_same(run_dir: Path) -> None:
    run, config = load_run(str(run_dir), {})
    images, sizes = {}, {}
    for weights in ("whole", "int8"):
        expert = Expert(str(run_dir), {}, 0, {"weights": weights, "max_batch_size": 1})
        images[weights] = _draw(expert).astype(float)
        expert.__del__()
        serve = config.serve.model_copy(update={"weights": weights})
        sizes[weights] = weight_bytes(_load(run, config.model_copy(update={"serve": serve}), 0)[0])
    assert sizes["int8"] < 0.7 * sizes["whole"]
    off = np.abs(images["int8"] - images["whole"])
    assert 0 < off.mean() < 3  # of 255


def test_weights_stay_mapped_from_their_files(run_dir: Path) -> None:
    """So the replicas of a node share them: pages of a file that nobody writes to are the same memory everywhere."""
    unet, components = load_unet(run_dir / "experts" / "0"), load_components(run_dir / "teacher")
    Sampler.from_components(unet, components).generate(["a red apple"], [1], num_inference_steps=1)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if len(fields) > 5 and str(run_dir) in fields[5]:
            low, high = (int(end, 16) for end in fields[0].split("-"))
            ranges.append((low, high))
    for module in (unet, components.vae, components.text_encoder):
        weights = [p for p in module.parameters() if p.ndim > 1]
        mapped = [p for p in weights if any(low <= p.data_ptr() < high for low, high in ranges)]
        assert sum(p.numel() for p in mapped) > 0.9 * sum(p.numel() for p in weights)


def test_memory_counts_what_is_there() -> None:
    before = memory_mb(torch.device("cpu"))[0]
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory_mb(torch.device("cpu"))[0] - before == pytest.approx(64, abs=8)
    del block
