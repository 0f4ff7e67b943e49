"""jobs/benchmark.py switches: which variants run, on whose data, and what is kept of them; no pipeline is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aptp_ray.artifacts import RunDir
from aptp_ray.config import ConfigError, load_config, stage_hash
from aptp_ray.evaluate.tried import with_ratios
from aptp_ray.reuse import take_over
from benchmarks.switches import START, all_variants, as_tried, chosen, sizes_like
from cli import DEMO_CONFIG


def test_every_variant_is_a_config() -> None:
    for name, changes in all_variants().items():
        config = load_config(DEMO_CONFIG, changes)
        assert name in (START, "no contrast") or config != load_config(DEMO_CONFIG, []), name
    bare = load_config(DEMO_CONFIG, all_variants()["no distillation"])
    for weights in (bare.prune.weights, bare.finetune.weights):
        assert weights.distillation == weights.block == 0 < weights.denoising
    near = load_config(DEMO_CONFIG, all_variants()["no transport"])
    assert near.prune.assignment == "nearest" and not near.router.duals


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("no transport", [START, "no transport"]),
        (" no transport , no distillation", [START, "no distillation", "no transport"]),
        ("no contrast, second seed", [START, "no contrast, second seed"]),
        ("no contrast,no contrast, second seed", [START, "no contrast", "no contrast, second seed"]),
        (START, [START]),
    ],
)
def test_only_names_variants_with_commas_in_them(only: str, names: list[str]) -> None:
    assert list(chosen(only, all_variants())) == names
    assert list(chosen(None, all_variants()))[0] == START


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no variant is called 'no brakes'; there are: .*no transport"):
        chosen("no transport,no brakes", all_variants())
    job = [sys.executable, "jobs/benchmark.py", "switches", "--only", "no brakes"]
    done = subprocess.run(job, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "no brakes" in json.loads(done.stdout.splitlines()[-1])["error"]


def run_of(folder: Path, changes: list[str]) -> RunDir:
    """A demo run that has encoded its rows, without them."""
    run, config = RunDir(str(folder)), load_config(DEMO_CONFIG, [f"run_dir={folder}", *changes])
    run.prepare(config)
    for stage, part in (("teacher", "teacher"), ("encode", "encoded")):
        run.write_bytes(b"x", part, "file")
        run.finish(config, stage)
    return run


def test_rows_of_a_run_are_taken_where_its_config_makes_the_same(tmp_path: Path) -> None:
    own = sizes_like(None)
    assert own == ["data.source.train_images=4000", "data.source.validation_images=512"]
    small = ["data.source.validation_images=100"]
    cases = {"plain": ([], ["teacher", "encode"]), "small": (small, ["teacher"]), "large": (["data.resolution=32"], ["teacher"])}
    for name, (changes, taken) in cases.items():
        home = run_of(tmp_path / name, changes)
        sizes = sizes_like(home)
        assert (sizes == own) == (name == "small")
        config = load_config(DEMO_CONFIG, [f"run_dir={tmp_path}/{name}-copy", *sizes])
        run = RunDir(config.run_dir)
        run.prepare(config)
        assert take_over(config, run, home) == taken, name
        assert (stage_hash(config, "encode") == stage_hash(home.config(), "encode")) == ("encode" in taken)


def test_what_is_kept_is_what_the_report_reads() -> None:
    variants = {START: [], "a": ["x=1"], "b": ["y=2"]}
    figures = {"b": {"failed": "why"}, START: {"error": 0.2}, "a": {"error": 0.1}}
    found = as_tried(variants, figures, ["prune.budget=0.5"])
    assert found == [
        {"name": START, "changes": ["prune.budget=0.5"], "figures": {"error": 0.2}},
        {"name": "a", "changes": ["x=1"], "figures": {"error": 0.1}},
        {"name": "b", "changes": ["y=2"], "figures": {}, "failed": "why"},
    ]
    assert [entry["ratios"] for entry in with_ratios(found)] == [{"error": 1.0}, {"error": 0.5}, {}]
