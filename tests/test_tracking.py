"""What goes to Weights & Biases, read back from an offline run's own file, and that nothing of it can stop a training."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from aptp_ray.config import Config, parse_config
from aptp_ray.tracking import Tracker, git_revision, heatmap, known_peak_tflops, unet_flop_utilisation

REPOSITORY = Path(__file__).resolve().parents[1]
SECRET = "hunter2-of-the-test"


def config() -> Config:
    source = {"kind": "webdataset", "train": "a.tar", "validation": "b.tar"}
    options = {"secret": SECRET}
    return parse_config(
        {"name": "cats", "run_dir": "r", "data": {"source": source}, "teacher": {"source": "t"}, "storage_options": options}
    )


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, by wandb's own message types.

    The file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB with chunks of (checksum, length, type), a record in
    one chunk (type 1) or in several (2, 3 ..., 4).
    """
    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def by_name(items: Any) -> dict[str, Any]:
    """Items as a tree; wandb writes a nested value either whole or part by part."""
    tree: dict[str, Any] = {}
    for item in items:
        *path, last = [item.key] if item.key else list(item.nested_key)
        branch = tree
        for name in path:
            branch = branch.setdefault(name, {})
        branch[last] = json.loads(item.value_json)
    return tree


def read_back(folder: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any], dict[str, Any], Path]:
    """The run record, history by row, last summary, config and files' folder of the only run below ``folder``."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    run, history, summary, configuration = None, [], {}, {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            configuration |= by_name(run.config.update)
        elif kind == "history":
            history.append(by_name(record.history.item))
        elif kind == "summary":
            summary |= by_name(record.summary.update)
        elif kind == "config":
            configuration |= by_name(record.config.update)
    return run, history, summary, configuration, path.parent / "files"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def test_an_offline_run_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", f"storage_options.secret={SECRET}"])
    tracker = Tracker(
        project="p", name="cats-prune", config=config(), directory=str(tmp_path), run_id="cats-prune-1", revision="c0ffee"
    )
    assert tracker.enabled
    similarity = np.array([[1.0, -0.5], [-0.5, np.nan]])
    for step in (10, 20):
        tracker.log({"loss/denoising": 1 / step, "samples_per_second": 40.0, "unet_flop_utilisation": 0.3}, step=step)
    tracker.log_bars("macs_ratio", [0.6, 0.7], step=20)
    tracker.log_bars("share", {"photo": 0.25, "sketch": 0.75}, step=20)
    tracker.log_heatmap("code_similarity", similarity, step=20, labels=["a", "b"])
    tracker.log_page("report", "<!doctype html><p>report", step=20)
    tracker.log_table("prompts", ["prompt", "expert"], [["a red apple", 1], ["ein Löwe", 0]], step=20)
    images = [np.full((8, 8, 3), 200, dtype=np.uint8), Image.new("RGB", (8, 8), "red")]
    tracker.log_images("samples", images, step=20, captions=["a red apple", "ein Löwe"])
    tracker.summary({"budget": 0.65})
    tracker.finish()
    assert not tracker.enabled
    tracker.log({"late": 1.0}, step=30)  # after the end: nothing, and no error

    run, history, summary, configuration, files = read_back(tmp_path)
    assert (run.project, run.display_name, run.run_group, run.run_id) == ("p", "cats-prune", "cats", "cats-prune-1")
    assert [row["_step"] for row in history] == [10, 20]
    assert history[0]["loss/denoising"] == pytest.approx(0.1)
    row = history[1]
    assert row["samples_per_second"] == 40.0 and row["unet_flop_utilisation"] == 0.3 and "late" not in row
    assert summary["budget"] == 0.65
    assert configuration["data"]["source"]["train"] == "a.tar" and configuration["git_revision"] == "c0ffee"
    assert configuration["storage_options"]["secret"] == "env:APTP_STORAGE_OPTIONS_SECRET"

    def table(name: str) -> dict[str, Any]:
        assert row[name]["_type"] == "table-file"
        return json.loads((files / row[name]["path"]).read_text())

    assert table("prompts") == {
        "columns": ["prompt", "expert"], "data": [["a red apple", 1], ["ein Löwe", 0]], "ncols": 2, "nrows": 2,
    } or table("prompts")["data"] == [["a red apple", 1], ["ein Löwe", 0]]  # fmt: skip
    assert table("macs_ratio_table")["data"] == [["0", 0.6], ["1", 0.7]]
    assert table("share_table")["data"] == [["photo", 0.25], ["sketch", 0.75]]
    assert table("code_similarity_table")["columns"] == ["", "a", "b"]
    assert table("code_similarity_table")["data"][0] == ["a", 1.0, -0.5]
    assert (files / row["report"]["path"]).read_text() == "<!doctype html><p>report"
    samples = row["samples"]
    assert samples["count"] == 2 and samples["captions"] == ["a red apple", "ein Löwe"]
    assert Image.open(files / samples["filenames"][1]).getpixel((3, 3)) == (255, 0, 0)
    assert Image.open(files / row["code_similarity"]["path"]).size == (48, 48)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink())
    assert SECRET.encode() not in written


def test_only_rank_0_of_an_enabled_tracker_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **given: begun.append(given))
    for rank, mode in ((1, "offline"), (0, "disabled"), (3, "online")):
        tracker = Tracker(project="p", name="n", config=config(), mode=mode, directory=str(tmp_path), rank=rank)
        assert not tracker.enabled
        tracker.log({"a": 1.0}, step=1)
        tracker.log_bars("b", [1.0], step=1)
        tracker.summary({"c": 1})
        tracker.finish()
    assert begun == []


@pytest.mark.parametrize(("key", "mode", "resume"), [(None, "offline", None), ("k" * 40, "online", "allow")])
def test_online_with_a_key_and_the_same_run_on_resume(
    key: str | None, mode: str, resume: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    begun: list[dict[str, Any]] = []

    def init(**given: Any) -> object:
        begun.append(given)
        return object()

    monkeypatch.setattr(wandb, "init", init)
    for _ in range(2):
        Tracker(project="p", name="n", config=config(), directory=str(tmp_path), run_id="cats-prune")
    assert [(run["mode"], run["id"], run["resume"], run["group"]) for run in begun] == [(mode, "cats-prune", resume, "cats")] * 2


def test_an_outage_at_the_start_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = wandb.init

    def init(**given: Any) -> Any:
        if given["mode"] == "online":
            raise wandb.errors.CommError("no route to host\nsecond line")
        return real(**given)

    monkeypatch.setattr(wandb, "init", init)
    tracker = Tracker(project="p", name="n", config=config(), mode="online", directory=str(tmp_path), run_id="n")
    tracker.log({"loss/total": 2.0}, step=1)
    tracker.finish()
    _, history, _, _, _ = read_back(tmp_path)
    assert history[0]["loss/total"] == 2.0
    (message,) = [record.getMessage() for record in caplog.records if record.name == "aptp_ray.tracking"]
    assert "online run" in message and message.endswith("no route to host")


def test_whatever_wandb_raises_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("disk full")

    class Broken:
        log = finish = fail

        @property
        def summary(self) -> Any:
            return fail()

    caplog.set_level(logging.WARNING, "aptp_ray.tracking")
    monkeypatch.setattr(wandb, "init", fail)
    dead = Tracker(project="p", name="n", config=config(), mode="online", directory=str(tmp_path))
    assert not dead.enabled and len(caplog.records) == 2  # online, then offline
    caplog.clear()
    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    tracker = Tracker(project="p", name="n", config=config(), mode="offline", directory=str(tmp_path))
    for step in range(3):
        tracker.log({"a": 1.0}, step=step)
        tracker.log_images("i", ["no such file"], step=step)
        tracker.log_bars("b", [1.0], step=step)
    tracker.summary({"c": 1})
    tracker.finish()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and sum("could not log" in text for text in said) == 1, said


def test_flop_utilisation_is_operations_over_the_peak() -> None:
    # One forward and one backward of 100 GMACs, 50 samples a second, on a device of 100 TFLOP/s: 2 * 3e11 * 50 / 1e14.
    assert unet_flop_utilisation(3 * 100e9, 50.0, 100e12) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="tracking.peak_tflops"):
        unet_flop_utilisation(1.0, 1.0, 0.0)
    assert known_peak_tflops("NVIDIA A100-SXM4-80GB", "bf16") == 312.0
    assert known_peak_tflops("NVIDIA L40S", "bf16") == 362.0 != known_peak_tflops("NVIDIA L4", "bf16")
    assert known_peak_tflops("NVIDIA H100 PCIe", "fp16") == 756.0
    assert known_peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") is known_peak_tflops("cpu", "bf16") is None


def test_git_revision_is_the_working_trees(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        options = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *options, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert git_revision(tmp_path) is None  # no repository
    git("init", "-q")
    package, installed = tmp_path / "package", tmp_path / "venv"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "code.py").write_text("1")
    git("add", "package")
    git("commit", "-q", "-m", "m")
    assert git_revision(package) == git("rev-parse", "HEAD")
    assert git_revision(installed) is None  # inside a repository that does not know it
    (package / "code.py").write_text("2")
    assert git_revision(package) == git("rev-parse", "HEAD") + "+changes"


def test_a_heatmap_is_blue_white_and_red() -> None:
    picture = heatmap(np.array([[1.0, -1.0], [0.0, np.nan]]), cell=8)
    assert [picture.getpixel(at) for at in ((4, 4), (12, 4), (4, 12), (12, 12))] == [
        (178, 24, 43), (33, 102, 172), (255, 255, 255), (160, 160, 160),
    ]  # fmt: skip
    tracker_error = pytest.raises(ValueError, match="matrix")
    with tracker_error:
        Tracker(project="p", name="n", config=config(), mode="disabled").log_heatmap("x", [1.0], step=0)
