"""Starts one training run on Ray Train and brings its outcome home."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, ConfigError, Loop
from aptp_ray.growth import kinds_to_come
from aptp_ray.train.feed import RowReader

# glibc gives freed activations back to the kernel and faults them in again each step; keeping them is worth about a tenth of
# a CPU step.
_CPU_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

# How often an elastic run looks whether the cluster has grown; it then starts again from its newest checkpoint.
RESIZE_INTERVAL_S = 60.0


def launch(
    worker: str | Callable[[dict[str, Any]], None],
    *,
    config: Config,
    run: RunDir,
    name: str,
    loop: Loop,
    rows: RowReader,
    extra: dict[str, Any] | None = None,
    validation: RowReader | None = None,
) -> dict[str, Any]:
    """Runs ``worker`` on every Train worker and returns what rank 0 recorded with :func:`record_outcome`.

    Args:
        worker: the function of every Train worker, which gets the settings that ``Worker.start`` unpacks; or its name,
            "module:function", where this process need not import it.
        config: the whole tree.
        run: the run directory.
        name: of the run below ``train/``.
        loop: workers and checkpoints of this stage.
        rows: what the loop reads; every worker gets a copy and reads its own part.
        validation: held-out rows, for losses that are logged and come with the outcome; None: there are none.
        extra: more settings for the worker: plain values, and references to objects in Ray's store.

    A run with the same run directory and name goes on from its newest checkpoint (Ray Train V2's contract of ``storage_path``
    and ``name``).

    Raises:
        ValueError: if the workers cannot share the global batch.
        ConfigError: if workers need GPUs that the cluster will never have.
        ray.train.TrainingFailedError: if the workers failed more often than ``compute.max_failures`` allows, or spot nodes
            were taken away more often than ``compute.max_preemptions``.
    """
    if finished(run, name):
        return run.read_json(*_outcome(name))
    compute = config.compute
    workers = loop.workers or compute.workers
    loop.check_division(name, workers)
    on_gpu = compute.gpus_per_worker > 0
    _check_gpus(name, compute.gpus_per_worker * (workers if isinstance(workers, int) else workers[0]))
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    named = isinstance(worker, str)
    trainer = TorchTrainer(
        run_named if named else worker,
        train_loop_config={
            # As an object: Ray Train shows plain settings on its dashboard, and storage options hold secrets.
            "config": config,
            "run_uri": run.uri,
            "name": name,
            "rows": rows,
            "validation": validation,
            **({"worker": worker} if named else {}),
            **(extra or {}),
        },
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            accelerator_type=compute.accelerator_type,
        ),
        run_config=RunConfig(
            name=name,
            **_storage(run),
            failure_config=FailureConfig(max_failures=compute.max_failures, max_preemption_failures=compute.max_preemptions),
            checkpoint_config=CheckpointConfig(num_to_keep=loop.num_checkpoints),
            worker_runtime_env={} if on_gpu else {"env_vars": _CPU_ENVIRONMENT},
        ),
    )
    with _interrupts_given_back():
        trainer.fit()
    return run.read_json(*_outcome(name))


def _storage(run: RunDir) -> dict[str, Any]:
    """Where Ray Train keeps a run's checkpoints: by the run directory's own file system, with its options, where it is remote."""
    if run.is_local:
        return {"storage_path": run.path("train")}
    return {"storage_path": run.path("train"), "storage_filesystem": PyFileSystem(FSSpecHandler(run.fs))}


def _check_gpus(name: str, needed: float) -> None:
    """Refuses to wait for GPUs on a cluster that cannot grow.

    Raises:
        ConfigError: if it has too few; on one that can grow, Ray Train waits for them.
    """
    if not needed or not ray.is_initialized() or kinds_to_come() != []:
        return
    present = ray.cluster_resources().get("GPU", 0)
    if present < needed:
        raise ConfigError(
            f"{name} needs {needed:g} GPUs (compute.gpus_per_worker and workers) and the cluster has {present:g}: set "
            "compute.gpus_per_worker=0 to train on CPUs, or run on a cluster with GPUs"
        )


def run_named(settings: dict[str, Any]) -> None:
    """Runs the worker function that the settings name."""
    module, _, function = settings["worker"].partition(":")
    getattr(import_module(module), function)(settings)


def finished(run: RunDir, name: str) -> bool:
    """Tells whether a run has come to its end: its outcome is written last."""
    return run.exists(*_outcome(name))


@contextmanager
def _interrupts_given_back() -> Iterator[None]:
    """Takes Ray Train's handler of Ctrl-C away when a run is over.

    ``fit`` leaves it in place: a later Ctrl-C would abort a run that has ended, and the handler keeps the run's controller in
    memory for as long as the job lives.
    """
    if threading.current_thread() is not threading.main_thread():  # where nobody can set handlers
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)


def record_outcome(run: RunDir, name: str, outcome: dict[str, Any]) -> None:
    """Writes a run's figures where :func:`launch` reads them."""
    run.write_json(outcome, *_outcome(name))


def _outcome(name: str) -> tuple[str, ...]:
    return ("train", name, "outcome.json")
