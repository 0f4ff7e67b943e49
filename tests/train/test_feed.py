"""The feed against a plain list of rows: nothing lost, nothing doubled, the same for any number of workers and any start."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from aptp_ray.train.feed import Feed


class Stream:
    """A Dataset's iterator over numbered rows, and how often it was opened."""

    def __init__(self, rows: int) -> None:
        self.rows, self.opened = rows, 0

    def iter_batches(self, *, batch_size: int, batch_format: str, prefetch_batches: int):  # type: ignore[no-untyped-def]
        self.opened += 1
        for begin in range(0, self.rows, batch_size):
            yield {"id": np.arange(begin, min(begin + batch_size, self.rows))}


def feed(rows: int, *, rank: int = 0, world_size: int = 1, **changes: object) -> Feed:
    options = {"total_rows": rows, "global_batch_size": 8, "seed": 1, "window": 10, "decode": lambda batch: batch} | changes
    return Feed(Stream(rows), rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]


def ids(source: Feed, steps: int, start: int = 0) -> list[list[int]]:
    return [batch["id"].tolist() for batch in islice(source.batches(start), steps)]


@pytest.mark.parametrize("rows", [8, 37, 100])
def test_every_epoch_has_every_row_once_and_no_tail_is_dropped(rows: int) -> None:
    steps = rows  # eight epochs of rows/8 batches
    flat = np.concatenate(ids(feed(rows), steps))
    assert len(flat) == 8 * rows
    for epoch in np.split(flat, 8):
        assert sorted(epoch) == list(range(rows))


def test_epochs_and_seeds_differ_in_order() -> None:
    flat = np.concatenate(ids(feed(40), 10))
    assert flat[:40].tolist() != flat[40:].tolist()
    assert ids(feed(40), 5) != ids(feed(40, seed=2), 5)


@pytest.mark.parametrize("cache_bytes", [0, 64, 1 << 20])
@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_a_resumed_feed_goes_on_where_it_stopped(start: int, cache_bytes: int) -> None:
    whole = ids(feed(37, cache_bytes=cache_bytes), 20)
    assert ids(feed(37, cache_bytes=cache_bytes), 20 - start, start) == whole[start:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_the_global_batches_of_one_worker(world_size: int) -> None:
    alone = ids(feed(37), 12)
    parts = [ids(feed(37, rank=rank, world_size=world_size), 12) for rank in range(world_size)]
    assert [sum((part[step] for part in parts), []) for step in range(12)] == alone


def test_a_dataset_that_fits_is_read_once() -> None:
    small = feed(37)
    ids(small, 20)
    assert small._iterator.opened == 1
    large = feed(37, cache_bytes=8)
    ids(large, 20)
    assert large._iterator.opened > 4


def test_a_changed_dataset_and_bad_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="promised 40"):
        ids(Feed(Stream(37), total_rows=40, global_batch_size=8, rank=0, world_size=1, seed=0, window=10, decode=dict), 20)
    with pytest.raises(ValueError, match="not a multiple of the 3 workers"):
        feed(37, world_size=3)
    with pytest.raises(ValueError, match="no rows"):
        feed(0)
