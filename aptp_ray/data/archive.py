"""A tar archive as a stream of members, which survives damage: what stands before and after it is found.

``tarfile`` stops at a header it cannot read, or goes on in steps of 512 bytes; after a loss of any other length it finds
nothing more, and it takes an archive that was cut between two members for a whole one. So headers are parsed by it
(``TarInfo.frombuf`` checks their checksums), and the walk from one to the next is done here.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aptp_ray.data.access import Unreachable
from aptp_ray.data.layout import one_line

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257  # POSIX 1003.1, ustar header block
_CHUNK = 2**20
_SEARCH_CHUNK = 2**16
MAX_MEMBER = 2**28  # bytes that are held at once: no image that anyone wants is larger as a file
_MAX_EXTENSION = 2**20  # bytes of a pax or GNU extension header
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
HEAD_BYTES = max(map(len, _COMPRESSIONS))
_COMPRESSION_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass
class Member:
    """A file of an archive.

    Attributes:
        name: as the archive spells it.
        offset: byte of its first header, extension headers included.
        size: bytes that its header says it has.
        data: its content; None where it was not asked for, or is larger than ``MAX_MEMBER``.
    """

    name: str
    offset: int
    size: int
    data: bytes | None


@dataclass
class Damage:
    """A place where an archive cannot be read.

    Attributes:
        offset: byte where it starts, or shows.
        what: what is wrong.
        name: the member whose content it broke; "" where it is none, or not known.
    """

    offset: int
    what: str
    name: str = ""


class Tape:
    """The decompressed bytes of an archive, in order, with the possibility to put some back."""

    def __init__(self, stream: Any, head: bytes | None = None) -> None:
        """Args: stream: a file, compressed by gzip, bzip2 or xz, or not. head: its first bytes, where they are known."""
        if head is None:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
        opener = next((opener for magic, opener in _COMPRESSIONS.items() if head.startswith(magic)), None)
        self._stream: Any = opener(stream, "rb") if opener else stream
        self._compressed = opener is not None
        self._back = b""
        self.offset = 0
        self.error = ""  # what ended a compressed archive early

    def seek(self, offset: int) -> None:
        """Goes to a byte; in a compressed archive by reading what lies before it."""
        self._back, self.offset = b"", offset
        if not self._compressed:
            self._stream.seek(offset)
            return
        try:
            self._stream.seek(offset)
        except Unreachable:
            raise
        except _COMPRESSION_ERRORS as error:
            self.error = one_line(error)

    def take(self, size: int) -> bytes:
        """Returns ``size`` bytes, fewer only at the end."""
        parts, missing = [self._back[:size]], size - len(self._back[:size])
        self._back = self._back[size:]
        while missing > 0:
            data = self._read(min(missing, 8 * _CHUNK))
            if not data:
                break
            parts.append(data)
            missing -= len(data)
        self.offset += size - missing
        return b"".join(parts)

    def skip(self, size: int) -> int:
        """Passes over ``size`` bytes and returns how many there were."""
        passed = 0
        while passed < size:
            data = self.take(min(size - passed, _CHUNK))
            if not data:
                break
            passed += len(data)
        return passed

    def put_back(self, data: bytes) -> None:
        """Makes ``data`` what is taken next."""
        self._back = data + self._back
        self.offset -= len(data)

    def _read(self, size: int) -> bytes:
        if not self._compressed:
            return bytes(self._stream.read(size))
        if self.error:
            return b""
        try:
            return bytes(self._stream.read(size))
        except Unreachable:
            raise
        except _COMPRESSION_ERRORS as error:  # bytes that were decompressed before it are lost with it; few
            self.error = one_line(error)
            return b""


@dataclass
class _Header:
    name: str
    offset: int
    size: int
    is_file: bool


class _Invalid(Exception):
    """No header stands where one should."""


class Walk:
    """Walks from header to header; iterating gives members and damages in the order of the archive."""

    def __init__(self, tape: Tape, wanted: Any = lambda name: True) -> None:
        """Args: tape: where the next header is expected. wanted: of which names the content is read."""
        self._tape, self._wanted = tape, wanted
        # A member is handed on only when the header after it is found: otherwise its own size may be what is broken.
        self._held: Member | None = None
        self._padding = b""  # that was read after the held member's content
        self._tail = b""  # of both: a header may start in it
        self._taken = b""  # since the place where the next header is expected
        self._lost = False  # no header is found any more
        self.next_name = ""  # of the header that was just found

    def __iter__(self) -> Iterator[Member | Damage]:
        tape, ended = self._tape, False
        while not self._lost:
            at = tape.offset
            block = tape.take(_BLOCK)
            if len(block) < _BLOCK:
                yield from self._release()
                if block or not ended or tape.error:
                    yield Damage(at, self._missing_end(at, block))
                return
            if not any(block):
                yield from self._release()
                ended = True  # unless another archive follows: `cat a.tar b.tar` is a usual way to join shards
                continue
            try:
                header = self._header(block, at)
            except _Invalid:
                yield from self._search(at)
                ended = False
                continue
            ended = False
            self.next_name = header.name
            yield from self._release()
            damage = self._content(header)
            if damage:
                yield damage

    def _release(self) -> Iterator[Member]:
        held, self._held, self._padding, self._tail = self._held, None, b"", b""
        if held is not None:
            yield held

    def _missing_end(self, at: int, block: bytes) -> str:
        if self._tape.error:
            return f"it cannot be decompressed: {self._tape.error}"
        if at == 0 and not block:
            return "the file is empty"
        return "it ends in the middle of a header" if block else "the archive's end is missing"

    def _content(self, header: _Header) -> Damage | None:
        """Reads what a header promises, and holds it."""
        tape, padded = self._tape, -(-header.size // _BLOCK) * _BLOCK
        if not (header.is_file and header.size <= MAX_MEMBER and self._wanted(header.name)):
            if tape.skip(padded) < header.size:
                return self._end_inside(header)
            if header.is_file:
                self._held = Member(header.name, header.offset, header.size, None)
            return None
        content = tape.take(padded)
        inside = _find_header(content)
        if inside is not None:
            # Bytes of this member are lost, and what it took for its own are members that follow. Without this look, a loss
            # of whole blocks could hide samples.
            tape.put_back(content[inside:])
            return Damage(header.offset, f"bytes of {header.name} are lost", header.name)
        if len(content) < header.size:
            return self._end_inside(header)
        self._held = Member(header.name, header.offset, header.size, content[: header.size])
        self._padding, self._tail = content[header.size :], content[-(_BLOCK - 1) :]
        return None

    def _end_inside(self, header: _Header) -> Damage:
        self._lost = True
        because = f" ({self._tape.error})" if self._tape.error else ""
        return Damage(header.offset, f"it ends in the middle of {header.name}{because}", header.name)

    def _header(self, block: bytes, at: int) -> _Header:
        """Parses a header, and the extension headers before it."""
        name: str | None = None
        size: int | None = None
        self._taken = block
        while True:
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise _Invalid from error
            if info.size < 0:
                raise _Invalid
            if info.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
                break
            if info.size > _MAX_EXTENSION:
                raise _Invalid
            padded = self._tape.take(-(-info.size // _BLOCK) * _BLOCK)
            data = padded[: info.size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(data)
                name = records.get("path", name)
                digits = records.get("size", "")
                size = int(digits) if digits.isdecimal() and len(digits) < 20 else size
            block = self._tape.take(_BLOCK)
            self._taken += padded + block
        if size is None:
            size = info.size
        if info.type in _WITHOUT_DATA:
            size = 0
        return _Header(name or info.name, at, size, info.type in _FILES)

    def _search(self, at: int) -> Iterator[Member | Damage]:
        """Looks for the next header after an invalid one: bytes may be lost or added, so it may stand at any byte."""
        tape = self._tape
        if len(self._taken) > _BLOCK:  # an extension header stands where it should; what follows it does not
            yield from self._release()
            at, self._taken = at + _BLOCK, self._taken[_BLOCK:]
        window, start = self._tail + self._taken, at - len(self._tail)
        while (found := _find_header(window)) is None:
            more = tape.take(_SEARCH_CHUNK)
            if not more:
                self._lost = True
                yield from self._release()
                yield Damage(at, "there is no tar header" if at == 0 else "no header is found any more")
                return
            start += max(0, len(window) - _BLOCK)
            window = window[-_BLOCK:] + more
        tape.put_back(window[found:])
        place, held = start + found, self._held
        # Padding is zeros. Where it is not, the held member's content was shifted; where there is none, a header off the grid
        # of blocks is all that tells.
        shifted = place < at or any(self._padding) or (not self._padding and (place - at) % _BLOCK)
        if held is not None and shifted:
            self._held, self._padding, self._tail = None, b"", b""
            yield Damage(held.offset, f"bytes of {held.name} are lost, or foreign ones are in it", held.name)
        else:
            yield from self._release()
            yield Damage(at, f"{place - at} bytes are no headers")


def _find_header(window: bytes) -> int | None:
    """Returns where in the bytes the first valid header starts."""
    magic = window.find(_MAGIC, _MAGIC_AT)
    while magic >= 0:
        start = magic - _MAGIC_AT
        block = window[start : start + _BLOCK]
        if len(block) < _BLOCK:
            return None
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            return start
        except (tarfile.HeaderError, ValueError):
            magic = window.find(_MAGIC, magic + 1)
    return None


def _pax_records(data: bytes) -> dict[str, str]:
    """POSIX 1003.1, pax: records "length key=value\\n", the length counting itself."""
    records = {}
    while data:
        digits, _, _ = data.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        if length <= len(digits) + 1 or length > len(data):
            raise _Invalid
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records
