"""Shards in, rows out: nothing disappears, nothing is shifted, nothing but images, text and JSON is decoded."""

from __future__ import annotations

import json
import logging
import pickle
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset as published
from material import DAMAGE, Shards
from material import caption_of as caption_of_key
from pictures import FORMATS, caption_of, good, members, picture, read, reasons, same, write_shard, write_tar

from aptp_ray import sections
from aptp_ray.config import ConfigError
from aptp_ray.data.schema import ALTERNATES, CAPTION, GROUP, IMAGE, KEY, METADATA, POSITION, RAW_ROW, REASON, SHARD, UNREACHABLE
from aptp_ray.data.sources import Layout, expand, open_layout, raw_rows, webdataset
from aptp_ray.data.tar import WebDatasetLayout


def source_of(pattern: str) -> sections.WebDataset:
    return sections.WebDataset(kind="webdataset", train=pattern, validation="nowhere/*.tar")


def opened(pattern: object) -> Layout:
    return open_layout(source_of(str(pattern)), "train")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{00000..00002}.tar", ["00000", "00001", "00002"]),
        ("{00002..00000}.tar", ["00002", "00001", "00000"]),
        ("0000{1..2}.tar", ["00001", "00002"]),
        ("*.tar", ["00000", "00001", "00002"]),
        ("{00001,*}.tar", ["00001", "00000", "00002"]),
        ("0000[02].tar", ["00000", "00002"]),
        ("0{000{0,2},0001}.tar", ["00000", "00001", "00002"]),
        ("00001.tar", ["00001"]),
    ],
)
def test_expand_gives_shards_in_order(shards: Shards, pattern: str, names: list[str]) -> None:
    assert expand(f"{shards.folder}/{pattern}") == [f"{shards.folder}/{name}.tar" for name in names]


def test_expand_reads_other_file_systems() -> None:
    with fsspec.open("memory://expand/a1.tar", "wb") as stream:
        stream.write(b"x")
    assert expand("memory://expand/*.tar") == ["memory:///expand/a1.tar"]
    with fsspec.open(expand("memory://expand/a{1..1}.tar")[0], "rb") as stream:
        assert stream.read() == b"x"


@pytest.mark.parametrize(
    ("pattern", "tried"),
    [("nothing-*.tar", "nothing is there"), ("nothing-{0..3}.tar", "none of the 4 names"), ("nothing.tar", "nothing is there")],
)
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, pattern: str, tried: str) -> None:
    with pytest.raises(ConfigError, match=f"{tried}.*data.source.train") as caught:
        webdataset(source_of(f"{tmp_path}/{pattern}"), "train")
    assert f"{tmp_path}/{pattern}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["", "nosuchprotocol://x/*.tar", "{folder}"])
def test_a_pattern_that_cannot_be_one_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern is empty|cannot open|is a folder"):
        opened(pattern.format(folder=tmp_path)).units()


