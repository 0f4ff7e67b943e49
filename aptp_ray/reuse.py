"""Stages that another run has finished with the same settings, taken over instead of made again."""

from __future__ import annotations

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, stage_hash

# What each stage writes. Fine-tuning is left out: whoever has that much in common has the same run.
_MADE: dict[str, tuple[str, ...]] = {"teacher": ("teacher",), "encode": ("encoded",), "prune": ("router", "routing.json")}


def take_over(config: Config, run: RunDir, other: RunDir) -> list[str]:
    """Copies another run's teacher, encoded rows and router, as far as the same config made them.

    Call ``run.prepare(config)`` first. A stage's hash covers all stages before it, so
    nothing after the first that differs counts.

    Returns:
        the stages that were taken over; none that the run has already.

    Raises:
        RunDirError: if the other run has no manifest.
    """
    taken, theirs = [], other.read_json("manifest.json")["stages"]
    for stage, parts in _MADE.items():
        entry = theirs.get(stage)
        if entry is None or entry["config_hash"] != stage_hash(config, stage):
            break
        if stage in run.manifest()["stages"]:
            continue
        for part in parts:
            _copy(other, run, part)
        manifest = run.manifest()
        manifest["stages"][stage] = entry  # last: what the manifest does not name is not there
        run.write_json(manifest, "manifest.json")
        taken.append(stage)
    return taken


def _copy(source: RunDir, target: RunDir, part: str) -> None:
    """Copies a file or folder below one run directory to the same place below another."""
    if source.fs.isfile(source.path(part)):
        target.write_bytes(source.read_bytes(part), part)
        return
    with target.writing(part) as folder:
        source.fs.get(f"{source.path(part)}/", f"{folder}/", recursive=True)
