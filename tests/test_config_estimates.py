"""What the configs of real models say they cost is what their own numbers give."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from aptp_ray.config import Config, load_config
from aptp_ray.core.macs import count_macs

CONFIGS = Path(__file__).resolve().parents[1] / "jobs" / "configs"
PRICED = ("sd15_coco", "sd21_cc3m", "sd21_coco", "sdxl_coco")
FLOPS = 0.35 * 312e12  # as the comments assume
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


def read(name: str) -> tuple[Config, str]:
    path = CONFIGS / f"{name}.yaml"
    return load_config(path), re.sub(r"\n# *", " ", path.read_text())


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, pattern
    return float(found.group(1))


@pytest.mark.parametrize("name", PRICED)
def test_gpu_hours_are_the_formula(name: str) -> None:
    config, comment = read(name)
    macs = 1e9 * number(r"M = ([\d.]+) GMACs", comment)
    assert f"at {config.data.resolution} pixels" in comment
    encoders, rows = 1e9 * number(r"text encoder: (\d+) GMACs", comment), number(r"x (\d+) rows", comment)
    prune, apart = config.prune.loop, config.finetune.apart
    work = {
        "encode": 2 * encoders * rows,
        "prune": 3 * 2 * macs * prune.global_batch_size * prune.steps,
        "finetune": (1 + 3 * config.prune.budget) * 2 * macs * apart.global_batch_size * apart.steps * config.router.experts,
    }
    for stage, flops in work.items():
        said = number(rf" {stage} [^=]*= ([\d.]+) h", comment)
        assert said == pytest.approx(flops / FLOPS / 3600, abs=0.06), stage
    assert number(r"in all = (\d+) h", comment) == pytest.approx(sum(work.values()) / FLOPS / 3600, abs=0.51)
    assert "estimated" in comment and "nothing here was measured" in comment


@pytest.mark.parametrize("name", ["sd15_coco", "sd21_coco"])
def test_the_macs_are_counted(name: str) -> None:
    config, comment = read(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES[name[:4]])
    side = config.data.resolution // 8
    assert count_macs(unet, latent_size=(side, side), num_tokens=77) / 1e9 == pytest.approx(
        number(r"M = ([\d.]+) GMACs", comment), abs=0.06
    )


@pytest.mark.parametrize(("name", "text"), [("sd15_coco", 77 * 768), ("sdxl_coco", 78 * 2048)])
def test_storage_is_the_formula(name: str, text: int) -> None:
    config, comment = read(name)
    side = config.data.resolution // 8
    row = 2 * text + 2 * 2 * 4 * side**2 + 4 * 768
    assert f"a row {row // 1000} {row % 1000} bytes" in re.sub(r" +", " ", comment)
    assert number(r"118 287 rows: (\d+) GB", comment) == round(118_287 * row / 1e9)


@pytest.mark.parametrize("name", ["sd15_coco", "sdxl_coco"])
def test_learning_rates_follow_the_references_rule(name: str) -> None:
    config, _ = read(name)
    peak = 2e-4 * math.sqrt(config.prune.loop.global_batch_size)
    assert config.prune.predictor_lr == config.prune.code_lr == pytest.approx(peak, rel=0.01)
    rate = 1e-5 * math.sqrt(config.finetune.apart.global_batch_size)
    assert config.finetune.apart.optimizer.lr == pytest.approx(rate, rel=0.01)
    for loop in (config.prune.loop, config.finetune.apart):
        workers = loop.workers or config.compute.workers
        assert isinstance(workers, int) and loop.global_batch_size % (workers * loop.accumulation) == 0
