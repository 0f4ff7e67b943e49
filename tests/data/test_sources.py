"""Shards in, rows out: nothing disappears, nothing is shifted, nothing but images, text and JSON is decoded."""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
import numpy as np
import pytest
from material import DAMAGE, RESOLUTION, Shards, caption_of, png, write_tar
from PIL import Image

from aptp_ray.config import ConfigError
from aptp_ray.data.schema import ALTERNATES, CAPTION, GROUP, IMAGE, KEY, RAW, REASON, SHARD
from aptp_ray.data.sources import expand, read_shard, webdataset


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


@pytest.mark.parametrize("pattern", ["nothing-*.tar", "nothing-{0..3}.tar", "nothing.tar"])
def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="nothing-?.*data.source.train") as caught:
        webdataset(f"{tmp_path}/{pattern}")
    assert f"{tmp_path}/{pattern}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_shard_of_a_range_is_named(shards: Shards) -> None:
    with pytest.raises(ConfigError, match=r"2 of the 5 shards.*00003\.tar"):
        expand(f"{shards.folder}/{{00000..00004}}.tar")


def test_every_sample_is_a_row_and_keeps_its_own_caption(shards: Shards, ray_cluster: None) -> None:
    rows = webdataset(shards.pattern).take_all()
    assert set(rows[0]) == {*RAW, REASON}
    good = [row for row in rows if not row[REASON]]
    assert [row[KEY] for row in good] == shards.keys
    assert len(rows) == len(shards.keys) + len(shards.rejected)
    for row in good:
        np.testing.assert_array_equal(row[IMAGE], shards.pixels[row[KEY]])
        assert row[CAPTION] == caption_of(row[KEY])
        assert list(row[ALTERNATES]) == ["another " + row[KEY]]
        assert row[GROUP] == ("odd" if int(row[KEY]) % 2 else "even")
    reasons = {row[KEY]: row[REASON] for row in rows if row[REASON]}
    assert reasons.keys() == shards.rejected.keys() and len(DAMAGE) == len(reasons) - 1
    for key, word in shards.rejected.items():
        assert word in reasons[key]
    assert {row[SHARD] for row in rows} == set(expand(shards.pattern))


def test_a_shard_cut_inside_of_a_member_gives_what_stands_before(shards: Shards, tmp_path: Path) -> None:
    whole = (shards.folder / "00001.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    rows = list(read_shard(f"{tmp_path}/cut.tar"))
    count = len(rows) - 1
    assert 0 < count < 10
    assert [row[KEY] for row in rows[:-1]] == [f"{number:05d}" for number in range(20, 20 + count)]
    assert rows[-1][KEY] == "" and f"damaged after {count} samples" in rows[-1][REASON]


def test_an_empty_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    (row,) = read_shard(f"{tmp_path}/empty.tar")
    assert "damaged after 0 samples" in row[REASON]


def test_formats_are_decoded_as_they_look(tmp_path: Path) -> None:
    red = np.zeros((RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    red[..., 0] = 200
    clear = io.BytesIO()  # black under full transparency: browsers show white
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear, format="png")
    gray = io.BytesIO()
    Image.new("L", (4, 4), 9).save(gray, format="png")
    gif = io.BytesIO()
    Image.new("L", (4, 4), 9).save(gif, format="gif")
    images = {
        "a.jpg": png(red, "jpeg"),
        "b.jpeg": png(red, "jpeg"),
        "c.webp": png(red, "webp"),
        "d.PNG": clear.getvalue(),
        "dir.x/e.png": gray.getvalue(),
        "f.png": gif.getvalue(),  # no decoder but the four is tried, whatever the name says
    }
    members = [item for name, data in images.items() for item in ((name, data), (name.rsplit(".", 1)[0] + ".txt", b"t"))]
    write_tar(tmp_path / "formats.tar", members)
    rows = {row[KEY]: row for row in read_shard(f"{tmp_path}/formats.tar")}
    assert list(rows) == ["a", "b", "c", "d", "dir.x/e", "f"]
    for key in "abc":
        assert np.abs(rows[key][IMAGE].astype(int) - red).max() <= 4
    assert (rows["d"][IMAGE] == 255).all() and (rows["dir.x/e"][IMAGE] == 9).all()
    assert "unreadable" in rows["f"][REASON] and not any(rows[key][REASON] for key in list(rows)[:-1])
