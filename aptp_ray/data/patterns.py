"""Shard patterns: brace ranges, brace lists and globs, on any file system."""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from aptp_ray.config import ConfigError
from aptp_ray.data.access import Unreachable, address_of, patiently, version_of
from aptp_ray.data.layout import one_line
from aptp_ray.storage import file_system

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A file that a pattern names; ``version`` is None where it is not there."""

    address: str
    version: str | None


def expand(pattern: str, storage_options: dict[str, Any] | None = None) -> list[str]:
    """Lists the files of a pattern, each as an address that any process can open.

    Args:
        pattern: a path or fsspec URI with brace ranges (``{00000..00331}``), brace lists (``{a,b}``) and globs.
        storage_options: handed to fsspec.

    Returns:
        Addresses in the order of the braces, glob matches sorted, without repeats. A file that the braces name stands among
        them even if it is not there; a warning says so.

    Raises:
        ConfigError: if nothing at all is there.
    """
    return [file.address for file in find(pattern, storage_options)]


def find(pattern: str, storage_options: dict[str, Any] | None = None, *, what: str = "shard") -> list[Found]:
    """As :func:`expand`, with the versions of the files; ``what`` names them in errors."""
    if not pattern:
        raise ConfigError(f"the {what} pattern is empty: set data.source.train and data.source.validation")
    named = _expand_braces(pattern)
    try:
        with ThreadPoolExecutor(16) as pool:  # one request a file on an object store
            found = list(pool.map(lambda part: _matches(part, storage_options or {}), named))
    except Unreachable as error:
        raise ConfigError(f"cannot look for {pattern!r}: {error}; check the address and storage_options") from error
    files = list({file.address: file for part in found for file in part}.values())
    there = [file for file in files if file.version is not None]
    if not there:
        tried = f"none of the {len(named)} names that it stands for is there" if len(named) > 1 else "nothing is there"
        raise ConfigError(
            f"no {what} matches {pattern!r} ({tried}): check data.source.train and .validation, and storage_options"
        )
    if len(there) < len(files):
        missing = [file.address for file in files if file.version is None]
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        _LOG.warning("%d of the %d %ss that %r names are missing: %s", len(missing), len(files), what, pattern, shown)
    return files


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    bounds = _RANGE.fullmatch(body)
    if bounds:
        first, last = bounds.groups()
        # As in a shell, a leading zero on either side pads all of the range.
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for choice in choices for text in _expand_braces(head + choice + tail)]


def _matches(part: str, storage_options: dict[str, Any]) -> list[Found]:
    try:
        fs, path = file_system(part, storage_options)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise ConfigError(f"cannot open {part!r}: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot open {part!r} ({one_line(error)}): check data.source.storage_options") from error
    if any(sign in path for sign in "*?["):
        infos = patiently(lambda: fs.glob(path, detail=True))
        return [
            Found(address_of(fs, str(name)), version_of(infos[name]))
            for name in sorted(infos)
            if infos[name].get("type") != "directory"
        ]
    try:
        info = patiently(lambda: fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return [Found(address_of(fs, path), None)]
    if info.get("type") == "directory":
        raise ConfigError(f"{part!r} is a folder: name the files in it, e.g. {part.rstrip('/')}/*.tar")
    return [Found(address_of(fs, path), version_of(info))]
