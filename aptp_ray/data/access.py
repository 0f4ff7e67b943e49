"""Bytes from any file system: what fails for a moment is tried again, and what stays out of reach says so.

Storage libraries raise errors of their own (botocore's, aiohttp's) besides OSError, and all that a store raises here is
about reaching it: the content is looked at elsewhere. So every exception of a store counts.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from aptp_ray.storage import file_system

RETRIES = 3
BACKOFF_SECONDS = 1.0  # before the first repetition; doubled for each one more
STREAM_BLOCK = 8 * 2**20  # bytes of a request while a shard is read through; s3fs's default of 50 MB is a lot for 16 tasks
SEEK_BLOCK = 2**20  # bytes of a request for single samples
FETCHES = 16  # requests for small files under way at once: one alone would wait out every round trip

# By which file systems tell one version of a file from another: S3, GCS, Azure, local, memory.
_VERSION_KEYS = ("size", "ETag", "etag", "LastModified", "last_modified", "updated", "mtime", "modified", "created")

# Facts about one file, not about the way to it: a repetition would say the same.
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_FACTS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)

T = TypeVar("T")
Item = TypeVar("Item")


class Unreachable(Exception):
    """A store that fails again and again; the cause is the last failure."""


def patiently(attempt: Callable[[], T]) -> T:
    """Calls until it works.

    Raises:
        OSError: at once, where it states a fact about the file: it is absent, a folder, or forbidden.
        Unreachable: after ``RETRIES`` repetitions.
    """
    for repetition in range(RETRIES + 1):
        try:
            return attempt()
        except Exception as error:  # see the top of this file
            if isinstance(error, (*ABSENT, PermissionError)) or getattr(error, "errno", None) in _FACTS:
                raise
            if repetition == RETRIES:
                raise Unreachable(f"{type(error).__name__}: {error}") from error
            time.sleep(BACKOFF_SECONDS * 2**repetition)
    raise AssertionError("unreachable code")


def is_local(fs: Any) -> bool:
    """Whether paths of a file system are those of the operating system."""
    return isinstance(fs, LocalFileSystem)


def address_of(fs: Any, path: str) -> str:
    """Returns what :func:`fsspec.open` takes."""
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def version_of(info: dict[str, Any]) -> str:
    """Returns a text that changes when a file does, from what its file system knows of it."""
    facts = [str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None]
    return "-".join(facts[:2])  # the size, and the best of the others


class SteadyStream:
    """A file opened for reading that goes on where it was after an error of its store."""

    def __init__(self, address: str, storage_options: dict[str, Any], block_size: int = STREAM_BLOCK) -> None:
        self._fs, self._path = file_system(address, storage_options)
        self._block_size = block_size
        self._offset = 0
        self._stream: Any = None
        patiently(self._reopen)

    def _reopen(self) -> None:
        if self._stream is None:
            stream = self._fs.open(self._path, "rb", block_size=self._block_size)
            if self._offset:
                stream.seek(self._offset)
            self._stream = stream

    def _read(self, size: int) -> bytes:
        try:
            self._reopen()
            return bytes(self._stream.read(size))
        except BaseException:
            self._drop()
            raise

    def read(self, size: int = -1) -> bytes:
        """Reads like a file."""
        data = patiently(lambda: self._read(size))
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a byte, counted from the start."""
        if whence != 0:
            raise ValueError(f"whence={whence}: only offsets from the start are known")
        if offset != self._offset:
            self._offset = offset
            try:
                if self._stream is not None:
                    self._stream.seek(offset)
            except Exception:  # the next read opens the file anew, and tells
                self._drop()
        return offset

    def tell(self) -> int:
        """The byte that is read next."""
        return self._offset

    def seekable(self) -> bool:
        """Asked by decompressors."""
        return True

    def readable(self) -> bool:
        """Asked by decompressors."""
        return True

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except Exception:  # of a connection that has failed already
                return

    def close(self) -> None:
        """Lets go of the file."""
        self._drop()

    def __enter__(self) -> SteadyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_range(address: str, storage_options: dict[str, Any], start: int | None = None, stop: int | None = None) -> bytes:
    """Reads a file, or bytes ``start`` to ``stop`` of it; see :func:`patiently`."""
    fs, path = file_system(address, storage_options)
    return patiently(lambda: bytes(fs.cat_file(path, start=start, end=stop)))


def going_on(start_at: Callable[[int], Iterator[T]]) -> Iterator[T]:
    """Iterates ``start_at(0)``; after an error of the store, ``start_at`` of as many items as came before it.

    Raises:
        Unreachable: after ``RETRIES`` repetitions without another item.
    """
    count, failures = 0, 0
    while True:
        try:
            for item in start_at(count):
                yield item
                count, failures = count + 1, 0
            return
        except Exception as error:  # see the top of this file
            if isinstance(error, ABSENT) or failures == RETRIES:
                raise Unreachable(f"{type(error).__name__}: {error}") from error
            time.sleep(BACKOFF_SECONDS * 2**failures)
            failures += 1


def ahead(items: Iterable[Item], fetch: Callable[[Item], T], threads: int = FETCHES) -> Iterator[tuple[Item, Future[T]]]:
    """Yields items in order, each with the outcome of ``fetch``; up to ``threads`` more are under way."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Item, Future[T]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(fetch, item)))
                if len(waiting) > threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()
