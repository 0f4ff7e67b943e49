"""Light rows by number, encoded as they are read: the same columns as offline, and no tensor is ever stored.

A stream is a Ray Dataset: row ranges -> light rows, images of the source, squares (tasks) -> encode (a pool of actors, on nodes
of their own where ``encode.resources`` says so) -> one consumer. ``streaming_split`` runs its executor in an actor of its own:
in a thread of the training process it would fight with the training step for the interpreter.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, TaskPoolStrategy

from aptp_ray.artifacts import RunDir
from aptp_ray.config import ConfigError, UserError
from aptp_ray.data import schema
from aptp_ray.data.encoder import Encoder, EncoderSpec
from aptp_ray.data.layout import Layout
from aptp_ray.data.reader import Columns, EncodedReader, Ranges, to_numpy
from aptp_ray.data.rows import ROWS, Framing, cropped_table, framed, pack_rows, unpack_rows
from aptp_ray.data.sources import ordered
from aptp_ray.growth import kinds_to_come

_NUMBER, _RANGES, _PROBLEM = "number", "ranges", "problem"
LIGHT = (schema.KEY, schema.SHARD, schema.POSITION, schema.VIEW, schema.CAPTION)  # what names a row of the source
_REQUESTS = 4096  # of one Dataset: its blocks are made before it starts
_FETCHES = 2  # tasks that read for one encoding actor


class SourceError(UserError, RuntimeError):
    """A source that does not give the rows any more that light rows were made from."""


class OnlineReader:
    """Light rows of a run directory, with the tensors that the encoders make of their source; picklable.

    Attributes:
        num_rows: of all light rows.
        groups: lengths of their row groups, in row order.
        columns: which are made.
    """

    def __init__(
        self,
        rows: EncodedReader,
        *,
        columns: Sequence[str],
        layout: Layout,
        units: dict[str, ray.ObjectRef],
        spec: EncoderSpec,
        framing: Framing,
        batch_size: int,
        actors: int,
        on_gpu: bool,
        resources: dict[str, float],
    ) -> None:
        """See :meth:`open`."""
        self.num_rows, self.groups, self.columns = rows.num_rows, rows.groups, tuple(columns)
        self._rows, self._layout, self._units, self._spec, self._framing = rows, layout, units, spec, framing
        self._batch_size, self._actors, self._on_gpu, self._resources = batch_size, actors, on_gpu, resources

    @classmethod
    def open(
        cls,
        run: RunDir,
        *parts: str,
        columns: Sequence[str],
        layout: Layout,
        spec: EncoderSpec,
        framing: Framing,
        batch_size: int = 64,
        actors: int | None = None,
        resources: dict[str, float] | None = None,
        held_gpus: float = 0.0,
    ) -> OnlineReader:
        """Opens the light rows and lists their source's units; the calling process has to live as long as the reader.

        Args:
            run: the run directory.
            parts: e.g. ``"encoded", "train"`` or ``"assigned", "expert=0"``.
            columns: which columns to make.
            layout: of the images, the one that the light rows were made from.
            spec: of the encoders.
            framing: of the images.
            batch_size: rows that an actor encodes at once.
            actors: encoding actors of all streams together; None: one a GPU that is not held, or one for every two CPUs.
            resources: custom resources of an actor.
            held_gpus: GPUs that the Train workers hold.

        Raises:
            RunDirError: as :meth:`EncodedReader.open`.
            ConfigError: if no GPU is left, or the layout's source is gone.
        """
        cluster = ray.cluster_resources()
        free, grows = int(cluster.get("GPU", 0) - held_gpus), kinds_to_come() != []
        if cluster.get("GPU", 0) and free < 1 and not grows:
            raise ConfigError(
                f"encode.mode=online needs GPUs for the encoders besides the {held_gpus:g} of {cluster['GPU']:g} that train: add "
                "nodes, lower compute.workers, or encode offline"
            )
        coming = grows and held_gpus > 0 and free < 1
        rows = EncodedReader.open(run, *parts, columns=LIGHT)
        # One by one in the object store: a unit may carry its part of a large table, and a task needs a few of them.
        units = {unit.name: ray.put(unit) for unit in layout.units()}
        return cls(
            rows,
            columns=columns,
            layout=layout,
            units=units,
            spec=spec,
            framing=framing,
            batch_size=batch_size,
            # Of GPUs that are still to come, one: how many is for encode.actors to say.
            actors=actors or max(free, 0) or (1 if coming else max(1, int(cluster.get("CPU", 1) // 2))),
            on_gpu=free > 0 or coming,
            resources=dict(resources or {}),
        )

    def __repr__(self) -> str:
        return f"OnlineReader({self._rows!r})"

    def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[Columns, None, None]:
        """Yields the joined rows of each request in turn, as :meth:`EncodedReader.stream` does.

        Args:
            requests: row ranges; they are taken a few thousand at a time.
            share: how many processes stream at the same time; each has its share of the actors, and at least one.

        Raises:
            SourceError: if the source cannot be reached, or has changed since the light rows were made.
        """
        actors = max(1, self._actors // share)
        pending = iter(requests)
        while part := list(itertools.islice(pending, _REQUESTS)):
            pace = _Pace.remote(2 * actors + 2)  # type: ignore[attr-defined]  # ray.remote's
            split = self._dataset(part, pace, actors, share).streaming_split(1)[0]
            try:
                batches = split.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1)
                for number, batch in enumerate(batches):
                    pace.advance.remote(number + 1)
                    yield self._columns(batch, number)
            finally:
                ray.kill(pace)

    def _columns(self, batch: pa.Table, number: int) -> Columns:
        problem = batch.column(_PROBLEM)[0].as_py()
        if problem:
            raise SourceError(problem)
        if batch.column(_NUMBER)[0].as_py() != number:
            raise RuntimeError(f"request {batch.column(_NUMBER)[0]} came in the place of {number}")
        rows = unpack_rows(batch)
        bad = [item for item in rows.select([schema.KEY, schema.SHARD, schema.REASON]).to_pylist() if item[schema.REASON]]
        if bad:
            raise SourceError(f"{_place(bad[0])} can no longer be encoded: {bad[0][schema.REASON]}")
        made = to_numpy(rows.select(list(self.columns)), "online rows")
        # What is held for as long as a window lasts must not fill the object store.
        return {name: column.copy() for name, column in made.items()}

    def _dataset(self, requests: list[Ranges], pace: Any, actors: int, share: int) -> Dataset:
        items = [{_NUMBER: number, _RANGES: json.dumps(list(ranges))} for number, ranges in enumerate(requests)]
        source = ordered(ray.data.from_items(items, override_num_blocks=len(items)))
        fetched = source.map_batches(
            _fetch,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=min(len(items), _FETCHES * actors)),
            fn_kwargs={
                "rows": self._rows, "layout": self._layout, "units": self._units, "framing": self._framing, "pace": pace,
            },
        )  # fmt: skip
        return fetched.map_batches(
            _OnlineEncoder,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(self._spec, self._batch_size),
            **self._placement(actors, share),
        )

    def _placement(self, actors: int, share: int) -> dict[str, Any]:
        """Resources of one encoding actor."""
        placed: dict[str, Any] = {"resources": self._resources} if self._resources else {}
        if self._on_gpu:  # fewer GPUs than streams: they share one
            return placed | {"num_gpus": min(1.0, int(100 * self._actors / share) / 100), "num_cpus": 0}
        # Actors hold their CPUs until the end: with none left, the fetching tasks would wait for ever.
        spare = ray.available_resources().get("CPU", 0)
        return placed | {"num_cpus": 1 if 2 * actors * share <= spare else 0}


class _OnlineEncoder:
    """Encodes the rows of fetched requests; the callable class of the actor pool."""

    def __init__(self, spec: EncoderSpec, batch_size: int) -> None:
        self._encoder, self._batch_size = Encoder(spec), batch_size

    def __call__(self, requests: pa.Table) -> pa.Table:
        packed = []
        for index, problem in enumerate(requests.column(_PROBLEM).to_pylist()):
            if problem:
                packed.append(b"")
                continue
            rows = unpack_rows(requests, index)
            starts = range(0, rows.num_rows, self._batch_size)
            packed.append(pack_rows(pa.concat_tables([self._encoder(rows.slice(at, self._batch_size)) for at in starts])))
        return requests.drop_columns([ROWS]).append_column(ROWS, pa.array(packed, pa.binary()))


@ray.remote(num_cpus=0)
class _Pace:
    """Holds the fetching of requests back until the consumer is near them.

    Ray Data bounds queues by bytes, a part of the object store: with small rows, thousands of them would be encoded for
    nobody. Requests are fetched in order, so the one that the consumer waits for is never held back.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead, self._taken, self._moved = ahead, 0, asyncio.Condition()

    async def advance(self, taken: int) -> None:
        async with self._moved:
            self._taken = max(self._taken, taken)
            self._moved.notify_all()

    async def turn(self, number: int) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: number < self._taken + self._ahead)


