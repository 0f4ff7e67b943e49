"""The on-disk contract: one run directory, on any fsspec file system, in which the stages meet.

Every write is atomic on a local disk (temporary name, then rename), and a directory's manifest entry is written last: what
the manifest does not name is not finished. Only safetensors, JSON, YAML, Parquet and image files are written or read.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from aptp_ray.config import STAGES, Config, ConfigError, load_config, parse_config, stage_hash
from aptp_ray.credentials import revealed
from aptp_ray.storage import RunDirError, fetch, file_system, replacing_folder, resolve_source

# What a stage that has not finished leaves behind, and goes on from (globs below the run directory).
_PROGRESS: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher_parts", "teacher_images", "teacher_encoded", "train/teacher-*"),
    "encode": ("encoded/*/_units",),
    "prune": ("train/prune",),
    "assign": ("assigned/_units",),
    "finetune": ("train/finetune-*", "train/expert-*"),
}

# Scripts below jobs/ that are not called as their stage is.
_JOBS = {"teacher": "train_teacher"}

# Packages that decide what a stage writes.
_VERSIONED = ("aptp-ray", "torch", "diffusers", "transformers", "ray", "pot")


class RunDir:
    """A run directory.

    Attributes:
        uri: its address, without a trailing slash; absolute where it is local.
        fs: the fsspec file system that holds it.
        root: its path on that file system.
        storage_options: of that file system, secrets as they are; never written.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None) -> None:
        """Opens a run directory, which need not be there yet.

        Args:
            uri: any fsspec URI; a relative path is local.
            storage_options: handed to fsspec; a value ``env:NAME`` is read from this process's environment.

        Raises:
            ConfigError: if such a variable is not set.
        """
        self.storage_options = revealed(storage_options)
        self.fs, root = file_system(uri, self.storage_options)
        self.root: str = root.rstrip("/")
        self.is_local = "file" in self._protocols()
        self.uri = self.root if self.is_local else uri.rstrip("/")

    def _protocols(self) -> tuple[str, ...]:
        protocol = self.fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def __str__(self) -> str:
        return self.uri

    def path(self, *parts: str) -> str:
        """Returns a path on ``fs``."""
        return "/".join((self.root, *parts))

    def address(self, *parts: str) -> str:
        """Returns a URI that any process of the cluster can open."""
        return "/".join((self.uri, *parts))

    def exists(self, *parts: str) -> bool:
        return bool(self.fs.exists(self.path(*parts)))

    # -- small files -----------------------------------------------------------------------------------------------------

    def write_bytes(self, data: bytes, *parts: str) -> None:
        """Writes a file whole: a reader sees the old content or the new, never a part."""
        target = self.path(*parts)
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if not self.is_local:  # object stores show an object only once it is whole
            self.fs.pipe_file(target, data)
            return
        temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"  # a process id would not do on a disk that hosts share
        try:
            self.fs.pipe_file(temporary, data)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read_bytes(self, *parts: str) -> bytes:
        """Raises: RunDirError: if the file is not there."""
        try:
            return bytes(self.fs.cat_file(self.path(*parts)))
        except FileNotFoundError as error:
            raise RunDirError(f"{self.address(*parts)} is not there: has the stage that writes it run?") from error

    def write_json(self, value: Any, *parts: str) -> None:
        self.write_bytes((json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), *parts)

    def read_json(self, *parts: str) -> Any:
        """Raises: RunDirError: if the file is not there, or is not JSON."""
        try:
            return json.loads(self.read_bytes(*parts))
        except ValueError as error:
            raise RunDirError(f"{self.address(*parts)} is not JSON ({error}): choose another run_dir") from error

    # -- directories -----------------------------------------------------------------------------------------------------

    def remove(self, *parts: str) -> None:
        """Removes a folder or file below the run directory, if it is there."""
        if not parts:
            raise ValueError("the run directory itself is never removed")
        if self.exists(*parts):
            self.fs.rm(self.path(*parts), recursive=True)

    @contextmanager
    def writing(self, *parts: str) -> Iterator[Path]:
        """Yields an empty local folder that becomes ``parts`` when the block ends without an error."""
        if self.is_local:
            with replacing_folder(Path(self.path(*parts))) as folder:
                yield folder
            return
        with tempfile.TemporaryDirectory(prefix="aptp_") as scratch:
            yield Path(scratch)
            self.remove(*parts)
            self.fs.put(f"{scratch}/", self.path(*parts) + "/", recursive=True)

    def local(self, *parts: str) -> str:
        """Returns a local folder with the content of ``parts``: itself, or a copy fetched once per process and version."""
        if not self.exists(*parts):
            raise RunDirError(f"{self.address(*parts)} is not there: has the stage that writes it run?")
        return self.path(*parts) if self.is_local else fetch(self.address(*parts), self.storage_options)

    # -- stages ----------------------------------------------------------------------------------------------------------

    def prepare(self, config: Config, stage: str | None = None, *, overwrite: bool = False) -> None:
        """Makes the run directory and writes its ``config.yaml``; with ``stage``, records that this stage begins.

        Secrets are not written: ``config.yaml`` holds references to environment variables instead (see ``credentials.py``).
        Call :meth:`is_done` first: it refuses another config's run before anything here is written.

        Args:
            config: of this run.
            stage: the stage that begins now; None: none yet.
            overwrite: forget the stage and all after it, which were made from what it made: manifest entries and checkpoints.

        Raises:
            RunDirError: if the place cannot be written, or as :meth:`check_before`.
        """
        if stage is not None:
            self.check_before(config, stage)
        try:
            self.write_bytes(config.to_yaml().encode(), "config.yaml")
        except OSError as error:
            raise RunDirError(
                f"cannot write the run directory {self.uri} ({error.strerror or error}): "
                "choose another with run_dir=... or --run-dir, or mend its permissions"
            ) from error
        if stage is None:
            return
        manifest = self.manifest()
        if overwrite:
            for name in STAGES[STAGES.index(stage) :]:
                manifest["stages"].pop(name, None)
                manifest.get("begun", {}).pop(name, None)
                for pattern in _PROGRESS.get(name, ()):
                    for found in self.fs.glob(self.path(pattern)):
                        self.fs.rm(found, recursive=True)
        manifest.setdefault("begun", {})[stage] = stage_hash(config, stage)
        self.write_json(manifest, "manifest.json")

    def config(self) -> Config:
        """Returns the config that the run directory was last used with."""
        import yaml

        return parse_config(yaml.safe_load(self.read_bytes("config.yaml")), origin=self.address("config.yaml"))

    def manifest(self) -> dict[str, Any]:
        """Returns ``{"stages": {name: entry}, "begun": {name: hash}}``; empty for a new run directory."""
        return self.read_json("manifest.json") if self.exists("manifest.json") else {"stages": {}}

    def is_done(self, config: Config, stage: str, overwrite: bool = False) -> bool:
        """Tells whether a stage has finished with this config.

        Raises:
            RunDirError: if it, or a stage before it, was made with another config and ``overwrite`` is not set; or if it
                was begun with another config.
        """
        if overwrite:
            return False
        manifest = self.manifest()
        for name in (*_before(stage), stage):
            self._refuse_other(config, name, manifest["stages"].get(name, {}).get("config_hash"), "made")
        # Its checkpoints are another config's; going on from them would mix the two.
        self._refuse_other(config, stage, manifest.get("begun", {}).get(stage), "begun")
        return stage in manifest["stages"]

    def missing_before(self, stage: str) -> list[str]:
        """Returns the stages before ``stage`` that have not finished, in their order."""
        made = self.manifest()["stages"]
        return [name for name in _before(stage) if name not in made]

    def check_before(self, config: Config, stage: str) -> None:
        """Refuses a stage that has nothing to begin with.

        Raises:
            RunDirError: if a stage before it has not finished, or was made with another config.
        """
        missing, made = self.missing_before(stage), self.manifest()["stages"]
        if missing:
            raise RunDirError(
                f"stage {stage!r} needs what stage {missing[0]!r} makes, and that has not finished in {self.uri}: run `python "
                f"jobs/{_JOBS.get(missing[0], missing[0])}.py CONFIG` first, or jobs/pipeline.py, which runs all that is missing"
            )
        for name in _before(stage):
            self._refuse_other(config, name, made[name].get("config_hash"), "made")

    def _refuse_other(self, config: Config, stage: str, found: str | None, how: str) -> None:
        if found is not None and found != stage_hash(config, stage):
            raise RunDirError(
                f"stage {stage!r} in {self.uri} was {how} with another config (hash {found}, now "
                f"{stage_hash(config, stage)}): choose another run_dir, or pass --overwrite to make it again"
            )

    def finish(self, config: Config, stage: str, **facts: Any) -> dict[str, Any]:
        """Records that a stage has finished, with its counts and figures, and returns the entry."""
        manifest = self.manifest()
        entry = {
            "config_hash": stage_hash(config, stage),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            **facts,
        }
        manifest["stages"][stage] = entry
        manifest.get("begun", {}).pop(stage, None)
        self.write_json(manifest, "manifest.json")
        return entry


def _before(stage: str) -> tuple[str, ...]:
    return STAGES[: STAGES.index(stage)]


def open_run(config: Config) -> RunDir:
    """Returns the run directory of a config."""
    return RunDir(config.run_dir, config.storage_options)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide what a stage writes."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def load_run(uri: str, storage_options: dict[str, Any] | None = None) -> tuple[RunDir, Config]:
    """Opens an existing run directory with the config it was made with.

    The config that was written holds no secrets, so its ``storage_options`` are replaced by those that open the directory
    here. ``data.source.storage_options`` come back with references in the secrets' places; serving does not read them, and
    a stage that does fails if their environment variables are not set.

    Raises:
        RunDirError: if there is none.
        ConfigError: if ``storage_options`` name an environment variable that is not set.
    """
    run = RunDir(uri, storage_options)
    if not run.exists("config.yaml"):
        raise RunDirError(f"{run.uri} holds no config.yaml: not a run directory; run jobs/pipeline.py with run_dir={uri}")
    return run, run.config().model_copy(update={"storage_options": dict(storage_options or {})})


__all__ = [
    "ConfigError",
    "RunDir",
    "RunDirError",
    "fetch",
    "load_config",
    "load_run",
    "open_run",
    "resolve_source",
    "versions",
]
