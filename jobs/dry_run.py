"""What a job would do: the config as it is read, stages done and to do, storage, and whether the cluster can ever run them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.config import Config, ConfigError, Loop
from aptp_ray.credentials import revealed
from aptp_ray.sections import OpenMoji
from cli import on_a_cluster, say

Bundle = dict[str, float]


@dataclass(frozen=True)
class Ask:
    """Processes that have to run side by side.

    Attributes:
        what: for messages.
        count: how many; of an elastic run, the least.
        bundle: what each takes.
        knobs: the config's keys that decide it.
    """

    what: str
    count: int
    bundle: Bundle
    knobs: str = "compute.workers, compute.cpus_per_worker, compute.gpus_per_worker"


@dataclass(frozen=True)
class Cluster:
    """What there is, and what an autoscaler may add.

    Attributes:
        nodes: of each, its resources.
        kinds: of each kind of node that can be added, its resources and how many there may be; empty: none can; None: an
            autoscaler runs that does not say which.
    """

    nodes: list[Bundle]
    kinds: list[tuple[Bundle, int]] | None

    def verdict(self, ask: Ask) -> str:
        """Returns "fits", "fits once the cluster has grown", or that nobody here knows.

        Raises:
            ConfigError: if it can never be scheduled.
        """
        if _room(ask.bundle, [(node, 1) for node in self.nodes]) >= ask.count:
            return "fits"
        if self.kinds is None:
            return "waits for nodes; which kinds the autoscaler may add is not known here"
        if self.kinds and _room(ask.bundle, self.kinds) >= ask.count:
            return "fits once the cluster has grown"
        have = [(node, 1) for node in self.nodes] + self.kinds
        largest = ", ".join(_text(node) + (f" (up to {count})" if count > 1 else "") for node, count in have) or "no nodes"
        raise ConfigError(
            f"{ask.what} can never be scheduled: {ask.count} times {_text(ask.bundle)} are asked for, and the cluster has "
            f"{largest}: change {ask.knobs}, or use a larger cluster"
        )


def _room(bundle: Bundle, nodes: Sequence[tuple[Bundle, int]]) -> int:
    """How many bundles fit on the nodes; an accelerator's name is known of nodes that run, not of kinds that may come."""
    room = 0
    for node, count in nodes:
        wanted = {
            name: amount
            for name, amount in bundle.items()
            if amount and (name in node or not name.startswith("accelerator_type"))
        }
        each = min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()), default=1_000_000)
        room += each * count
    return room


def _text(bundle: Bundle) -> str:
    shown = {name: amount for name, amount in bundle.items() if name in ("CPU", "GPU") or name.startswith("accelerator_type")}
    return "{" + ", ".join(f"{name.removeprefix('accelerator_type:')}: {amount:g}" for name, amount in shown.items()) + "}"


# -- what is asked for -----------------------------------------------------------------------------------------------------------


def asks_of(config: Config, stage: str) -> list[Ask]:
    """Returns what a stage needs side by side."""
    compute, finetune = config.compute, config.finetune
    each: Bundle = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker}
    if compute.accelerator_type:
        each[f"accelerator_type:{compute.accelerator_type}"] = 0.001  # as Ray asks for it

    def workers(what: str, loop: Loop) -> Ask:
        count = loop.workers or compute.workers
        return Ask(f"{what}'s Train workers", count if isinstance(count, int) else count[0], each)

    if stage == "teacher":
        parts = {"vae": config.teacher.vae, "unet": config.teacher.unet}
        return [workers(f"teacher.{name}", part.loop) for name, part in parts.items() if part is not None]
    if stage == "encode":
        resources = {"CPU": 1.0, **config.encode.resources}
        return [Ask("encode's actors", config.encode.actors or 1, resources, "encode.actors, encode.resources")]
    if stage == "prune":
        return [workers("prune", config.prune.loop)]
    if stage == "finetune":
        shared = [workers("finetune.shared", finetune.shared)] if finetune.shared else []
        return [*shared, workers("finetune.apart", finetune.apart)]
    return [Ask(f"{stage}'s tasks", 1, each if stage == "report" else {"CPU": 1.0})]


def cluster_at_hand(config: Config) -> Cluster:
    """Returns the cluster that the job would run on; for a local one, without starting it."""
    if not on_a_cluster():
        gpus = 0
        if config.compute.gpus_per_worker:
            import torch

            gpus = torch.cuda.device_count()
        # As cli.ray_session starts it.
        return Cluster([{"CPU": float(max(4, os.cpu_count() or 1)), "GPU": float(gpus)}], [])
    import ray

    from aptp_ray.growth import kinds_to_come

    ray.init(log_to_driver=False, ignore_reinit_error=True)
    kinds = kinds_to_come()
    return Cluster([dict(node["Resources"]) for node in ray.nodes() if node["Alive"]], kinds)


# -- storage ---------------------------------------------------------------------------------------------------------------------


