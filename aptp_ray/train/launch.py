"""Starts one training run on Ray Train and brings its outcome home."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, Loop

# glibc gives freed activations back to the kernel and faults them in again each step; keeping them is worth about a tenth of
# a CPU step.
_CPU_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


class WholeStreams(DataConfig):
    """Every worker sees the whole Dataset in one order and takes its share of each global batch (see feed.py).

    The batches are then the same for any number of workers, and none of the rows that an equal split would drop is lost.
    A stream of its own for each worker (``streaming_split(1)``) runs Ray Data's executor in an actor; the plain iterator would
    run it in a thread of the worker, where it fights with the training step for the interpreter lock (a step took three times
    as long).
    """

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            for shard in shards:
                stream = dataset.copy(dataset)
                stream.context.execution_options = self._resolve_execution_options(name)
                shard[name] = stream.streaming_split(1, equal=False)[0]
        return shards


def launch(
    worker: Callable[[dict[str, Any]], None],
    *,
    config: Config,
    run: RunDir,
    name: str,
    loop: Loop,
    datasets: dict[str, Any],
    total_rows: int,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs ``worker`` on every Train worker and returns what rank 0 recorded with :func:`record_outcome`.

    Args:
        worker: the function of every Train worker; it gets the settings that ``Worker.start`` unpacks.
        config: the whole tree.
        run: the run directory.
        name: of the run below ``train/``.
        loop: workers and checkpoints of this stage.
        datasets: Ray Datasets by name; "train" is what the loop reads.
        total_rows: of "train".
        extra: more settings for the worker: plain values, and references to objects in Ray's store.

    A run with the same run directory and name goes on from its newest checkpoint (Ray Train V2's contract of ``storage_path``
    and ``name``).

    Raises:
        ray.train.TrainingFailedError: if the workers failed more often than ``compute.max_failures`` allows.
    """
    # Importing ray.data only here: execution options are its own.
    from ray.data import ExecutionOptions

    compute = config.compute
    on_gpu = compute.gpus_per_worker > 0
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            # As an object: Ray Train shows plain settings on its dashboard, and storage options hold secrets.
            "config": config,
            "run_uri": run.uri,
            "name": name,
            "total_rows": total_rows,
            **(extra or {}),
        },
        scaling_config=ScalingConfig(
            num_workers=loop.workers or compute.workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            accelerator_type=compute.accelerator_type,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=run.address("train"),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=loop.num_checkpoints),
            worker_runtime_env={} if on_gpu else {"env_vars": _CPU_ENVIRONMENT},
        ),
        datasets=datasets,
        dataset_config=WholeStreams(execution_options=ExecutionOptions(preserve_order=True)),
    )
    with _interrupts_given_back():
        trainer.fit()
    return run.read_json("train", name, "outcome.json")


@contextmanager
def _interrupts_given_back() -> Iterator[None]:
    """Takes Ray Train's handler of Ctrl-C away when a run is over.

    ``fit`` leaves it in place: a later Ctrl-C would abort a run that has ended, and the handler keeps the run's controller and
    the actors of its Datasets in memory for as long as the job lives.
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
    run.write_json(outcome, "train", name, "outcome.json")
