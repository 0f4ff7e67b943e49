"""The training loop on real Ray Train: a run that was killed goes on to the same losses, to the bit, as one that was not."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import ray.cloudpickle
import ray.train
import torch
from moto.server import ThreadedMotoServer
from torch import nn

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Optimizer, RatedLoop, load_config
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.train.feed import Feed, Ranges
from aptp_ray.train.launch import launch
from aptp_ray.train.loop import Parts, learning_rate
from aptp_ray.train.worker import Worker
from tests.train.killing import die, wait_for_checkpoint

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


def worker(settings: dict[str, Any]) -> None:
    """Trains; at each step in ``kills``, the first time it gets there, one process of the run is killed."""
    at_work = Worker.start(settings)
    folder = Path(settings["folder"])
    loop = RatedLoop.model_validate(settings["loop"])
    kills = {int(step): who for step, who in settings.get("kills", {}).items()}

    def die_at(step: int) -> None:
        who, done = kills[step], folder / f"killed-{step}"
        if done.exists() or at_work.place.rank != (0 if who == "controller" else who):
            return
        if step >= loop.checkpoint_every_steps:
            wait_for_checkpoint(at_work.run, at_work.name)
        done.touch()
        die(who)

    def inputs(rows: dict[str, np.ndarray], step: int, mine: slice) -> dict[str, Any]:
        if step in kills:
            die_at(step)
        if at_work.place.rank == 0:
            with (folder / "sizes.txt").open("a") as file:
                file.write(f"{at_work.place.world_size}\n")
        if settings.get("slow"):  # so slow that there are steps left until the file "go" is there
            left = loop.steps - step
            while left == 1 and not (folder / "go").exists():
                time.sleep(0.1)
            time.sleep(1.0)
        if step == settings.get("sleep_before"):
            time.sleep(3.0)
        if step == settings.get("poison"):
            rows["x"] = rows["x"] * np.float32("nan")
        keep = torch.rand(loop.global_batch_size, 4, generator=keyed_generator("keep", step)) > 0.3
        return {"rows": torch.from_numpy(rows["x"]), "keep": keep[mine].float()}

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        return {"final": {name: value.tolist() for name, value in module.state_dict().items()}}

    module = Regression()

    def log(metrics: dict[str, Any], step: int) -> None:
        if "validation/square" in metrics:
            with (folder / "validation.jsonl").open("a") as file:
                file.write(json.dumps([step, metrics["validation/square"]]) + "\n")
            return
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


def train(
    folder: Path,
    *,
    workers: int | list[int] = 1,
    options: list[str] | None = None,
    loop: dict[str, Any] | None = None,
    validation: Reader | None = None,
    run: RunDir | None = None,
    **extra: Any,
) -> tuple[dict[str, Any], list[list[float]]]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder.mkdir(exist_ok=True)
    run = run or RunDir(str(folder))
    config = load_config(
        CONFIG,
        [
            f"run_dir={run.uri}",
            f"compute.workers={json.dumps(workers)}",
            "tracking.mode=disabled",
            "compute.cpus_per_worker=0.5",
            "compute.max_failures=-1",
            *(options or []),
        ],
    )
    if run.storage_options:
        config = config.model_copy(update={"storage_options": run.storage_options})
    spec = RatedLoop.model_validate(
        {
            "steps": STEPS,
            "global_batch_size": 8,
            "shuffle_window": 20,
            "log_every_steps": 1,
            "checkpoint_every_steps": 5,
            "optimizer": Optimizer(lr=0.02, schedule="cosine", warmup_steps=3, ema_decay=0.9, clip_norm=0.5),
            **(loop or {}),
        }
    )
    outcome = launch(
        worker,
        config=config,
        run=run,
        name="test",
        loop=spec,
        rows=Reader(),
        validation=validation,
        extra={"loop": spec.model_dump(mode="json"), "folder": str(folder), **extra},
    )
    return outcome, [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[float]]]:
    return train(tmp_path_factory.mktemp("loop") / "run")


def same_as(
    expected: tuple[dict[str, Any], list[list[float]]], found: tuple[dict[str, Any], list[list[float]]], rel: float = 1e-5
) -> None:
    """Asserts the same losses of the global batch at every step, and the same weights after them."""
    assert [row[0] for row in found[1]] == [row[0] for row in expected[1]]
    for seen, row in zip(found[1], expected[1], strict=True):
        assert seen == pytest.approx(row, rel=rel)
    for name, value in expected[0]["final"].items():
        assert found[0]["final"][name] == pytest.approx(value, abs=1e-6)


def test_a_run_whose_workers_and_controller_are_killed_ends_as_if_they_had_never_been(
    undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path
) -> None:
    expected, losses = undisturbed
    kills = {"8": 0, "11": "controller"}
    with pytest.raises(ray.exceptions.RayActorError):  # the controller is the one whose death ends the command
        train(tmp_path / "run", kills=kills)
    outcome, seen = train(tmp_path / "run", kills=kills)  # the same command again
    assert {path.name for path in (tmp_path / "run").glob("killed-*")} == {"killed-8", "killed-11"}
    # From the checkpoint of step 5 on; then from that of step 10, or of step 5 where the controller had not recorded the other.
    steps = [int(row[0]) for row in seen]
    again = steps[14]
    assert again in (6, 11) and steps == [*range(1, 9), *range(6, 12), *range(again, STEPS + 1)]
    assert all(row == losses[int(row[0]) - 1] for row in seen)
    assert outcome["final"] == expected["final"]


@pytest.mark.slow
def test_ten_kills_at_random_of_two_workers_leave_no_trace(ray_cluster: None, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    steps = random.choice(np.arange(2, 40), 10, replace=False).tolist()
    kills = {str(step): int(random.integers(2)) for step in steps}
    kills[str(max(steps))] = "controller"  # type: ignore[assignment]
    spec = {"steps": 40, "checkpoint_every_steps": 2}
    expected, losses = train(tmp_path / "calm", workers=2, loop=spec)
    with pytest.raises(ray.exceptions.RayActorError):
        train(tmp_path / "run", workers=2, loop=spec, kills=kills)
    outcome, seen = train(tmp_path / "run", workers=2, loop=spec, kills=kills)
    assert len(list((tmp_path / "run").glob("killed-*"))) == 10
    assert all(row == losses[int(row[0]) - 1] for row in seen) and {row[0] for row in seen} == set(range(1, 41))
    assert outcome["final"] == expected["final"]


def test_two_workers_compute_what_one_does(undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path) -> None:
    interrupts = signal.getsignal(signal.SIGINT)
    found = train(tmp_path / "run", workers=2)
    assert signal.getsignal(signal.SIGINT) is interrupts, "Ray Train's handler of Ctrl-C outlives its run"
    assert json.loads((tmp_path / "run" / "padding.json").read_text()) == 6  # 50 rows in 8 lanes of 7
    same_as(undisturbed, found)


@pytest.mark.slow  # another start of Ray Train
def test_three_workers_share_eight_lanes_and_compute_what_one_does(
    undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path
) -> None:
    """An elastic run that gets all the workers it asks for; and each of them cuts its 2 or 3 rows into passes."""
    same_as(undisturbed, train(tmp_path / "run", workers=[3, 3], loop={"accumulation": 2}))


@pytest.mark.slow  # two more starts of Ray Train
def test_validation_is_of_the_same_draws_each_time_and_leaves_training_alone(
    undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path
) -> None:
    outcome, seen = train(tmp_path / "run", loop={"validate_every_steps": 5, "validation_batches": 3}, validation=Reader())
    assert seen == undisturbed[1] and outcome["final"] == undisturbed[0]["final"]
    logged = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [step for step, _ in logged] == [5, 10, STEPS] and logged[-1][1] == outcome["validation/square"]
    # The final figure, worked out from the weights that were saved.
    module = Regression()
    module.load_state_dict({name: torch.tensor(value) for name, value in outcome["final"].items()})
    feed = Feed(Reader(), global_batch_size=8, rank=0, world_size=1, seed=0, window=20, lanes=8, decode=dict)
    values = []
    for index, rows in enumerate(islice(feed.batches(), 3)):
        keep = (torch.rand(8, 4, generator=keyed_generator("keep", -1 - index)) > 0.3).float()
        values.append(float(module(torch.from_numpy(rows["x"]), keep)[0]["square"].detach()))
    assert outcome["validation/square"] == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.slow  # Ray Train starts it again and again
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(ray_cluster: None, tmp_path: Path) -> None:
    """Even the checkpoint of the step before, which is on its way to storage when the run stops."""
    with pytest.raises(ray.train.TrainingFailedError, match=r"loss square is not finite at step 5 \(losses .*'size'"):
        train(tmp_path / "run", poison=5, options=["compute.max_failures=0"])
    outcome, seen = train(tmp_path / "run")
    assert [row[0] for row in seen] == [*range(1, STEPS + 1)] and outcome["steps"] == STEPS


@pytest.mark.slow  # it waits
def test_a_checkpoint_is_kept_when_minutes_are_up(ray_cluster: None, tmp_path: Path) -> None:
    """By rank 0's clock, for both ranks; the steps alone would keep none before the last."""
    loop = {"checkpoint_every_steps": 1000, "checkpoint_every_minutes": 2.5 / 60, "num_checkpoints": 50}
    train(tmp_path / "run", workers=2, loop=loop, sleep_before=6)
    facts = [json.loads(path.read_text()) for path in (tmp_path / "run" / "train" / "test").glob("checkpoint_*/facts.json")]
    assert {7, STEPS} <= {fact["step"] for fact in facts} and len(facts) < STEPS


@pytest.mark.slow  # an S3 server, and two more starts
def test_checkpoints_go_to_the_run_directorys_own_storage(
    undisturbed: tuple[dict[str, Any], list[list[float]]], tmp_path: Path
) -> None:
    """An S3 server that only the config's storage options know of, through a kill and back."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "testing", "secret": "testing", "endpoint_url": f"http://{host}:{port}"}
        fsspec.filesystem("s3", **options).mkdir("runs")
        run = RunDir("s3://runs/demo", options)
        outcome, seen = train(tmp_path / "local", run=run, kills={"8": 0})
        assert [row[0] for row in seen] == [*range(1, 9), *range(6, STEPS + 1)]
        assert outcome["final"] == undisturbed[0]["final"]
        names = run.fs.find(run.path("train", "test"))
        assert sum(name.endswith("state.safetensors") for name in names) == 2
    finally:
        server.stop()


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
