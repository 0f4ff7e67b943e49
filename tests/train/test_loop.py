"""The training loop on real Ray Train: a run that was killed goes on to the same losses, to the bit, as one that was not."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle
import torch
from torch import nn

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Optimizer, RatedLoop, load_config
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.train.feed import Ranges
from aptp_ray.train.launch import launch
from aptp_ray.train.loop import Parts, learning_rate
from aptp_ray.train.worker import Worker

STEPS, ROWS = 12, 50
CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "openmoji.yaml"


class Reader:
    """Fifty rows in memory, in groups that no lane's edge respects."""

    num_rows, groups = ROWS, (16, 16, 16, 2)

    def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[dict[str, np.ndarray], None, None]:
        rows = np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32)
        for ranges in requests:
            yield {"x": np.concatenate([rows[begin:end] for begin, end in ranges])}


class Regression(nn.Module):
    """Rows of noise to their sum, with dropout drawn by key; small, but with momentum, averages and a schedule to lose."""

    def __init__(self) -> None:
        super().__init__()
        generator = keyed_generator("start")
        self.weight = nn.Parameter(torch.randn(4, generator=generator))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, rows: torch.Tensor, keep: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        predicted = (rows * keep) @ self.weight + self.bias
        return {"square": (predicted - rows.sum(1)).square().mean(), "size": self.weight.square().mean()}, {}


def wait_for_checkpoint(folder: Path) -> None:
    """Ray Train's controller records a checkpoint a while after it was reported; a run that dies before starts anew."""
    snapshot = folder / "train" / "test" / "checkpoint_manager_snapshot.json"
    for _ in range(600):
        text = snapshot.read_text() if snapshot.exists() else ""
        if text.endswith("}") and json.loads(text)["latest_checkpoint_result"]:  # else it is being written
            return
        time.sleep(0.1)
    raise AssertionError(f"{snapshot} names no checkpoint after a minute")


def worker(settings: dict[str, Any]) -> None:
    """Trains; dies without a word at step ``crash_at``, the first time it gets there."""
    at_work = Worker.start(settings)
    folder = Path(at_work.run.root)
    loop = RatedLoop.model_validate(settings["loop"])

    def inputs(rows: dict[str, np.ndarray], step: int, mine: slice) -> dict[str, Any]:
        crashed = folder / "crashed"
        if step == settings.get("crash_at") and at_work.place.rank == 0 and not crashed.exists():
            wait_for_checkpoint(folder)
            crashed.touch()
            os._exit(1)
        keep = torch.rand(loop.global_batch_size, 4, generator=keyed_generator("keep", step)) > 0.3
        return {"rows": torch.from_numpy(rows["x"]), "keep": keep[mine].float()}

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        return {"final": {name: value.tolist() for name, value in module.state_dict().items()}}

    module = Regression()

    def log(metrics: dict[str, Any], step: int) -> None:
        if "data/padding" in metrics:
            (folder / "padding.json").write_text(json.dumps(metrics["data/padding"]))
            return
        with (folder / "losses.jsonl").open("a") as file:
            file.write(json.dumps([step, metrics["loss/square"], metrics["loss/size"], metrics["lr"]]) + "\n")

    from aptp_ray.train import worker as workers

    if at_work.place.rank == 0:
        workers.Tracker.log = lambda self, metrics, step: log(metrics, step)  # type: ignore[method-assign]
    parts = Parts(
        module=module,
        groups=[
            {"params": [module.weight], **loop.optimizer.rates()},
            {"params": [module.bias], "lr": 0.05, "weight_decay": 0.0},
        ],
        inputs=inputs,
        decode=lambda rows: dict(rows),
        save=save,
        weights={"size": 0.1},
    )
    at_work.train(parts, loop)


def train(folder: Path, *, workers: int = 1, **extra: Any) -> tuple[dict[str, Any], list[list[float]]]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder.mkdir()
    config = load_config(CONFIG, [f"run_dir={folder}", "tracking.mode=disabled", "compute.cpus_per_worker=0.5"])
    loop = RatedLoop(
        steps=STEPS,
        global_batch_size=8,
        workers=workers,
        shuffle_window=20,
        log_every_steps=1,
        checkpoint_every_steps=5,
        optimizer=Optimizer(lr=0.02, schedule="cosine", warmup_steps=3, ema_decay=0.9, clip_norm=0.5),
    )
    outcome = launch(
        worker,
        config=config,
        run=RunDir(str(folder)),
        name="test",
        loop=loop,
        rows=Reader(),
        extra={"loop": loop.model_dump(mode="json"), **extra},
    )
    return outcome, [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[float]]]:
    return train(tmp_path_factory.mktemp("loop") / "run")


def test_a_killed_run_ends_as_if_it_had_never_been_killed(
    undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path
) -> None:
    expected, losses = undisturbed
    outcome, seen = train(tmp_path / "run", crash_at=8)
    assert (tmp_path / "run" / "crashed").exists()
    # Steps 6 to 8 were done twice, from the checkpoint of step 5 on; every time with the same losses.
    assert [step for step, *_ in seen] == [*range(1, 9), *range(6, STEPS + 1)]
    assert all(row == losses[int(row[0]) - 1] for row in seen)
    assert outcome["final"] == expected["final"]


def test_two_workers_compute_what_one_does(undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path) -> None:
    interrupts = signal.getsignal(signal.SIGINT)
    outcome, seen = train(tmp_path / "run", workers=2)
    assert signal.getsignal(signal.SIGINT) is interrupts, "Ray Train's handler of Ctrl-C outlives its run"
    expected, losses = undisturbed
    assert json.loads((tmp_path / "run" / "padding.json").read_text()) == 6  # 50 rows in 8 lanes of 7
    # Rank 0 logs the loss of its own half of the batch; what both computed together shows in the weights.
    assert [row[0] for row in seen] == [row[0] for row in losses]
    for name, value in expected["final"].items():
        assert outcome["final"][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 50, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.51),
        ("constant_cosine", 49, 1.0),
        ("constant_cosine", 75, 0.51),
    ],
)
def test_learning_rates(schedule: str, step: int, expected: float) -> None:
    settings = Optimizer(warmup_steps=10, schedule=schedule, final_lr_fraction=0.02)  # type: ignore[arg-type]
    assert learning_rate(step, 100, settings) == pytest.approx(expected, abs=1e-9)
    assert learning_rate(4, 100, settings) == pytest.approx(0.5)
