"""WebDataset shards, as img2dataset writes them: ``<key>.jpg|jpeg|png|webp``, ``<key>.txt`` and maybe ``<key>.json``.

Members of a sample stand next to one another and share a name up to the first dot of its last part. Only these kinds of
content are decoded, each by one fixed decoder; of any other (``.npy``, ``.pt``, ``.pyd``) not a byte is looked at.

``ray.data.read_webdataset`` is not used: it picks decoders by file extension (``.npy`` and ``.pt`` among them), one
sample that it cannot decode fails the whole read, and it has no place for a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aptp_ray.data.access import SEEK_BLOCK, STREAM_BLOCK, SteadyStream, Unreachable, ahead, read_range
from aptp_ray.data.archive import HEAD_BYTES, MAX_MEMBER, Damage, Tape, Walk
from aptp_ray.data.decode import Unusable, decode_caption, decode_image, good_captions, utf8
from aptp_ray.data.layout import Limits, Unit, once, rejected, unreachable, usable
from aptp_ray.data.patterns import find

_IMAGES = ("png", "jpg", "jpeg", "webp")  # where a sample has several, the first of these
_TEXT, _JSON = "txt", "json"
_KINDS = {**dict.fromkeys(_IMAGES, "image"), _TEXT: _TEXT, _JSON: _JSON}


@dataclass(frozen=True)
class WebDatasetLayout:
    """Tar shards; one unit a shard, its POSITIONs the byte offsets of the samples' first headers."""

    pattern: str
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    limits: Limits = Limits()

    def units(self) -> list[Unit]:
        """Lists the shards; one that the pattern names and that is not there is a unit, too, and out of reach."""
        files = find(self.pattern, self.storage_options)
        return [
            Unit(index, name=file.address, version=file.version or "", address=file.address) for index, file in enumerate(files)
        ]

    def promised_rows(self, units: Sequence[Unit]) -> int | None:
        """Sums what img2dataset's ``<shard>_stats.json`` files say; None if a shard has none."""

        def successes(unit: Unit) -> int:
            return int(json.loads(read_range(f"{unit.address.rsplit('.', 1)[0]}_stats.json", self.storage_options))["successes"])

        try:
            return sum(outcome.result() for _, outcome in ahead(units, successes))
        except (Unreachable, OSError, ValueError, KeyError, TypeError):
            return None

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """See :class:`~aptp_ray.data.layout.Layout`."""
        if positions is None:
            return once(unit, self._read_all(unit))
        return self._read_some(unit, positions)

    def _read_all(self, unit: Unit) -> Iterator[dict[str, Any]]:
        place = 0
        try:
            with SteadyStream(unit.address, self.storage_options, STREAM_BLOCK) as stream:
                for item in _samples(Walk(Tape(stream), _is_known)):
                    place = item.offset
                    yield self._row(unit, item)
        except (Unreachable, OSError) as error:
            yield unreachable(unit, place, error)

    def _read_some(self, unit: Unit, positions: Sequence[int]) -> Iterator[dict[str, Any]]:
        place = 0
        try:
            with SteadyStream(unit.address, self.storage_options, SEEK_BLOCK) as stream:
                # Through the stream, these few bytes would cost a request of its whole block.
                tape = Tape(stream, read_range(unit.address, self.storage_options, 0, HEAD_BYTES))
                for place in positions:
                    tape.seek(place)
                    yield self._row(unit, next(_samples(Walk(tape, _is_known), single=True)))
        except (Unreachable, OSError) as error:
            yield unreachable(unit, place, error)

    def _row(self, unit: Unit, item: _Sample | _Loss) -> dict[str, Any]:
        if isinstance(item, _Loss):
            return rejected(unit, item.offset, "", item.reason)
        try:
            if item.broken:
                raise Unusable(item.broken)
            kind = next((kind for kind in _IMAGES if kind in item.members), "image")
            image = decode_image(item.members.get(kind), self.limits, kind)
            caption = decode_caption(item.members.get(_TEXT), self.limits)
            alternates, group, metadata = _metadata(item.members.get(_JSON), self.limits)
        except Unusable as problem:
            return rejected(unit, item.offset, item.key, str(problem))
        return usable(unit, item.offset, item.key, image, caption, alternates=alternates, group=group, metadata=metadata)


