"""Rows that are encoded as they are read, against the same rows encoded once: the same values, nothing ahead of its time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from material import MINILM, RESOLUTION, Shards, encode, members_of, write_tar

from aptp_ray.artifacts import RunDir
from aptp_ray.data.encoder import EncoderSpec
from aptp_ray.data.layout import Unit
from aptp_ray.data.online import LIGHT, OnlineReader, SourceError, source_rows
from aptp_ray.data.reader import EncodedReader
from aptp_ray.data.rows import Framing
from aptp_ray.data.schema import EMBEDDING, KEY, LATENT_MEAN, LATENT_STD, TEXT_LENGTH, TEXT_STATES, TEXT_TOKENS, VIEW
from aptp_ray.data.tar import WebDatasetLayout

PARTS = ("encoded", "train")
BATCH = 4  # of the actors, offline and online
# Encoded in other company, a row's values differ by float32 rounding, which may tip a half float over: 11 bits.
HALF = {"rtol": 2e-3, "atol": 2e-3}


def open_online(
    run: RunDir, layout: Any, pipeline_dir: Path, columns: Sequence[str], *, text: str = "states", **framing: Any
) -> OnlineReader:
    return OnlineReader.open(
        run,
        *PARTS,
        columns=columns,
        layout=layout,
        spec=EncoderSpec(str(pipeline_dir), MINILM, text=text),
        framing=Framing(**{"resolution": RESOLUTION} | framing),
        batch_size=BATCH,
        actors=1,
    )


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, shards: Shards, pipeline_dir: Path, ray_cluster: None) -> RunDir:
    """The rows of ``run`` without tensors."""
    made = RunDir(str(tmp_path_factory.mktemp("light")))
    encode(shards.pattern, made, pipeline_dir, mode="online")
    return made


def batches_of(reader: EncodedReader) -> list[list[tuple[int, int]]]:
    """One request for each file; files are encoded in batches from their first row on."""
    edges = np.cumsum([0, *reader.groups]).tolist()
    return [[(begin, end)] for begin, end in zip(edges, edges[1:], strict=False)]


def test_the_same_rows_have_the_same_values(run: RunDir, light: RunDir, shards: Shards, pipeline_dir: Path) -> None:
    columns = (KEY, LATENT_MEAN, LATENT_STD, TEXT_STATES, TEXT_LENGTH, EMBEDDING)
    offline = EncodedReader.open(run, *PARTS, columns=columns)
    online = open_online(light, WebDatasetLayout(shards.pattern), pipeline_dir, columns)
    assert online.num_rows == offline.num_rows == len(shards.keys) and list(online.groups) == list(offline.groups)
    alike = batches_of(offline)
    mixed = [[(5, 9), (20, 22), (0, 1)], [(17, 19)]]  # over files and shards, and back
    requests = [*alike, *mixed]
    for number, (stored, made) in enumerate(zip(offline.stream(requests), online.stream(requests), strict=True)):
        assert set(made) == set(columns) and made[KEY].tolist() == stored[KEY].tolist()
        assert made[TEXT_LENGTH].tolist() == stored[TEXT_LENGTH].tolist()
        np.testing.assert_allclose(made[EMBEDDING], stored[EMBEDDING], atol=1e-5)
        for name in (LATENT_MEAN, LATENT_STD, TEXT_STATES):
            if number < len(alike):  # encoded in the same company: to the bit
                assert made[name].dtype == np.uint8 and (made[name] == stored[name]).all(), name
            else:
                np.testing.assert_allclose(made[name].view("<f2"), stored[name].view("<f2"), **HALF)


@pytest.mark.slow  # two more pools of encoders
def test_views_are_framed_alike_and_token_ids_are_the_same(
    shards: Shards, pipeline_dir: Path, tmp_path: Path, ray_cluster: None
) -> None:
    framing = {"crop": "random", "flip": True, "views": 2, "seed": 3}
    columns = (KEY, VIEW, LATENT_MEAN, TEXT_TOKENS, TEXT_LENGTH)
    offline, light = RunDir(str(tmp_path / "offline")), RunDir(str(tmp_path / "light"))
    encode(shards.pattern, offline, pipeline_dir, framing=framing, text="tokens")
    encode(shards.pattern, light, pipeline_dir, framing=framing, text="tokens", mode="online")
    stored = EncodedReader.open(offline, *PARTS, columns=columns)
    online = open_online(light, WebDatasetLayout(shards.pattern), pipeline_dir, columns, text="tokens", **framing)
    assert online.num_rows == 2 * len(shards.keys)
    requests = [[(3, 12), (1, 2)], [(30, 36)]]
    for left, right in zip(stored.stream(requests), online.stream(requests, share=2), strict=True):
        assert right[KEY].tolist() == left[KEY].tolist() and right[VIEW].tolist() == left[VIEW].tolist()
        assert {*right[VIEW].tolist()} == {0, 1}
        assert (right[TEXT_TOKENS] == left[TEXT_TOKENS]).all() and (right[TEXT_LENGTH] == left[TEXT_LENGTH]).all()
        np.testing.assert_allclose(right[LATENT_MEAN].view("<f2"), left[LATENT_MEAN].view("<f2"), **HALF)


@dataclass(frozen=True)
class CountingLayout:
    """Leaves a file for every row that is read."""

    inner: WebDatasetLayout
    folder: str

    def units(self) -> list[Unit]:
        return self.inner.units()

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        for row in self.inner.read(unit, positions):
            (Path(self.folder) / f"{unit.index}-{row['position']}-{time.monotonic_ns()}").touch()
            yield row


def settled(folder: Path) -> int:
    """Waits until no more rows are read, and counts them."""
    count = -1
    while count != (count := len(list(folder.iterdir()))):
        time.sleep(3)
    return count


@pytest.mark.slow  # it waits, to see that nothing happens
def test_nothing_is_encoded_far_ahead_of_a_consumer_that_stops(
    light: RunDir, shards: Shards, pipeline_dir: Path, tmp_path: Path
) -> None:
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    layout = CountingLayout(WebDatasetLayout(shards.pattern), str(tmp_path))
    reader = open_online(light, layout, pipeline_dir, [KEY])
    stream = reader.stream([[(row % reader.num_rows, row % reader.num_rows + 1)] for row in range(100)])
    keys = [next(stream)[KEY][0] for _ in range(3)]
    assert keys == shards.keys[:3]
    # One actor: at most four requests beyond those that the consumer's iterator holds (a batch, one prefetched, one on its way).
    first = settled(tmp_path)
    assert 3 <= first <= 3 + 2 + 4
    keys += [next(stream)[KEY][0] for _ in range(20)]
    assert keys == (shards.keys * 2)[:23] and settled(tmp_path) <= first + 20
    stream.close()
    for _ in range(60):
        if not encoders_alive():
            break
        time.sleep(0.5)
    assert not encoders_alive(), "the actors of a stream that was closed are still there"


def encoders_alive() -> list[str]:
    from ray._private.state import actors

    names = [item["ActorClassName"] for item in actors().values() if item["State"] == "ALIVE"]
    return [name for name in names if "Encoder" in name or "Pace" in name or "SplitCoordinator" in name]


def remade(shards: Shards, folder: Path, **changed: list[tuple[str, bytes]]) -> None:
    """Writes the second shard again, with other members for some keys."""
    members = []
    for number in range(20, 30):
        key = f"{number:05d}"
        members += changed.get(f"_{key}", members_of(key, number, shards.pixels[key]))
    write_tar(folder / "00001.tar", members)


@pytest.mark.slow
def test_a_source_that_has_changed_is_an_error_that_names_shard_and_key(
    shards: Shards, pipeline_dir: Path, tmp_path: Path, ray_cluster: None
) -> None:
    folder, light = tmp_path / "shards", RunDir(str(tmp_path / "light"))
    shutil.copytree(shards.folder, folder)
    encode(f"{folder}/00001.tar", light, pipeline_dir, mode="online")
    layout = WebDatasetLayout(f"{folder}/00001.tar")
    rows = EncodedReader.open(light, *PARTS, columns=LIGHT)
    units = {unit.name: ray.put(unit) for unit in layout.units()}

    def first_key() -> str:
        """What a fetching task does for the first row."""
        (row,) = source_rows([(0, 1)], rows, layout, units, Framing(RESOLUTION))
        return row[KEY]

    # The same members with other content: as long in blocks of the archive, so that the rows behind them keep their places.
    original = members_of("00020", 20, shards.pixels["00020"])
    broken = [(name, b"x" * len(data) if name.endswith("png") else data) for name, data in original]
    renamed = [(name.replace("00020", "00099"), data) for name, data in original]
    other = [(name, b"x" * len(data) if name.endswith("txt") else data) for name, data in original]
    for members, message in (
        (renamed, r"key '00020' of shard .*00001\.tar is another now: '00099'"),
        (other, r"key '00020' of shard .*00001\.tar has another caption now"),
        (broken, r"key '00020' of shard .*00001\.tar can no longer be used: image is unreadable"),
    ):
        remade(shards, folder, _00020=members)
        with pytest.raises(SourceError, match=message + ".*jobs/encode.py --overwrite"):
            first_key()
    # The same through the tasks: one line, and no trace of Ray's.
    with pytest.raises(SourceError, match="^key '00020' of shard"):
        list(open_online(light, layout, pipeline_dir, [KEY]).stream([[(0, 1)]]))
    remade(shards, folder)
    assert first_key() == "00020"
    (folder / "00001.tar").unlink()
    with pytest.raises(SourceError, match=r"00001\.tar: shard is unreachable"):
        first_key()
    units.clear()
    with pytest.raises(SourceError, match=r"key '00020' of shard .*00001\.tar is gone with its shard"):
        first_key()
