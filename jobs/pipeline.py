"""Runs all stages in their order and skips those that are done: teacher, encode, prune, assign, finetune, report.

--take-over RUN_DIR copies what another run has made with the same settings (the teacher, the encoded rows), so that runs that are
to be compared encode once.
"""

from __future__ import annotations

import time
from typing import Any

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config
from aptp_ray.sections import OpenMoji
from cli import Stage, errors_on_one_line, finish, load, parser, ray_session, run_stage, say
from rows import layout_of
from stages import STAGE_FUNCTIONS


def check(config: Config, run: RunDir, *, overwrite: bool = False) -> None:
    """Refuses what cannot work, before any work: another config's run, missing shards, a budget out of reach."""
    for name in STAGE_FUNCTIONS:
        run.is_done(config, name, overwrite)
    if not run.is_done(config, "encode", overwrite) and not isinstance(config.data.source, OpenMoji):
        for split in ("train", "validation"):
            layout_of(config, run, split).units()
    if not run.is_done(config, "prune", overwrite):
        from aptp_ray.train.prune import check_budget

        check_budget(config)
    run.prepare(config)


def run_pipeline(config: Config, run: RunDir, *, overwrite: bool = False) -> dict[str, dict[str, Any]]:
    """Runs what is left to do and returns every stage's manifest entry."""
    check(config, run, overwrite=overwrite)
    stages: dict[str, Stage] = STAGE_FUNCTIONS
    return {name: run_stage(name, stage, config, run, overwrite=overwrite) for name, stage in stages.items()}


def figures(config: Config, run: RunDir) -> dict[str, Any]:
    """The main figures of a finished run."""
    routing, report = run.read_json("routing.json"), run.manifest()["stages"]["report"]
    return {
        "budget": config.prune.budget,
        "macs_ratio": report["macs_ratio"],  # counted on the experts' UNets
        "experts": routing["experts"],
        **{name: report[name] for name in ("largest_overlap", "information", "captions_agree")},
    }


def main() -> None:
    arguments = parser(__doc__, can_dry_run=True)
    arguments.add_argument("--take-over", metavar="RUN_DIR", help="copy stages of this run where its config is the same")
    options = arguments.parse_intermixed_args()
    begun = time.monotonic()
    with errors_on_one_line():
        config = load(options)
        run = open_run(config)
        if options.dry_run:
            from dry_run import dry_run

            found = dry_run(config, run, list(STAGE_FUNCTIONS), overwrite=options.overwrite)
            finish({"run_dir": run.uri, "stage": "pipeline", **found})
            return
        check(config, run, overwrite=options.overwrite)
        if options.take_over:
            from aptp_ray.reuse import take_over

            taken = take_over(config, run, RunDir(options.take_over, config.storage_options))
            say(f"taken over from {options.take_over}: {', '.join(taken) or 'nothing'}")
        with ray_session(config):
            run_pipeline(config, run, overwrite=options.overwrite)
    seconds = round(time.monotonic() - begun, 1)
    finish({"run_dir": run.uri, "stage": "pipeline", "seconds": seconds, **figures(config, run)})


if __name__ == "__main__":
    main()
