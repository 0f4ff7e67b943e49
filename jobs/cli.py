"""What every job script shares: arguments, the local or remote Ray, and the line of JSON at the end.

    python jobs/<stage>.py CONFIG [key=value ...] [--run-dir URI] [--overwrite] [--dry-run]

The last line of standard output is one of JSON, however a job ends: its figures, or {"stage", "error", "exit_code"}. Exit codes:

    0    done, or done before
    1    a failure that the program did not foresee (its traceback is on standard error); run the same command again
    2    something to be mended first: config, data, run directory, credentials, resources; "error" says what
    130  interrupted (SIGINT), and 143 stopped (SIGTERM): the same command goes on from the newest checkpoint

`ray job stop` sends SIGTERM and kills three seconds later (RAY_JOB_STOP_WAIT_TIME_S of the cluster); a job that was killed has no
last line, and goes on just the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Hugging Face's progress bars and advice do not belong into a job's log.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
# Ray 2.60 would otherwise warn in every worker that it overrides the accelerators of CPU actors.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, UserError, load_config
from aptp_ray.serve.environment import for_driver, for_ray

for_driver()

_ROOT = Path(__file__).resolve().parent.parent
DEMO_CONFIG = str(_ROOT / "jobs" / "configs" / "openmoji.yaml")

Stage = Callable[[Config, RunDir], dict[str, Any]]


def parser(
    description: str | None, *, default_config: str | None = None, can_dry_run: bool = False
) -> argparse.ArgumentParser:
    """Returns the arguments that all jobs take."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "config", nargs="?" if default_config else None, default=default_config, help="YAML file, e.g. jobs/configs/openmoji.yaml"
    )
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. prune.budget=0.5")
    arguments.add_argument("--run-dir", help="run directory, any fsspec URI (run_dir of the config)")
    arguments.add_argument("--overwrite", action="store_true", help="make a stage again that was made with another config")
    if can_dry_run:
        arguments.add_argument(
            "--dry-run", action="store_true", help="say what would run, on which resources and with how much storage; do nothing"
        )
    return arguments


def load(options: argparse.Namespace, changes: Sequence[str] = ()) -> Config:
    """Reads the config with the command line's overrides; a lone ``key=value`` first argument is an override, too.

    Args:
        options: of :func:`parser`.
        changes: further overrides, which come last.
    """
    overrides = list(options.overrides)
    path = options.config
    if "=" in path and not Path(path).exists():
        overrides.insert(0, path)
        path = DEMO_CONFIG
    if options.run_dir:
        overrides.append(f"run_dir={json.dumps(options.run_dir)}")
    return load_config(path, [*overrides, *changes])


def on_a_cluster() -> bool:
    """Tells whether the job was submitted to a cluster, or its environment names one."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


@contextmanager
def ray_session(config: Config) -> Any:
    """Connects to the cluster that the job runs on, or starts a local one.

    On one machine with few cores, Ray's logical CPUs are set to four at least: Train workers, Data tasks and Serve replicas
    then share the real cores instead of waiting for one another forever.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if on_a_cluster():
        ray.init(log_to_driver=False)
    else:
        cores = os.cpu_count() or 1
        # What the store has touched once stays resident until the session ends; Ray Data holds back, and spills, at its limit.
        memory = min(1 << 30, _memory() // 5)
        # Job scripts import their neighbours, and workers must be able to, too.
        with for_ray():
            ray.init(
                address="local",  # a cluster started on this machine for something else would refuse num_cpus
                num_cpus=max(4, cores),
                object_store_memory=memory,
                include_dashboard=False,
                log_to_driver=os.environ.get("APTP_WORKER_LOGS") == "1",
                logging_level="warning",
            )
    try:
        yield
    finally:
        ray.shutdown()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def say(message: str) -> None:
    """Writes a line for people, on standard error."""
    print(message, file=sys.stderr, flush=True)


def run_stage(name: str, stage: Stage, config: Config, run: RunDir, *, overwrite: bool = False) -> dict[str, Any]:
    """Runs one stage unless it is done, and records it; returns its manifest entry."""
    if run.is_done(config, name, overwrite):
        say(f"{name}: done before, skipped")
        return run.manifest()["stages"][name]
    run.prepare(config, name, overwrite=overwrite)
    say(f"{name}: running")
    begun = time.monotonic()
    facts = stage(config, run)
    seconds = round(time.monotonic() - begun, 1)
    entry = run.finish(config, name, seconds=seconds, **facts)
    say(f"{name}: {seconds:.0f} s")
    return entry


def finish(line: dict[str, Any]) -> None:
    """Prints the line of JSON that ends a job's standard output."""
    sys.stdout.flush()
    print(json.dumps(line), flush=True)


def main(name: str, stage: Stage, description: str | None) -> None:
    """The whole of a job that runs one stage."""
    options = parser(description, can_dry_run=True).parse_intermixed_args()
    with errors_on_one_line(name):
        config = load(options)
        run = open_run(config)
        if options.dry_run:
            from dry_run import dry_run

            finish({"run_dir": run.uri, "stage": name, **dry_run(config, run, [name], overwrite=options.overwrite)})
            return
        if not run.is_done(config, name, options.overwrite):
            run.check_before(config, name)  # to refuse before Ray starts
        with ray_session(config):
            entry = run_stage(name, stage, config, run, overwrite=options.overwrite)
    figures = {k: v for k, v in entry.items() if k not in {"versions", "config_hash", "finished_at"}}
    finish({"run_dir": run.uri, "stage": name, **figures})


@contextmanager
def errors_on_one_line(stage: str | None = None) -> Any:
    """Ends a job that fails with its line of JSON and the exit code that the module's head documents.

    A user's mistake is told on one line; anything else keeps its traceback.

    Args:
        stage: for the line; None: the script's name.
    """
    stage = stage or Path(sys.argv[0]).stem
    with _stopped_by_sigterm():
        try:
            yield
        except UserError as error:
            say(f"error: {error}")
            raise _ended(stage, str(error), 2) from None
        except KeyboardInterrupt:
            raise _ended(stage, "interrupted; the same command goes on where it stopped", 130) from None
        except _Stopped:
            raise _ended(stage, "stopped; the same command goes on where it stopped", 143) from None
        except SystemExit as end:
            if end.code != signal.SIGTERM:  # Ray's own handler, once it is connected, leaves with the signal's number
                raise
            raise _ended(stage, "stopped; the same command goes on where it stopped", 143) from None
        except Exception as error:
            finish({"stage": stage, "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", "exit_code": 1})
            raise


class _Stopped(BaseException):
    """SIGTERM came."""


def _ended(stage: str, error: str, code: int) -> SystemExit:
    finish({"stage": stage, "error": error, "exit_code": code})
    return SystemExit(code)


@contextmanager
def _stopped_by_sigterm() -> Any:
    """Lets SIGTERM unwind the job instead of ending the process where it is, so that Ray is told and the last line is written."""

    def stop(*_: Any) -> None:
        raise _Stopped

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever has that one decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
