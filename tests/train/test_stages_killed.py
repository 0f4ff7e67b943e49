"""The stages themselves, killed again and again: prune and fine-tune end as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle
import ray.train

import stages
from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import load_config
from aptp_ray.reuse import take_over
from aptp_ray.train import experts
from aptp_ray.train import launch as launching
from aptp_ray.train.launch import launch
from cli import run_stage
from tests.train.killing import die, wait_for_checkpoint

pytestmark = pytest.mark.slow  # Ray Train starts the workers some twenty times

SMOKE = Path(__file__).parents[2] / "jobs" / "configs" / "smoke.yaml"
STEPS, EVERY = 30, 3
KILLS = 4  # of each of the three runs
LONG = {"steps": STEPS, "global_batch_size": 8, "log_every_steps": 1, "checkpoint_every_steps": EVERY}
CHANGES = [
    *(f"{loop}.{key}={value}" for loop in ("prune.loop", "finetune.shared", "finetune.apart") for key, value in LONG.items()),
    "compute.max_failures=-1",
]
# Ray Train's names of the runs that are killed, with their workers.
RUNS = {"prune": 2, "finetune-shared": 2, "expert-0": 1}
# stage -> the run of which a controller is killed, too: with it ends the command.
COMMANDS = {"prune": "prune", "finetune": "finetune-shared"}


def mortal(settings: dict[str, Any]) -> None:
    """A stage's own worker, which notes its losses, and in which a process dies at some steps, the first time it gets there."""
    from aptp_ray.train.launch import run_named
    from aptp_ray.train.worker import Tracker, Worker

    folder, kills = Path(settings["folder"]), settings["kills"]
    train, log = Worker.train, Tracker.log

    def dying(self: Worker, parts: Any, loop: Any) -> None:
        inputs = parts.inputs

        def at_step(rows: dict[str, Any], step: int, mine: slice) -> dict[str, Any]:
            who, done = kills.get(str(step)), folder / f"killed-{step}"
            if who is not None and not done.exists() and self.place.rank == (0 if who == "controller" else who):
                # The newest checkpoint but one is on record; the newest may be on its way.
                wait_for_checkpoint(self.run, self.name, step // EVERY * EVERY - EVERY)
                done.touch()
                die(who)
            return inputs(rows, step, mine)

        parts.inputs = at_step
        train(self, parts, loop)

    def noted(self: Tracker, metrics: dict[str, Any], step: int) -> None:
        losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
        if losses and ray.train.get_context().get_world_rank() == 0:
            with (folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([step, losses]) + "\n")
        log(self, metrics, step)

    Worker.train, Tracker.log = dying, noted  # type: ignore[method-assign]
    try:
        run_named(settings)
    finally:
        Worker.train, Tracker.log = train, log  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def encoded(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with teacher and rows."""
    config = load_config(SMOKE, [f"run_dir={tmp_path_factory.mktemp('killed')}", *CHANGES])
    run = open_run(config)
    run.prepare(config)
    for stage in ("teacher", "encode"):
        run_stage(stage, stages.STAGE_FUNCTIONS[stage], config, run)
    return run


def experts_of(folder: Path, encoded: RunDir, kills: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Prunes and fine-tunes on the rows of another run, with kills by stage and step; notes losses below ``folder/notes``."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = load_config(SMOKE, [f"run_dir={folder}", *CHANGES])
    run = open_run(config)
    run.prepare(config)
    assert take_over(config, run, encoded) == ["teacher", "encode"]

    def launched(worker: Any, *, name: str, extra: dict[str, Any], **others: Any) -> dict[str, Any]:
        notes = folder / "notes" / name
        notes.mkdir(parents=True, exist_ok=True)
        named = worker if isinstance(worker, str) else f"{worker.__module__}:{worker.__name__}"
        told = {"worker": named, "folder": str(notes), "kills": kills.get(name, {})}
        return launch(mortal, name=name, extra=extra | told, **others)

    for module in (launching, experts):
        monkeypatch.setattr(module, "launch", launched)
    for stage in ("prune", "assign", "finetune"):
        if "controller" in kills.get(COMMANDS.get(stage, ""), {}).values():
            with pytest.raises(ray.exceptions.RayActorError):  # the controller is the one whose death ends the command
                run_stage(stage, stages.STAGE_FUNCTIONS[stage], config, run)
        run_stage(stage, stages.STAGE_FUNCTIONS[stage], config, run)  # the same command again
    return run


def losses_of(run: RunDir, name: str) -> list[tuple[int, dict[str, float]]]:
    lines = run.read_bytes("notes", name, "losses.jsonl").decode().splitlines()
    return [(step, losses) for step, losses in map(json.loads, lines)]


def test_stages_that_are_killed_at_random_end_as_if_they_had_never_been(
    encoded: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    kills: dict[str, dict[str, Any]] = {}
    for name, workers in RUNS.items():
        steps = sorted(random.choice(np.arange(2, STEPS), KILLS, replace=False).tolist())
        kills[name] = {str(step): int(random.integers(workers)) for step in steps}
        if name in COMMANDS.values():
            kills[name][str(steps[-2])] = "controller"
    calm = experts_of(tmp_path / "calm", encoded, {}, monkeypatch)
    run = experts_of(tmp_path / "run", encoded, kills, monkeypatch)
    for name in RUNS:
        expected, seen = dict(losses_of(calm, name)), losses_of(run, name)
        assert len(list(Path(run.path("notes", name)).glob("killed-*"))) == KILLS
        assert list(expected) == list(range(1, STEPS + 1)) and {step for step, _ in seen} == set(expected)
        assert all(losses == expected[step] for step, losses in seen), name  # to the bit
        # Where each of the attempts began: late ones with late checkpoints, at most two of them behind.
        begun = [step for before, (step, _) in zip([STEPS, *(step for step, _ in seen)], seen, strict=False) if step <= before]
        assert len(begun) == KILLS + 1
        for died, again in zip(sorted(map(int, kills[name])), begun[1:], strict=True):
            assert again > died // EVERY * EVERY - 2 * EVERY, (died, again)
    names = ["router/model.safetensors", "routing.json", *(f"experts/{e}/diffusion_pytorch_model.safetensors" for e in (0, 1))]
    for name in names:
        assert run.read_bytes(name) == calm.read_bytes(name), name