@dataclass
class _Sample:
    key: str
    offset: int
    members: dict[str, bytes] = field(default_factory=dict)  # of the known kinds
    extensions: set[str] = field(default_factory=set)  # of all kinds
    broken: str = ""

    def kinds(self) -> set[str]:
        return {_KINDS[extension] for extension in self.members}


@dataclass
class _Loss:
    """Damage of which it is not known what it cost."""

    offset: int
    what: str
    reason: str
    counted: bool = False  # a broken sample stands for it, or it has been reported


def _samples(walk: Walk, *, single: bool = False) -> Iterator[_Sample | _Loss]:
    """Groups members into samples, and finds out which sample a damage broke.

    Damage beside a sample that lacks a kind of member that the others have is taken for the cause: that sample is rejected
    under its own key. Damage that no sample's lack tells of is reported by itself.

    Args:
        walk: the archive.
        single: end as soon as the first sample is complete.
    """
    usual, count = {"image", _TEXT}, 0
    current: _Sample | None = None
    before: list[_Loss] = []  # since the last sample ended, or in this one
    behind: list[_Loss] = []  # since the current sample's last member

    def finish(sample: _Sample) -> Iterator[_Sample | _Loss]:
        nonlocal usual, count
        losses = before + behind
        if losses and not sample.broken and usual - sample.kinds():
            sample.broken = f"shard is damaged after {count} samples: {losses[-1].what}"
        if sample.broken:
            for loss in losses:
                loss.counted = True
        elif not losses:
            usual = sample.kinds() or usual
        for loss in before:
            if not loss.counted:
                loss.counted = True
                yield loss
        count += 1
        yield sample

    for event in walk:
        name = event.name
        key, extension = _split(name) if name else ("", "")
        if isinstance(event, Damage) and extension not in _KINDS:
            samples = count + (current is not None)
            behind.append(_Loss(event.offset, event.what, f"shard is damaged after {samples} samples: {event.what}"))
            continue
        if not key:
            continue
        if current is not None and (key != current.key or extension in current.extensions):
            yield from finish(current)
            if single:
                return
            before, behind, current = behind, [], None
        before, behind = before + behind, []
        current = current or _Sample(key, event.offset)
        current.extensions.add(extension)
        if isinstance(event, Damage):
            current.broken = current.broken or f"shard is damaged after {count} samples: {event.what}"
        elif event.data is not None:
            current.members[extension] = event.data
        elif extension in _KINDS:
            current.broken = f"{name} has {event.size} bytes, the most that is read are {MAX_MEMBER}"
        if single and walk.next_name and _split(walk.next_name)[0] != key:
            break
    if current is not None:
        yield from finish(current)
    yield from (loss for loss in before + behind if not loss.counted)


def _split(name: str) -> tuple[str, str]:
    """A member's key and extension; no key for what belongs to no sample: hidden files, files without an extension."""
    folder, _, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot:
        return "", ""
    folder = folder.removeprefix("./")
    return (f"{folder}/{stem}" if folder not in ("", ".") else stem), extension.lower()


def _is_known(name: str) -> bool:
    return _split(name)[1] in _KINDS


def _metadata(data: bytes | None, limits: Limits) -> tuple[list[str], str, str]:
    if data is None:
        return [], "", ""
    text = utf8(data, "metadata")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Unusable(f"metadata is a JSON {type(value).__name__}, not an object")
    alternates, group = value.get("alternates") or [], value.get("group")
    if not isinstance(alternates, list) or not all(isinstance(item, str) for item in alternates):
        raise Unusable("metadata field 'alternates' is not a list of strings")
    return good_captions(alternates, limits), "" if group is None else str(group), text