def _fetch(
    requests: pa.Table, *, rows: EncodedReader, layout: Layout, units: dict[str, ray.ObjectRef], framing: Framing, pace: Any
) -> Iterator[pa.Table]:
    """Requests -> the cropped rows that :class:`Encoder` takes, or a problem."""
    for request in requests.to_pylist():
        ray.get(pace.turn.remote(request[_NUMBER]))
        packed: Any = b""
        problem = ""
        try:
            packed = pack_rows(cropped_table(list(source_rows(json.loads(request[_RANGES]), rows, layout, units, framing))))
        except SourceError as error:  # for the consumer to raise: Ray would bury it in a trace
            problem = str(error)
        yield pa.table(
            {_NUMBER: [request[_NUMBER]], _PROBLEM: [problem], ROWS: pa.array([packed], pa.binary())},
        )


def source_rows(
    ranges: Ranges, rows: EncodedReader, layout: Layout, units: dict[str, ray.ObjectRef], framing: Framing
) -> Iterator[dict[str, Any]]:
    """Yields the framed source rows of light rows, in their order.

    Raises:
        SourceError: if one is gone, is another, or can no longer be used.
    """
    columns = next(rows.stream([ranges]))
    light = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for shard, run in itertools.groupby(light, key=lambda row: row[schema.SHARD]):
        wanted = list(run)
        # Views of a row, and rows that come twice, share one read.
        positions = list(dict.fromkeys(int(row[schema.POSITION]) for row in wanted))
        if shard not in units:
            raise SourceError(f"{_place(wanted[0])} is gone with its shard: put it back, or run jobs/encode.py --overwrite")
        found = {}
        for raw in layout.read(ray.get(units[shard]), positions):
            if raw[schema.REASON].startswith(schema.UNREACHABLE):
                raise SourceError(f"{shard}: {raw[schema.REASON]}")
            found[int(raw[schema.POSITION])] = raw
        for row in wanted:
            source = _checked(row, found.get(int(row[schema.POSITION])))
            yield from framed(source, framing, [int(row[schema.VIEW])])


def _checked(row: dict[str, Any], raw: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the raw row that a light row was made from.

    Raises:
        SourceError: if it is not that row.
    """
    if raw is None:
        problem = "is gone"
    elif raw[schema.REASON]:
        problem = f"can no longer be used: {raw[schema.REASON]}"
    elif raw[schema.KEY] != row[schema.KEY]:
        problem = f"is another now: {raw[schema.KEY]!r}"
    elif raw[schema.CAPTION] != row[schema.CAPTION]:
        problem = "has another caption now"
    else:
        return raw
    raise SourceError(f"{_place(row)} {problem}. The source has changed since: run jobs/encode.py --overwrite")


def _place(row: dict[str, Any]) -> str:
    return f"key {row[schema.KEY]!r} of shard {row[schema.SHARD]}"
