"""Every fault, planted and counted: rows in = rows out + rejected, in each shard and in total, and each has its reason."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from material import RESOLUTION, encode, png, write_tar
from PIL import Image

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.config import ConfigError
from aptp_ray.data.accounts import Accounts
from aptp_ray.data.encoded import ENCODED_SCHEMA, count_rows, read_encoding, read_index, read_table
from aptp_ray.data.layout import Limits
from aptp_ray.data.ledger import REPEATED, Entry
from aptp_ray.data.schema import CAPTION, KEY, LATENT_MEAN, REASON, SHARD
from aptp_ray.data.tar import WebDatasetLayout

TRAIN = ("encoded", "train")
SAMPLES, EVERY = 240, 12  # of the first shard: one kind of row after the other, each SAMPLES / EVERY times
LIMITS = Limits(max_pixels=2000, max_caption_characters=100)


def picture(number: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (RESOLUTION, RESOLUTION + 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def plain(number: int) -> bytes:
    return png(np.asarray(picture(number)))


def rotated(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(number), "jpeg", exif=exif)


# Kind of row -> (extension, image), and what the reason says; "" where the row is good.
KINDS: list[tuple[str, str, str]] = [
    ("plain", "png", ""),
    ("gray", "png", ""),
    ("transparent", "webp", ""),
    ("cmyk", "jpg", ""),
    ("rotated", "jpg", ""),
    ("cut", "png", "image is unreadable"),
    ("empty", "jpg", "image is unreadable: the jpg file is empty"),
    ("huge", "png", "image is too large"),
    ("no caption", "png", "caption is missing"),
    ("latin", "png", "caption is not UTF-8"),
    ("novel", "png", "caption is too long"),
    ("no image", "", "image is missing"),
]
assert len(KINDS) == EVERY


def caption(key: str) -> str:
    return f"thing {key}"


def members(number: int) -> list[tuple[str, bytes]]:
    kind, extension, _ = KINDS[number % EVERY]
    key = f"{number:05d}"
    image = {
        "gray": lambda: saved(picture(number, "L"), "png"),
        "transparent": lambda: saved(picture(number, "RGBA"), "webp"),
        "cmyk": lambda: saved(picture(number, "CMYK"), "jpeg"),
        "rotated": lambda: rotated(number),
        "cut": lambda: plain(number)[:80],
        "empty": lambda: b"",
        "huge": lambda: png(np.zeros((50, 50, 3), np.uint8)),
    }.get(kind, lambda: plain(number))()
    text = {"latin": "déjà vu".encode("latin-1"), "novel": b"x" * 10_000}.get(kind, caption(key).encode())
    parts = [] if kind == "no image" else [(f"{key}.{extension}", image)]
    return parts + ([] if kind == "no caption" else [(f"{key}.txt", text)])


def sample(key: str, text: str, number: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", plain(number)), (f"{key}.txt", text.encode())]


@dataclass
class Planted:
    folder: Path
    pattern: str
    shards: dict[str, list[int]]  # name -> [rows in, rows, rejected]
    keys: list[str]  # of good rows, in order


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("planted")
    good = [f"{number:05d}" for number in range(SAMPLES) if not KINDS[number % EVERY][2]]
    first = [item for number in range(SAMPLES) for item in members(number)]
    first += sample(good[0], "the same key once more", 0)  # in one shard: rejected, whatever its caption
    write_tar(folder / "0.tar", first)
    # In another shard: rejected where the caption is the same, too. Rows 0 to 11 fill a file and a half.
    keys = [f"b{number:02d}" for number in range(9)]
    again = [item for number, key in enumerate(keys) for item in sample(key, caption(key), number)]
    again += [item for key in good[:3] for item in sample(key, caption(key), 7)]
    again += sample(good[3], "another caption", 8)
    write_tar(folder / "1.tar", again)
    # A shard of nothing but rows of the first.
    write_tar(folder / "2.tar", [item for key in good[:9] for item in sample(key, caption(key), 9)])
    # Cut in the middle of its fourth sample.
    cut = [f"d{number}" for number in range(6)]
    write_tar(folder / "3.tar", [item for number, key in enumerate(cut) for item in sample(key, caption(key), number)])
    whole = (folder / "3.tar").read_bytes()
    (folder / "3.tar").write_bytes(whole[: whole.index(b"d3.png") + 600])
    write_tar(folder / "4.tar", sample("e0", "the fifth shard", 5))
    bad = SAMPLES - len(good) + 1
    return Planted(
        folder,
        f"{folder}/{{0..4}}.tar",
        {
            "0.tar": [SAMPLES + 1, len(good), bad],
            "1.tar": [13, 10, 3],
            "2.tar": [9, 0, 9],
            "3.tar": [4, 3, 1],
            "4.tar": [1, 1, 0],
        },
        [*good, *keys, good[3], *cut[:3], "e0"],
    )


@pytest.fixture(scope="module")
def encoded(planted: Planted, pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> RunDir:
    """Encoded with a bound that is too low, then as the test below goes on."""
    run = RunDir(str(tmp_path_factory.mktemp("accounts")))
    with pytest.raises(ConfigError, match=r"1[0-9]{2} of 268 rows were rejected.*encode\.max_rejected_fraction=0\.5") as error:
        encode(WebDatasetLayout(planted.pattern, limits=LIMITS), run, pipeline_dir, max_rejected_fraction=0.5)
    assert "\n" not in str(error.value) and run.path("encoded", "rejected.parquet") in str(error.value)
    return run


def test_too_many_rejected_rows_fail_and_a_higher_bound_goes_on(
    encoded: RunDir, planted: Planted, pipeline_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunDirError):
        read_encoding(encoded, *TRAIN)
    with pytest.raises(RunDirError):
        count_rows(encoded, *TRAIN)
    files = {path: path.stat().st_mtime_ns for path in Path(encoded.path(*TRAIN)).rglob("part-*")}
    assert files
    counts = encode(WebDatasetLayout(planted.pattern, limits=LIMITS), encoded, pipeline_dir, max_rejected_fraction=0.6)
    left = {path: path.stat().st_mtime_ns for path in Path(encoded.path(*TRAIN)).rglob("part-*")}
    assert left.items() <= files.items()  # nothing is encoded again; files that held rows twice go
    assert {path.name for path in left} == {name for name, _ in read_index(encoded, *TRAIN)}
    total = [sum(column) for column in zip(*planted.shards.values(), strict=True)]
    assert [counts["rows_in"], counts["rows"], counts["rejected"]] == total and total[0] == total[1] + total[2] == 268
    assert {Path(name).name: sums for name, sums in counts["shards"].items()} == planted.shards
    told = capfd.readouterr().err
    assert f"268 rows in, {total[1]} out, {total[2]} rejected" in told and "worst shards" in told
    assert len(told.splitlines()) < 30
    assert encoded.read_json("encoded", "encoding.json")["splits"]["train"]["rejected"] == total[2]


def test_each_good_row_is_there_once_with_its_own_caption_and_image(
    encoded: RunDir, planted: Planted, pipeline_dir: Path
) -> None:
    encode(WebDatasetLayout(planted.pattern, limits=LIMITS), encoded, pipeline_dir, max_rejected_fraction=0.6)
    rows = read_table(encoded, *TRAIN, columns=ENCODED_SCHEMA.names)
    assert rows[KEY].to_pylist() == planted.keys
    shared = planted.keys[3]
    places = list(zip(rows[SHARD].to_pylist(), rows[KEY].to_pylist(), strict=True))
    for (shard, key), text in zip(places, rows[CAPTION].to_pylist(), strict=True):
        name = Path(shard).name
        expected = {("1.tar", shared): "another caption", ("4.tar", "e0"): "the fifth shard"}.get((name, key), caption(key))
        assert text == expected
    # Images: the same pixels give the same latents (numbers 0 to 8 of the second shard are those of the first's plain rows).
    means = dict(zip(places, rows[LATENT_MEAN].to_pylist(), strict=True))
    zero, one = f"{planted.folder}/0.tar", f"{planted.folder}/1.tar"
    first = np.frombuffer(means[zero, "00000"], "<f2").astype(float)
    np.testing.assert_allclose(first, np.frombuffer(means[one, "b00"], "<f2").astype(float), rtol=2e-3, atol=2e-3)
    assert np.abs(first - np.frombuffer(means[one, "b01"], "<f2")).max() > 0.05
    assert sum(count for _, count in read_index(encoded, *TRAIN)) == len(planted.keys) == count_rows(encoded, *TRAIN)


def test_rejected_rows_are_listed_with_key_shard_and_reason(encoded: RunDir, planted: Planted) -> None:
    table = pq.read_table(encoded.path("encoded", "rejected.parquet"))
    assert table.column_names == [KEY, SHARD, REASON, "split"] and set(table["split"].to_pylist()) == {"train"}
    listed = [(Path(row[SHARD]).name, row[KEY], row[REASON]) for row in table.to_pylist()]
    assert Counter(shard for shard, _, _ in listed) == {
        name: rejected for name, (_, _, rejected) in planted.shards.items() if rejected
    }
    reasons = {(shard, key): reason for shard, key, reason in listed}
    for number in range(SAMPLES):
        word = KINDS[number % EVERY][2]
        if word:
            assert reasons["0.tar", f"{number:05d}"].startswith(word), number
    good = planted.keys
    assert reasons["0.tar", good[0]] == "key is a duplicate in its shard"
    assert [(key, reason) for shard, key, reason in listed if shard == "1.tar"] == [(key, REPEATED) for key in good[:3]]
    assert [(key, reason) for shard, key, reason in listed if shard == "2.tar"] == [(key, REPEATED) for key in good[:9]]
    (damage,) = (reason for shard, _, reason in listed if shard == "3.tar")
    assert "damaged" in damage or "cut" in damage or "truncated" in damage, damage


@pytest.mark.slow
def test_an_unreachable_shard_is_tried_again_until_the_run_ends(
    planted: Planted, pipeline_dir: Path, tmp_path: Path, ray_cluster: None
) -> None:
    for name in ("1.tar", "4.tar"):
        os.link(planted.folder / name, tmp_path / name)
    run = RunDir(str(tmp_path / "run"))
    layout = WebDatasetLayout(f"{tmp_path}/{{1,4,5}}.tar", limits=LIMITS)
    with pytest.raises(ConfigError, match="1 of 3 shards were unreachable"):  # one row of 15, but a third of the shards
        encode(layout, run, pipeline_dir, max_rejected_fraction=0.2)
    units = Path(run.path(*TRAIN, "_units"))
    assert sorted(path.name for path in units.glob("0*")) == ["000000.json", "000001.json"]
    os.link(planted.folder / "3.tar", tmp_path / "5.tar")
    counts = encode(layout, run, pipeline_dir, max_rejected_fraction=0.2)
    assert list(counts["shards"].values()) == [[13, 13, 0], [1, 1, 0], [4, 3, 1]]
    # A run that comes to its end without the shard has settled that it is lost.
    lost = RunDir(str(tmp_path / "lost"))
    (tmp_path / "5.tar").unlink()
    counts = encode(layout, lost, pipeline_dir, max_rejected_fraction=0.5)
    assert list(counts["shards"].values()) == [[13, 13, 0], [1, 1, 0], [1, 0, 1]]
    (row,) = pq.read_table(lost.path("encoded", "rejected.parquet")).to_pylist()
    assert row[KEY] == "" and row[SHARD].endswith("5.tar") and row[REASON].startswith("shard is unreachable")


def entry(name: str, rows_in: int, rejected: int, rows: int | None = None) -> Entry:
    rows = rows_in - rejected if rows is None else rows
    return Entry(0, name, "", rows_in, rows, [[str(key), f"why: {key}"] for key in range(rejected)], {"part": rows}, "")


def test_sums_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"rows of b\.tar were lost or doubled: 5 in, 1 rejected, 3 out"):
        Accounts("train", [entry("a.tar", 5, 0), entry("b.tar", 5, 1, rows=3)], 1)


def test_the_summary_of_many_shards_is_short() -> None:
    entries = [entry(f"{number}.tar", 100, number % 7) for number in range(3000)]
    told = Accounts("encoded/train", entries, 1).summary()
    assert len(told.splitlines()) < 30 and "300,000 rows in" in told and "why" in told
