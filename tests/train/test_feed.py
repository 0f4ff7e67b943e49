"""The feed over a reader of numbered rows: nothing lost, the same for any number of workers and from any start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from itertools import islice

import numpy as np
import pytest

from aptp_ray.config import ConfigError
from aptp_ray.train.feed import Feed, Ranges, Rows, first_rows

# Rows, lengths of the groups they are stored in, lanes, window: groups longer and shorter than a window, lanes that end
# within a group, rows that no lane count divides, fewer rows than lanes.
SHAPES = {
    "even": (64, [8] * 8, 8, 64),
    "uneven": (137, [20] * 6 + [17], 8, 40),
    "long groups": (137, [100, 37], 4, 16),
    "short groups": (101, [3] * 33 + [2], 8, 64),
    "one lane": (37, [10, 10, 10, 7], 1, 12),
    "window of one": (37, [10, 10, 10, 7], 4, 1),
    "fewer rows than lanes": (3, [3], 8, 64),
}


class Reader:
    """Gives each row its own number, and counts what is read."""

    def __init__(self, num_rows: int, groups: Sequence[int]) -> None:
        self.num_rows, self.groups = num_rows, groups
        self.requests: list[Ranges] = []
        self.shares: set[int] = set()
        self.open = 0

    def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[Rows, None, None]:
        self.shares.add(share)
        self.open += 1
        try:
            for ranges in requests:
                self.requests.append(ranges)
                yield {"id": np.concatenate([np.arange(begin, end) for begin, end in ranges])}
        finally:
            self.open -= 1


def feed(shape: str, *, rank: int = 0, world_size: int = 1, **changes: object) -> tuple[Feed, Reader]:
    rows, groups, lanes, window = SHAPES[shape]
    reader = Reader(rows, groups)
    options = {"global_batch_size": 16, "seed": 1, "window": window, "lanes": lanes, "decode": lambda batch: batch} | changes
    return Feed(reader, rank=rank, world_size=world_size, **options), reader  # type: ignore[arg-type]


def ids(source: Feed, steps: int, start: int = 0) -> list[list[int]]:
    return [batch["id"].tolist() for batch in islice(source.batches(start), steps)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_epoch_has_every_row_once_and_the_padding_is_counted(shape: str) -> None:
    source, _ = feed(shape)
    rows, _, lanes, _ = SHAPES[shape]
    assert source.epoch_rows == rows + source.padding and 0 <= source.padding < lanes
    flat = np.concatenate(ids(source, 3 * source.epoch_rows))  # 16 rows each: whole epochs, whatever the size
    # Row by row, what each lane gave: 16 / lanes rows of each batch.
    by_lane = flat.reshape(-1, lanes, 16 // lanes).transpose(1, 0, 2).reshape(lanes, -1)
    length = source.epoch_rows // lanes
    for epoch in range(3):
        counts = Counter(by_lane[:, epoch * length : (epoch + 1) * length].ravel().tolist())
        assert sorted(counts) == list(range(rows))
        assert sum(counts.values()) - rows == source.padding
        if rows >= lanes:
            assert sum(count == 2 for count in counts.values()) == source.padding


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_the_global_batches_of_one_worker(shape: str, world_size: int) -> None:
    if SHAPES[shape][2] % world_size:
        shape = "even"
    alone = ids(feed(shape)[0], 40)
    parts = [ids(feed(shape, rank=rank, world_size=world_size)[0], 40) for rank in range(world_size)]
    assert {len(batch) for part in parts for batch in part} == {16 // world_size}
    assert [sum((part[step] for part in parts), []) for step in range(40)] == alone


@pytest.mark.parametrize("world_size", [3, 5, 7])
def test_workers_that_do_not_divide_the_lanes_share_them_unevenly(world_size: int) -> None:
    alone = ids(feed("uneven")[0], 40)
    feeds = [feed("uneven", rank=rank, world_size=world_size)[0] for rank in range(world_size)]
    parts = [ids(source, 40) for source in feeds]
    assert [sum((part[step] for part in parts), []) for step in range(40)] == alone
    for source, part in zip(feeds, parts, strict=True):
        assert [batch[source.mine] for batch in alone] == part
    sizes = {len(part[0]) for part in parts}
    assert len(sizes) == 2 and max(sizes) - min(sizes) == 2  # one lane of 2 rows


@pytest.mark.parametrize("shape", SHAPES)
def test_a_feed_goes_on_from_any_step_with_any_number_of_workers(shape: str) -> None:
    whole = ids(feed(shape)[0], 40)
    lanes = SHAPES[shape][2]
    for start in (1, 2, 7, 13, 31):
        assert ids(feed(shape)[0], 40 - start, start) == whole[start:]
        workers = min(2, lanes)
        parts = [ids(feed(shape, rank=rank, world_size=workers)[0], 5, start) for rank in range(workers)]
        assert [sum((part[step] for part in parts), []) for step in range(5)] == whole[start : start + 5]


def test_epochs_and_seeds_differ_in_order() -> None:
    flat = ids(feed("even")[0], 8)
    assert flat[:4] != flat[4:] and sorted(sum(flat[:4], [])) == sorted(sum(flat[4:], []))
    assert flat != ids(feed("even", seed=2)[0], 8)


def test_rows_are_mixed_within_and_between_groups() -> None:
    source, _ = feed("even", lanes=1, window=64)
    epoch = sum(ids(source, 4), [])
    groups = [row // 8 for row in epoch]
    assert groups != sorted(groups)  # chunks are permuted
    assert sum(a != b for a, b in zip(groups, groups[1:], strict=False)) > 16  # and their rows mixed with one another


def test_only_the_rows_that_are_needed_are_read() -> None:
    source, reader = feed("uneven")
    ids(source, 2)
    # A batch takes 2 rows of each of the 8 lanes; a window has at most 40 / 8 = 5 rows.
    assert all(sum(end - begin for begin, end in ranges) <= 5 for ranges in reader.requests)
    assert len(reader.requests) <= 8 * 4
    # A resume reads nothing of what lies before, beyond the windows it starts in.
    source, reader = feed("uneven")
    ids(source, 1, start=1000)
    assert sum(end - begin for ranges in reader.requests for begin, end in ranges) <= 8 * 2 * 5
    # A rank reads its own lanes alone: 4 of 8, of 18 rows each, rows 72 to 143 (wrapping round at 137).
    source, reader = feed("uneven", rank=1, world_size=2)
    ids(source, 9)
    read = {row for ranges in reader.requests for begin, end in ranges for row in range(begin, end)}
    assert read <= {*range(72, 137), *range(7)} and reader.shares == {2}


def test_lanes_do_not_need_their_next_window_at_the_same_step() -> None:
    source, reader = feed("even", lanes=8, window=64, global_batch_size=8)
    asked = []
    for _ in islice(source.batches(), 8):
        asked.append(len(reader.requests))
    assert asked[0] == 8 and max(np.diff(asked)) <= 2


def test_an_epoch_is_read_once_and_a_group_is_split_no_more_than_it_must() -> None:
    source, reader = feed("even", lanes=4, window=64)
    ids(source, 4)
    rows = [row for ranges in reader.requests for begin, end in ranges for row in range(begin, end)]
    assert sorted(rows) == list(range(64))
    # Windows are made of whole groups of 8 rows; only the first of a lane's epoch may end within one.
    pieces = Counter(begin // 8 for ranges in reader.requests for begin, _ in ranges)
    assert sum(count - 1 for count in pieces.values()) <= 4


def test_the_reader_is_let_go_of_when_the_batches_are() -> None:
    source, reader = feed("even")
    stream = source.batches()
    next(stream)
    assert reader.open == 1
    stream.close()  # type: ignore[attr-defined]
    assert reader.open == 0


def test_first_rows_come_in_order_and_no_more_than_there_are() -> None:
    reader = Reader(37, [10, 10, 10, 7])
    assert first_rows(reader, 12)["id"].tolist() == list(range(12))
    assert first_rows(reader, 100)["id"].tolist() == list(range(37))
    assert reader.open == 0


def test_a_reader_that_breaks_its_word_and_bad_sizes_are_refused() -> None:
    class Short(Reader):
        def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[Rows, None, None]:
            yield from ({"id": rows["id"][1:]} for rows in super().stream(requests))

    class Ending(Reader):
        def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[Rows, None, None]:
            yield from islice(super().stream(requests), 3)

    def over(reader: Reader, lanes: int = 2, workers: int = 1) -> Feed:
        return Feed(
            reader, global_batch_size=8, rank=0, world_size=workers, seed=0, window=8, lanes=lanes, decode=lambda rows: rows
        )

    with pytest.raises(RuntimeError, match="gave . rows for the ranges"):
        ids(over(Short(37, [37])), 1)
    with pytest.raises(RuntimeError, match="ended before"):
        ids(over(Ending(37, [37])), 9)
    with pytest.raises(ConfigError, match="no rows"):
        over(Reader(0, []))
    with pytest.raises(ValueError, match="each of 3 workers needs one of 2 lanes"):
        over(Reader(37, [37]), workers=3)
    with pytest.raises(ValueError, match="a global batch of 8"):
        over(Reader(37, [37]), lanes=3)
