"""The whole comparison in one job: makes the run of a config and every run that its systems name, then draws and scores them all.

    python jobs/compare.py jobs/configs/openmoji_comparison.yaml

A system of ``evaluation.systems`` with ``changes`` is a baseline, an ablation or another seed: the same config but for those
lines, in a run directory of its own. What it has in common with the first run, teacher and encoded rows above all, is taken over.
A job that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, ConfigError
from aptp_ray.reuse import take_over
from cli import errors_on_one_line, finish, load, parser, ray_session, run_stage, say
from evaluate import evaluate_run, figures
from pipeline import check, run_pipeline
from stages import STAGE_FUNCTIONS


def other_runs(config: Config, load_with: Callable[[list[str]], Config]) -> dict[str, Config]:
    """The configs of the runs that systems name with their changes, by run directory.

    Args:
        config: the whole tree.
        load_with: reads it anew, with changes.

    Raises:
        ConfigError: if two systems make one run directory by different changes, or the run's own.
    """
    changes: dict[str, list[str]] = {}
    for system in config.evaluation.systems:
        if system.changes:
            where = str(system.run_dir)
            if changes.setdefault(where, system.changes) != system.changes or where == config.run_dir:
                raise ConfigError(f"system {system.name}: run_dir={where} is made by other changes, or is this run's own")
    names = {where: f"{config.name}-{os.path.basename(where)}" for where in changes}
    return {
        where: load_with([*made, f"run_dir={json.dumps(where)}", f"name={json.dumps(names[where])}"])
        for where, made in changes.items()
    }


def make(config: Config, home: str, overwrite: bool) -> float:
    """Makes one of the other runs, up to its experts; returns the seconds that it took."""
    begun, run = time.monotonic(), open_run(config)
    run.prepare(config, next(iter(STAGE_FUNCTIONS)) if overwrite else None, overwrite=overwrite)
    take_over(config, run, RunDir(home, config.storage_options))
    for name, stage in STAGE_FUNCTIONS.items():
        if name != "report":
            run_stage(name, stage, config, run)
    return time.monotonic() - begun


def make_all(configs: list[Config], home: str, at_once: int, overwrite: bool) -> None:
    """Makes runs, some side by side."""
    import ray

    from aptp_ray.train.side_by_side import side_by_side

    calls = [(one.run_dir, {"config": one, "home": home, "overwrite": overwrite}) for one in configs]
    for where, task in side_by_side(make, calls, at_once):
        say(f"compare: {where} is made, {ray.get(task):.0f} s")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--at-once", type=int, help="runs made side by side; as many as compute.workers leaves cores for")
    options = arguments.parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        config = load(options)
        run = open_run(config)
        others = list(other_runs(config, partial(load, options)).values())
        for one in (config, *others):
            check(one, open_run(one), overwrite=options.overwrite)
        workers = config.compute.workers if isinstance(config.compute.workers, int) else config.compute.workers[1]
        cores = (os.cpu_count() or 1) // (workers * config.compute.threads_per_worker)
        with ray_session(config):
            run_pipeline(config, run, overwrite=options.overwrite)
            make_all(others, run.uri, options.at_once or max(1, cores), options.overwrite)
            result = evaluate_run(config, run, overwrite=options.overwrite)
    seconds = round(time.monotonic() - begun, 1)
    finish({"run_dir": run.uri, "stage": "compare", "seconds": seconds, "runs": 1 + len(others), **figures(result)})


if __name__ == "__main__":
    main()
