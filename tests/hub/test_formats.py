"""An expert as a program of torch.export or ONNX: the same function, for any batch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aptp_ray.artifacts import load_run
from aptp_ray.config import UserError
from aptp_ray.core.backbones import as_unet
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.hub import formats
from aptp_ray.hub.formats import ParityError, Shapes, export_program, write_program
from tests.core.tiny import tiny_pixart, tiny_sd15, tiny_sdxl
from tests.serve.conftest import SIDE

REPOSITORY = Path(__file__).resolve().parents[2]
# Text states: of Stable Diffusion XL with the pooled text in a row of its own.
TEACHERS: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "sd15": (tiny_sd15, (5, 24)), "sdxl": (tiny_sdxl, (6, 24)), "pixart": (tiny_pixart, (5, 12)),
}  # fmt: skip


def pruned(name: str) -> Any:
    model = TEACHERS[name][0]()
    space = ArchitectureSpace.of(model)
    code = space.random_code(0.6, torch.Generator().manual_seed(2))
    code[space.num_width :: 3] = False  # some closed blocks
    return as_unet(prune_unet(model, code, space).eval().requires_grad_(False))


def test_a_programs_file_draws_by_itself(run_dir: Path, tmp_path: Path) -> None:
    """Every row count up to the largest, and no code of ours to call it."""
    run, config = load_run(str(run_dir))
    figures = export_program(run, config, 1, tmp_path / "program", "pt2")
    facts = json.loads((tmp_path / "program" / "program.json").read_text())
    assert figures["parity"] == facts["parity"] <= 1e-5
    assert facts["shapes"] == {"sample": [4, SIDE // 2, SIDE // 2], "text": [12, 16]}
    text = load_components(run_dir / "teacher").text()(["a red apple", "the sky", "", "icon", "fox"])
    sample, times = torch.randn(5, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0)), torch.arange(5.0) * 200
    unet = load_unet(run_dir / "experts" / "1")
    program = torch.export.load(tmp_path / "program" / "expert.pt2").module()
    with torch.no_grad():
        for rows in (1, 5):
            expected = unet(sample[:rows], times[:rows], encoder_hidden_states=text[:rows]).sample
            found = program(sample[:rows], times[:rows], text[:rows])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("name", TEACHERS)
def test_every_kind_of_teacher_has_programs(name: str, kind: Any, tmp_path: Path) -> None:
    shapes = Shapes((4, 16, 16), TEACHERS[name][1])
    assert write_program(pruned(name), shapes, tmp_path / f"expert.{kind}", kind) <= 1e-5


@pytest.mark.slow
def test_half_precision_and_the_job(run_dir: Path, tmp_path: Path) -> None:
    def job(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "jobs/export.py", str(run_dir), str(tmp_path / "out"), *arguments],
            capture_output=True, text=True, timeout=300, cwd=REPOSITORY,
        )  # fmt: skip

    done = job("--expert", "0", "--format", "pt2", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["experts"] == [0] and line["parity"] < 5e-2 and (tmp_path / "out" / "expert.pt2").is_file()
    assert "licence" not in done.stderr
    refused = job("--format", "onnx")
    assert refused.returncode == 2 and "is of one expert (--expert)" in refused.stderr


def test_what_is_missing_is_named(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = load_run(str(run_dir))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
        with pytest.raises(UserError, match=r"needs .*onnxscript.*: pip install 'aptp-ray\[onnx\]'"):
            export_program(run, config, 0, tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_a_program_that_is_not_its_model_is_not_kept(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = load_run(str(run_dir))
    monkeypatch.setitem(formats._TOLERANCE, torch.bfloat16, -1.0)
    with pytest.raises(ParityError, match="differs from its model by"):
        export_program(run, config, 0, tmp_path / "x", "pt2", dtype=torch.bfloat16)
    assert not (tmp_path / "x").exists()
