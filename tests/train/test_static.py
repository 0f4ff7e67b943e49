"""One code by a rule: what a baseline's prune stage makes, and that the pipeline takes it all the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aptp_ray.config import Config, ConfigError, parse_config
from aptp_ray.core.ablation import AblationPath
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import Importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.train.prune import check_budget
from aptp_ray.train.static import static_code
from tests.core.tiny import tiny_pixart, tiny_sd21, tiny_sdxl

ROOT = Path(__file__).resolve().parents[2]
RULES = ("ablation_greedy", "norm", "random", "block_removal")


def config_of(rule: str, alignment: int = 8) -> Config:
    return parse_config(
        {
            "run_dir": "x",
            "data": {"source": {"kind": "openmoji"}},
            "teacher": {"source": "x"},
            "router": {"experts": 1, "alignment": alignment},
            "prune": {"codes": rule, "budget": 0.7},
        }
    )


def scored(macs: MacsModel, score: torch.Tensor, alignment: int) -> AblationPath:
    return AblationPath(macs, (macs.space.full_code(),), (Importance(score, macs.entry_macs()),), alignment)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_gives_a_code_at_the_budget(rule: str) -> None:
    gated = GatedUNet(tiny_sd21())
    macs = MacsModel.measure(gated.unet, (16, 16), 5)
    config = config_of(rule)
    score = torch.rand(macs.space.dim, generator=torch.Generator().manual_seed(0)).double() * macs.entry_macs()
    code = static_code(config, gated, macs, scored(macs, score, 8))
    macs.space.validate(code.long())
    if rule == "block_removal":  # BK-SDM's blocks, whatever they come to
        assert not code[macs.space.num_width :].any() and code[: macs.space.num_width].all()
    else:
        assert abs(macs.exact(code) / macs.total / 0.7 - 1) <= 0.005
    if rule == "ablation_greedy":
        lost = (score / macs.entry_macs())[~code]
        assert lost.median() < (score / macs.entry_macs())[code].median()


@pytest.mark.parametrize("teacher", ["sdxl by layers", "transformer"])
def test_rules_for_other_teachers(teacher: str) -> None:
    space = ArchitectureSpace.of(tiny_sdxl(), depth="layers") if teacher == "sdxl by layers" else None
    gated = GatedUNet(tiny_pixart() if space is None else tiny_sdxl(), space)
    macs = MacsModel.measure(gated.unet, (16, 16), 5, space)
    score = torch.rand(macs.space.dim, generator=torch.Generator().manual_seed(0)).double() * macs.entry_macs()
    for rule in ("ablation_greedy", "norm", "random"):
        code = static_code(config_of(rule, 1), gated, macs, scored(macs, score, 1))
        assert abs(macs.exact(code) / macs.total / 0.7 - 1) <= 0.005
    with pytest.raises(ValueError, match="BK-SDM"):
        static_code(config_of("block_removal"), gated, macs, None)


def test_blocks_that_a_teacher_does_not_have_are_refused_before_any_work(tmp_path: Path) -> None:
    tiny_pixart().save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "PixArtTransformer2DModel"]}')
    config = config_of("block_removal")
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"source": str(tmp_path)})})
    with pytest.raises(ConfigError, match="prune.codes=block_removal.*router.depth=modules"):
        check_budget(config)


@pytest.mark.slow
def test_a_baseline_goes_through_the_pipeline_on_rows_that_another_run_encoded(tmp_path: Path) -> None:
    def pipeline(name: str, *more: str) -> tuple[dict[str, object], str]:
        arguments = ["jobs/pipeline.py", "jobs/configs/smoke.yaml", f"run_dir={tmp_path / name}", "router.experts=1", *more]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr

    first, _ = pipeline("greedy", "prune.codes=ablation_greedy")
    second, said = pipeline("norm", "prune.codes=norm", "--take-over", str(tmp_path / "greedy"))
    assert "teacher, encode" in said and "encode: done before, skipped" in said
    for line in (first, second):
        assert abs(line["macs_ratio"] / 0.65 - 1) <= 0.005 and [one["share"] for one in line["experts"]] == [1.0]
    codes = [json.loads((tmp_path / name / "experts/0/config.json").read_text())["pruning"] for name in ("greedy", "norm")]
    assert codes[0] != codes[1] and not codes[1]["closed"]