def rows_of(config: Config, run: RunDir, split: str) -> int | None:
    """Returns how many images a split has, as far as it can be known without reading them."""
    source = config.data.source
    if isinstance(source, OpenMoji):
        return source.train_images if split == "train" else source.validation_images
    from aptp_ray.data.stream import promised_rows
    from rows import layout_of

    layout = layout_of(config, run, split)
    return promised_rows(layout, layout.units())


def storage_of(config: Config, run: RunDir) -> dict[str, Any]:
    """Returns what encoding will write, in bytes; None where it is not known yet."""
    from aptp_ray.data.encoder import describe
    from rows import encoder_spec, framing

    source = config.teacher.source or ""
    made_here = config.teacher.vae is not None or not (source.startswith("package:") or os.path.isdir(source))
    if run.exists("teacher", "model_index.json"):
        folder = run.address("teacher")
    elif made_here or config.teacher.text_encoder is not None:
        return {"row_bytes": None, "why": "the teacher's encoders are not here yet: known once the stage teacher is done"}
    else:
        folder = source
    row = describe(encoder_spec(config, folder), framing(config), config.encode.mode).row_bytes()
    found: dict[str, Any] = {"row_bytes": row}
    for split in ("train", "validation"):
        rows = rows_of(config, run, split)
        found[f"{split}_rows"] = rows
        found[f"encoded_{split}_bytes"] = None if rows is None else rows * config.encode.views * row
    found["assigned_bytes"] = found["encoded_train_bytes"]  # the same rows again, parted by expert
    return found


# -- the teacher -----------------------------------------------------------------------------------------------------------------


def check_teacher(config: Config, stages: Sequence[str]) -> None:
    """Looks whether the teacher's source is there, and can be pruned to the budget, without fetching its weights.

    Args:
        config: of the run.
        stages: that would run.

    Raises:
        ConfigError: naming the source, and what to do.
    """
    from aptp_ray.storage import file_system
    from aptp_ray.train.prune import check_budget

    source = config.teacher.source
    if source is None or "://" not in source:  # a folder, or a hub id, of which a small file is read
        if {"teacher", "prune"} & set(stages):
            check_budget(config)
        return
    if "teacher" not in stages:
        return
    try:
        fs, path = file_system(source, revealed(config.storage_options))
        found = any(fs.exists(f"{path.rstrip('/')}/{name}") for name in ("model_index.json", "unet/config.json"))
    except Exception as error:  # each store's client has failures of its own: no key, no bucket, no network
        raise ConfigError(f"teacher.source={source!r} cannot be reached ({type(error).__name__}: {error})") from error
    if not found:
        raise ConfigError(
            f"teacher.source={source!r} holds no model_index.json: copy a diffusers pipeline there, or name a hub id"
        )


# -- the job's answer ------------------------------------------------------------------------------------------------------------


def dry_run(config: Config, run: RunDir, stages: Sequence[str], *, overwrite: bool) -> dict[str, Any]:
    """Says what a job would do, and does nothing of it.

    Returns:
        What the job's last line holds.

    Raises:
        ConfigError: if a stage that would run can never be scheduled, or its data or the teacher is not there.
        RunDirError: if the run directory was made with another config, as the job itself would.
    """
    say(config.to_yaml().rstrip())
    states = {stage: _state(config, run, stage, overwrite, stages) for stage in stages}
    todo = [stage for stage, state in states.items() if state != "done"]
    cluster = cluster_at_hand(config)
    resources: dict[str, Any] = {}
    for stage in todo:
        for ask in asks_of(config, stage):
            resources[ask.what] = {"count": ask.count, **ask.bundle, "verdict": cluster.verdict(ask)}
    check_teacher(config, todo)
    storage = storage_of(config, run) if {"encode", "assign"} & set(todo) else {}
    for stage, state in states.items():
        say(f"{stage}: {state}")
    for what, found in resources.items():
        each = _text({name: amount for name, amount in found.items() if name in ("CPU", "GPU")})
        say(f"{what}: {found['count']} times {each}; {found['verdict']}")
    if storage.get("row_bytes"):
        total = sum(storage.get(f"encoded_{split}_bytes") or 0 for split in ("train", "validation"))
        say(f"encoded rows: {storage['row_bytes'] / 1e3:.1f} kB each, {total / 1e9:.2f} GB; training's once more, assigned")
    elif storage:
        say(f"encoded rows: {storage['why']}")
    return {
        "dry_run": True,
        "config": config.masked(),
        "stages": states,
        "would_run": todo,
        "resources": resources,
        "storage": storage,
    }


def _state(config: Config, run: RunDir, stage: str, overwrite: bool, stages: Sequence[str]) -> str:
    if run.is_done(config, stage, overwrite):
        return "done"
    missing = [name for name in run.missing_before(stage) if name not in stages]
    if missing:
        return f"would be refused: {', '.join(missing)} must be made first"
    if overwrite:
        return "would be made again"
    return "would go on where it stopped" if stage in _begun(run) else "would run"


def _begun(run: RunDir) -> dict[str, str]:
    begun = run.manifest().get("begun", {})
    if not isinstance(begun, dict):
        raise RunDirError(f"{run.address('manifest.json')} is no manifest: choose another run_dir")
    return begun
