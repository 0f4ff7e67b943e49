"""Fine-tuning apart: one Ray Train run an expert, several side by side, each of which fails alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, Loop, UserError
from aptp_ray.train.feed import RowReader
from aptp_ray.train.launch import finished, launch
from aptp_ray.train.side_by_side import side_by_side

# By name: the task that starts a run would otherwise import diffusers, half a gigabyte, only to hand the function on.
WORKER = "aptp_ray.train.finetune:expert_worker"


class ExpertsFailed(UserError, RuntimeError):
    """Some experts could not be fine-tuned; the others are done."""


@dataclass(frozen=True)
class ExpertRun:
    """One expert's run.

    Attributes:
        expert: its number.
        rows: reader of the rows that are assigned to it.
        loop: its schedule.
        extra: further settings of its workers.
    """

    expert: int
    rows: RowReader
    loop: Loop
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"expert-{self.expert}"


def train_experts(
    runs: Sequence[ExpertRun],
    *,
    validation: RowReader | None,
    config: Config,
    run: RunDir,
    at_once: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Runs all that are not done yet, the one with most rows first, and returns their outcomes in the order of ``runs``.

    Args:
        runs: the experts'.
        validation: held-out rows, the same for all.
        config: the whole tree.
        run: the run directory.
        at_once: how many run side by side.
        say: tells people how it goes.

    Raises:
        ExpertsFailed: once the others have ended, if any failed; the same command takes those up again.
    """
    outcomes: dict[int, dict[str, Any]] = {}
    problems: dict[int, str] = {}
    left = []
    for item in sorted(runs, key=lambda item: -item.rows.num_rows):
        if finished(run, item.name):
            outcomes[item.expert] = run.read_json("train", item.name, "outcome.json")
            say(f"finetune: expert {item.expert} was done before, skipped")
            continue
        arguments = {
            "worker": WORKER,
            "config": config,
            "run": run,
            "name": item.name,
            "loop": item.loop,
            "rows": item.rows,
            "validation": validation,
            "extra": item.extra | {"expert": item.expert, "loop": item.loop},
        }
        left.append((item.expert, arguments))
    for expert, task in side_by_side(launch, left, at_once):
        try:
            outcomes[expert] = ray.get(task)
            say(f"finetune: expert {expert}, {outcomes[expert]['train_seconds']:.0f} s")
        except Exception as error:  # whatever ended one run, the others go on
            problems[expert] = cause(error)
            say(f"finetune: expert {expert} FAILED: {problems[expert]}")
    if problems:
        done_ones = ", ".join(map(str, sorted(outcomes))) or "none"
        raise ExpertsFailed(
            f"fine-tuning failed for expert {', '.join(map(str, sorted(problems)))} (done: {done_ones}); run the same command "
            f"again to take them up. First problem: {problems[min(problems)]}"
        )
    return [outcomes[item.expert] for item in runs]


def most_at_once(config: Config) -> int:
    """Returns how many experts are fine-tuned at once: as many as the cluster has room for.

    On CPUs the config's ``compute.workers`` say what room there is: a machine's logical CPUs do not.
    """
    if config.finetune.parallel_experts is not None:
        return config.finetune.parallel_experts
    compute = config.compute
    most = compute.workers if isinstance(compute.workers, int) else compute.workers[1]
    each = config.finetune.apart.workers or most
    if compute.gpus_per_worker:
        most = int(ray.cluster_resources().get("GPU", 0) // compute.gpus_per_worker)
    return max(1, most // each)


def steps_of(config: Config, rows: Sequence[int]) -> list[int]:
    """Returns each expert's number of steps: all the same, or the same sum dealt out by their rows."""
    steps = config.finetune.apart.steps
    if config.finetune.steps_by == "expert":
        return [steps] * len(rows)
    return [max(1, round(steps * len(rows) * count / sum(rows))) for count in rows]


def cause(error: BaseException) -> str:
    """Returns the innermost reason of a failed run, on one line."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Ray puts the remote traceback first; its last line that names an error is the reason.
    named = [line for line in lines if ": " in line and line.split(":")[0].split(".")[-1].endswith(("Error", "Exception"))]
    return (named or lines)[-1][:500]
