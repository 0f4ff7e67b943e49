from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import aptp_ray
from aptp_ray.artifacts import RunDirError
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.sampler import Sampler
from aptp_ray.hub.mixture import MixturePipeline
from tests.core.small_pipeline import LEVELS, levels
from tests.serve.conftest import SIDE, TRAINING_PROMPTS


@pytest.fixture(scope="module")
def pipe(run_dir: Path) -> MixturePipeline:
    return aptp_ray.MixturePipeline.from_pretrained(run_dir)


def test_each_prompt_is_drawn_by_the_expert_it_is_routed_to(pipe: MixturePipeline, run_dir: Path) -> None:
    out = pipe(TRAINING_PROMPTS, seed=5)
    assert out.experts == pipe.router.route(TRAINING_PROMPTS).expert.tolist() and set(out.experts) == {0, 1}
    assert out.seeds == list(range(5, 13)) and len(out.similarity[0]) == 2
    # By the engine itself, with the UNets of the run directory.
    for k in (0, 1):
        sampler = Sampler.from_components(
            load_unet(run_dir / "experts" / str(k)),
            load_components(run_dir / "teacher"),
            scheduler="DDIMScheduler",
            resolution=SIDE,
        )
        rows = [row for row, expert in enumerate(out.experts) if expert == k]
        drawn = sampler.generate([TRAINING_PROMPTS[r] for r in rows], [out.seeds[r] for r in rows], num_inference_steps=4)
        for row, image in zip(rows, drawn, strict=True):
            assert np.array_equal(np.asarray(out.images[row]), np.asarray(image))


def test_an_image_does_not_depend_on_the_others(pipe: MixturePipeline) -> None:
    together = pipe(TRAINING_PROMPTS, seed=5)
    alone = pipe(TRAINING_PROMPTS[3], seed=8)
    assert alone.experts == [together.experts[3]]
    assert levels(np.asarray(alone.images[0]), np.asarray(together.images[3])) <= LEVELS
    given = pipe(TRAINING_PROMPTS[2:4], seed=[7, 8])
    assert levels(np.asarray(given.images[1]), np.asarray(alone.images[0])) <= LEVELS


def test_an_expert_can_be_chosen_and_settings_changed(pipe: MixturePipeline) -> None:
    routed = pipe("red apple", seed=1)
    other = 1 - routed.experts[0]
    chosen = pipe("red apple", seed=1, expert=other)
    assert chosen.experts == [other] and chosen.similarity == routed.similarity
    assert levels(np.asarray(chosen.images[0]), np.asarray(routed.images[0])) > LEVELS
    for change in ({"guidance_scale": 7.0}, {"num_inference_steps": 2}, {"negative_prompts": ["a red fox"]}):
        assert levels(np.asarray(pipe("red apple", seed=1, **change).images[0]), np.asarray(routed.images[0])) > LEVELS


def test_experts_load_when_needed_and_leave_when_they_do_not_fit(run_dir: Path) -> None:
    pipe = MixturePipeline.from_pretrained(run_dir, max_batch_size=2)
    assert pipe.loaded == [] and "loaded: []" in repr(pipe)
    pipe("red apple", expert=0)
    assert pipe.loaded == [0]
    pipe("red apple", expert=1)
    assert pipe.loaded == [0, 1]
    pipe("red apple", expert=0)
    assert pipe.loaded == [1, 0]  # least recently used first
    sizes = [sum(p.numel() for p in load_unet(run_dir / "experts" / str(k)).parameters()) * 4 / 2**30 for k in (0, 1)]
    tight = MixturePipeline.from_pretrained(run_dir, memory_gb=1.01 * max(sizes))
    first = tight(TRAINING_PROMPTS)
    assert len(tight.loaded) == 1
    second = tight(TRAINING_PROMPTS)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(first.images, second.images, strict=True))
    with pytest.raises(ValueError, match="memory_gb is 0.00"):
        MixturePipeline.from_pretrained(run_dir, memory_gb=0.5 * min(sizes))("red apple")
    half = MixturePipeline.from_pretrained(run_dir, dtype=torch.bfloat16, memory_gb=0.6 * max(sizes))
    assert len(half("red apple").images) == 1


def test_mistakes_are_named(pipe: MixturePipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        pipe(["a", "b"], seed=[1])
    with pytest.raises(ValueError, match="no expert 2; there are 0 to 1"):
        pipe("a", expert=2)
    with pytest.raises(RunDirError, match="is no mixture"):
        MixturePipeline.from_pretrained(tmp_path)
    with pytest.raises(RunDirError, match="is no mixture"):
        MixturePipeline.from_pretrained("./nowhere/at/all")
    assert pipe([]).images == []


@pytest.mark.slow
def test_it_never_imports_ray(run_dir: Path) -> None:
    code = (
        "import sys, aptp_ray\n"
        f"out = aptp_ray.MixturePipeline.from_pretrained({str(run_dir)!r})(['red apple'])\n"
        "assert out.images[0].size == (16, 16)\n"
        "print(sorted(m for m in ('ray', 'wandb') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_unknown_names_of_the_package_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        aptp_ray.Nonsense  # noqa: B018