def test_missing_shards_of_a_range_are_units_out_of_reach(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard in (0, 2):
        write_shard(tmp_path / f"{shard:05d}.tar", range(shard * 3, shard * 3 + 3))
    with caplog.at_level(logging.WARNING):
        layout = opened(tmp_path / "{00000..00004}.tar")
        units = layout.units()
    assert [unit.index for unit in units] == list(range(5)) and len({unit.version for unit in units}) == 3
    warning = caplog.records[-1].getMessage()
    assert "3 of the 5" in warning and all(f"{number:05d}.tar" in warning for number in (1, 3, 4))
    rows = read(layout)
    assert good(rows) == [f"{number:09d}" for number in (0, 1, 2, 6, 7, 8)]
    lost = [row for row in rows if row[REASON]]
    assert [row[SHARD] for row in lost] == [f"{tmp_path}/{number:05d}.tar" for number in (1, 3, 4)]
    assert all(row[REASON].startswith(UNREACHABLE) and row[KEY] == "" for row in lost)


def test_a_units_version_changes_with_its_file(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", range(2))
    before = opened(path).units()[0]
    assert opened(path).units()[0] == before and before.version
    write_shard(path, range(3))
    assert opened(path).units()[0].version != before.version


def test_every_sample_is_a_row_and_keeps_its_own_caption(shards: Shards, ray_cluster: None) -> None:
    rows = webdataset(source_of(shards.pattern), "train").take_all()
    assert set(rows[0]) == set(RAW_ROW)
    usable = [row for row in rows if not row[REASON]]
    assert [row[KEY] for row in usable] == shards.keys
    assert len(rows) == len(shards.keys) + len(shards.rejected)
    for row in usable:
        np.testing.assert_array_equal(row[IMAGE], shards.pixels[row[KEY]])
        assert row[CAPTION] == caption_of_key(row[KEY])
        assert list(row[ALTERNATES]) == ["another " + row[KEY]]
        assert row[GROUP] == ("odd" if int(row[KEY]) % 2 else "even")
        assert json.loads(row[METADATA])["sha256"] == "0"
    found = reasons(rows)
    assert found.keys() == shards.rejected.keys() and len(DAMAGE) == len(found) - 1
    for key, word in shards.rejected.items():
        assert word in found[key]
    assert {row[SHARD] for row in rows} == set(expand(shards.pattern))
    layout = opened(shards.pattern)
    directly = [row for unit in layout.units() for row in layout.read(unit)]
    same([row | {ALTERNATES: list(row[ALTERNATES])} for row in rows], directly)
    (unit,) = layout.units()[1:2]
    assert [row[KEY] for row in raw_rows(layout, [unit]).take_all()] == [f"{number:05d}" for number in range(20, 30)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_positions_are_where_a_samples_first_header_stands(tmp_path: Path, tar_format: int) -> None:
    # Names beyond 100 characters have an extension header before their own, in the last two formats.
    stem = "x" * (90 if tar_format == tarfile.USTAR_FORMAT else 150)
    files = [item for number in range(7) for item in members(number, key=f"dir/{stem}{number}")]
    path = write_tar(tmp_path / "0.tar", files, tar_format)
    rows = read(opened(path))
    assert good(rows) == [f"dir/{stem}{number}" for number in range(7)]
    block, size = 512, path.stat().st_size
    assert rows[0][POSITION] == 0 and all(row[POSITION] % block == 0 and row[POSITION] < size for row in rows)


def test_positions_read_a_sample_and_not_the_rest(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "0.tar", range(20))
    layout = opened(path)
    (unit,) = layout.units()
    rows = list(layout.read(unit))
    start, stop = rows[5][POSITION], rows[7][POSITION]
    data = bytearray(path.read_bytes())
    data[:start], data[stop:] = b"\xff" * start, b"\xff" * (len(data) - stop)
    path.write_bytes(data)
    same(layout.read(unit, [rows[6][POSITION], rows[5][POSITION]]), [rows[6], rows[5]])
    assert list(layout.read(unit, [])) == []


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_read(tmp_path: Path, kind: str) -> None:
    files = [item for number in range(9) for item in members(number)]
    path = write_tar(tmp_path / f"0.tar.{kind}", files, mode=f"w:{kind}")
    assert len(good(read(opened(path)))) == 9


def test_shards_of_the_webdataset_package(tmp_path: Path) -> None:
    with published.ShardWriter(f"{tmp_path}/%05d.tar", maxcount=5, verbose=0) as writer:
        for number in range(12):
            kind = list(FORMATS)[number % 4]
            meta = {"group": "even" if number % 2 == 0 else "odd", "url": "http://example.com"}
            sample: dict[str, Any] = {"__key__": f"{number:09d}", kind: picture(number, kind), "txt": caption_of(number)}
            writer.write(sample | {"json": meta, "cls": number, "npy": np.zeros(3)})
    rows = read(opened(tmp_path / "{00000..00002}.tar"))
    assert good(rows) == [f"{number:09d}" for number in range(12)] and not reasons(rows)
    assert [row[GROUP] for row in rows] == ["even", "odd"] * 6
    with published.TarWriter(f"{tmp_path}/one.tar.gz") as single:
        single.write({"__key__": "sub/a", "webp": picture(3, "webp"), "txt": caption_of(3)})
    assert good(read(opened(tmp_path / "one.tar.gz"))) == ["sub/a"]


def test_kinds_without_a_decoder_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    trap = pickle.dumps(Trap())
    bad = [(f"000000000.{kind}", trap) for kind in ("pyd", "pkl", "pickle", "pt", "pth", "npy", "npz", "cls", "mp")]
    aside = [("README", b"text"), (".hidden.txt", b"text"), ("./._000000001.jpg", b"of a Macintosh")]
    path = write_tar(tmp_path / "0.tar", [*aside, *bad, *members(0), *members(1, "webp", "./000000001"), *aside])
    rows = read(opened(path))
    assert good(rows) == ["000000000", "000000001"] and not reasons(rows) and not (tmp_path / "executed").exists()
    # Nor does a name make a decoder of what is no image.
    fake = write_tar(tmp_path / "1.tar", [("a.png", trap), ("a.txt", b"text"), ("b.jpg", trap), ("b.txt", b"text")])
    assert set(reasons(read(opened(fake)))) == {"a", "b"} and not (tmp_path / "executed").exists()


def test_layouts_are_small_and_travel(shards: Shards) -> None:
    layout = open_layout(source_of(shards.pattern), "train", storage_options={"secret": "hunter2"})
    assert pickle.loads(pickle.dumps(layout)) == layout and isinstance(layout, WebDatasetLayout)
    assert len(pickle.dumps(layout)) < 1000 and "hunter2" not in repr(layout)


def test_the_demos_source_is_no_layout() -> None:
    with pytest.raises(ConfigError, match="openmoji"):
        open_layout(sections.OpenMoji(kind="openmoji"), "train")  # type: ignore[arg-type]
