"""Every fault that real data has, planted: the rows around it come through, it is reported, and says what it was."""

from __future__ import annotations

import io
import itertools
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pictures import (
    caption_of,
    color_of,
    encoded,
    good,
    members,
    number_of,
    picture,
    read,
    reasons,
    write_shard,
    write_tar,
)
from PIL import Image

from aptp_ray.data import access
from aptp_ray.data.decode import Unusable, decode_caption, decode_image, good_captions
from aptp_ray.data.layout import DUPLICATE, Limits
from aptp_ray.data.schema import ALTERNATES, CAPTION, KEY, POSITION, REASON, UNREACHABLE
from aptp_ray.data.tar import WebDatasetLayout

LIMITS = Limits(max_pixels=10_000, max_caption_characters=100)
SAMPLES = 8
BROKEN = 4  # the sample beside which damage is done


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BACKOFF_SECONDS", 0.001)


# Images.


def test_a_fixed_list_of_formats_is_decoded() -> None:
    image = Image.new("RGB", (9, 5), color_of(1))
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        pixels = decode_image(encoded(image, kind), LIMITS)
        assert pixels.shape == (5, 9, 3) and np.abs(pixels.astype(int) - color_of(1)).max() <= 6
    for kind in ("TIFF", "BMP", "PPM", "ICO", "TGA", "EPS"):
        with pytest.raises(Unusable, match="none of JPEG, PNG, WEBP, GIF"):
            decode_image(encoded(image, kind), LIMITS)


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_images_are_rejected_wherever_they_end(kind: str) -> None:
    whole = encoded(_noise(), kind)
    for part in (0.01, 0.1, 0.5, 0.9):
        with pytest.raises(Unusable, match="image is unreadable"):
            decode_image(whole[: int(len(whole) * part) or 1], LIMITS)
    with pytest.raises(Unusable, match="the png file is empty"):
        decode_image(b"", LIMITS, "png")
    with pytest.raises(Unusable, match="image is missing"):
        decode_image(None, LIMITS)


def _png_header(width: int, height: int) -> bytes:
    """A PNG of any size, in 60 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_rejected_by_their_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(Unusable, match=r"image is too large: 101 x 100 pixels, data.max_pixels=10000"):
        decode_image(_png_header(101, 100), LIMITS)
    with pytest.raises(Unusable, match="image is too large"):  # beyond Pillow's own limit, which raises
        decode_image(_png_header(60_000, 60_000), Limits(max_pixels=10**12))
    with pytest.raises(Unusable, match="image is too large"):  # beyond the size of which it only warns
        decode_image(_png_header(10_000, 10_500), Limits())


def test_gray_palette_and_transparency_look_as_in_a_browser() -> None:
    red = Image.new("RGB", (4, 4), (200, 10, 30))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))  # black under full transparency: browsers show white
    half = Image.new("LA", (4, 4), (100, 128))
    palette = red.quantize(4)
    holed = Image.new("P", (4, 4), 1)
    holed.putpalette([0, 0, 0, 200, 10, 30])
    expected: list[tuple[Image.Image, str, dict[str, Any], tuple[int, int, int]]] = [
        (Image.new("L", (4, 4), 9), "PNG", {}, (9, 9, 9)),
        (Image.new("L", (4, 4), 90), "JPEG", {}, (90, 90, 90)),
        (Image.new("1", (4, 4), 1), "PNG", {}, (255, 255, 255)),
        (clear, "PNG", {}, (255, 255, 255)),
        (clear, "WEBP", {"lossless": True}, (255, 255, 255)),
        (half, "PNG", {}, (177, 177, 177)),
        (palette, "PNG", {}, (200, 10, 30)),
        (palette, "GIF", {}, (200, 10, 30)),
        (holed, "PNG", {"transparency": 1}, (255, 255, 255)),
        (holed, "PNG", {"transparency": 0}, (200, 10, 30)),
        (holed, "PNG", {"transparency": bytes([255, 128])}, (227, 132, 142)),
        (red, "PNG", {"transparency": (200, 10, 30)}, (255, 255, 255)),
        (Image.new("L", (4, 4), 7), "PNG", {"transparency": 7}, (255, 255, 255)),
    ]
    for image, kind, options, color in expected:
        pixels = decode_image(encoded(image, kind, **options), LIMITS)
        assert pixels.shape == (4, 4, 3) and np.abs(pixels.astype(int) - color).max() <= 1, (image.mode, kind, options)


def test_cmyk_as_adobe_writes_it_keeps_its_colors() -> None:
    # 0 % cyan, 100 % magenta and yellow, 0 % black: red. In the file the values are inverted, and a marker says Adobe.
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data and Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(decode_image(data, LIMITS).astype(int) - (255, 0, 0)).max() <= 8
    dark = encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 200)), "JPEG", quality=95)
    assert np.abs(decode_image(dark, LIMITS).astype(int) - 55).max() <= 8


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    levels = (np.arange(64, dtype=np.uint32) * 1024).astype(np.uint16).reshape(8, 8)
    pixels = decode_image(encoded(Image.fromarray(levels), "PNG"), LIMITS)
    assert np.abs(pixels[..., 0].astype(float) - levels / 257).max() <= 1
    assert len(np.unique(pixels)) == 64 and (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    assert (decode_image(data, LIMITS) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # How a camera that is held otherwise stores it: the inverse of what the tag asks of a viewer (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data, LIMITS), upright)


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encoded(
        Image.new("RGB", (8, 8), (1, 2, 3)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x07\xff\xff\xff\xff"
    )
    assert decode_image(data, LIMITS).shape == (8, 8, 3)


# Captions.


def test_captions_are_stripped_and_bad_ones_rejected() -> None:
    assert decode_caption(b"\xef\xbb\xbf  a cat\n", LIMITS) == "a cat"
    assert decode_caption("ein Kätzchen, 猫 \U0001f431", LIMITS) == "ein Kätzchen, 猫 \U0001f431"
    assert decode_caption(b"x" * 100, LIMITS) == "x" * 100
    bad: dict[str, list[Any]] = {
        "caption is missing": [None],
        "caption is empty": [b"", "", b" \t\r\n ", "\u3000\u2003"],
        "caption is not UTF-8": ["K\u00e4tzchen".encode("latin-1"), b"\xff\xfe", "\ud83d"],
        "caption holds a NUL": [b"a\0b"],
        "caption is too long: 10000 characters, data.max_caption_characters=100": ["x" * 10_000],
        "caption is a int": [7],
        "caption is a dict": [{"raw": "a cat"}],
    }
    for reason, values in bad.items():
        for value in values:
            with pytest.raises(Unusable) as caught:
                decode_caption(value, LIMITS)
            assert str(caught.value).startswith(reason)
    assert good_captions(["a", None, "", " b ", 3, b"\xff"], LIMITS) == ["a", "b"]


# Samples.


def test_faults_of_samples_are_rejected_with_reasons_and_their_neighbors_come_through(tmp_path: Path) -> None:
    def changed(number: int, **content: bytes | None) -> list[tuple[str, bytes]]:
        parts = {name.partition(".")[2]: data for name, data in members(number)} | content
        return [(f"{number:09d}.{kind}", data) for kind, data in parts.items() if data is not None]

    faults: list[tuple[dict[str, bytes | None], str]] = [
        ({"jpg": picture(1)[:300]}, "image is unreadable"),
        ({"jpg": b""}, "the jpg file is empty"),
        ({"jpg": None}, "image is missing"),
        ({"jpg": _png_header(9_000, 9_000)}, "image is too large"),
        ({"jpg": b"<html>404</html>"}, "image is unreadable: it is none of"),
        ({"txt": None}, "caption is missing"),
        ({"txt": b" \n"}, "caption is empty"),
        ({"txt": b"\xe4\xf6"}, "caption is not UTF-8"),
        ({"txt": b"x" * 10_000}, "caption is too long: 10000 characters"),
        ({"txt": b"a\0"}, "caption holds a NUL"),
        ({"json": b"{broken"}, "metadata is not JSON"),
        ({"json": b"[" * 100_000}, "metadata is not JSON"),
        ({"json": b"[1]"}, "metadata is a JSON list"),
        ({"json": b"\xff"}, "metadata is not UTF-8"),
        ({"json": b'{"alternates": "a"}'}, "'alternates' is not a list"),
    ]
    files, expected = [], {}
    for index, (content, reason) in enumerate(faults):
        files += members(2 * index) + changed(2 * index + 1, **content)
        expected[f"{2 * index + 1:09d}"] = reason
    files += members(2 * len(faults))
    rows = read(WebDatasetLayout(str(write_tar(tmp_path / "0.tar", files)), limits=Limits(max_pixels=50_000_000)))
    assert good(rows) == [f"{2 * index:09d}" for index in range(len(faults) + 1)]
    found = reasons(rows)
    assert len(rows) == 2 * len(faults) + 1 and found.keys() == expected.keys()
    for key, reason in expected.items():
        assert reason in found[key]


def test_the_later_of_two_samples_with_one_key_is_rejected(tmp_path: Path) -> None:
    again = [("000000001.jpg", picture(5)), ("000000001.txt", caption_of(5).encode())]
    path = write_tar(tmp_path / "0.tar", [*members(0), *members(1), *members(2), *again, *members(3), *members(3), *members(4)])
    rows = read(WebDatasetLayout(str(path)))
    assert [row[KEY] for row in rows] == [f"{number:09d}" for number in (0, 1, 2, 1, 3, 3, 4)]
    assert [row[REASON] for row in rows] == ["", "", "", DUPLICATE, "", DUPLICATE, ""]
    assert rows[1][CAPTION] == caption_of(1)


def test_alternates_that_are_no_captions_are_left_out(tmp_path: Path) -> None:
    meta = json.dumps({"alternates": ["one", " ", "x" * 3000, "two", "\ud83d"], "group": 7}).encode()
    (row,) = read(WebDatasetLayout(str(write_tar(tmp_path / "0.tar", [*members(0)[:2], ("000000000.json", meta)]))))
    assert row[ALTERNATES] == ["one", "two"] and row["group"] == "7"


# Archives.


def _archive(tmp_path: Path) -> tuple[bytes, dict[str, tarfile.TarInfo]]:
    path = write_shard(tmp_path / "whole.tar", range(SAMPLES))
    with tarfile.open(path) as archive:
        return path.read_bytes(), {member.name: member for member in archive}


def _read_bytes(tmp_path: Path, data: bytes) -> list[dict[str, Any]]:
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    layout = WebDatasetLayout(str(path))
    (unit,) = layout.units()
    rows = list(layout.read(unit))
    for row in rows:
        if not row[REASON]:
            number_of(row)
    return rows


KEY_OF_BROKEN = f"{BROKEN:09d}"


@pytest.mark.parametrize("kind", ["jpg", "txt", "json"])
def test_a_broken_header_costs_its_own_sample(tmp_path: Path, kind: str) -> None:
    data, found = _archive(tmp_path)
    at = found[f"{KEY_OF_BROKEN}.{kind}"].offset
    rows = _read_bytes(tmp_path, data[:at] + b"\xff" * 512 + data[at + 512 :])
    assert [row[KEY] for row in rows] == [f"{number:09d}" for number in range(SAMPLES)]
    assert reasons(rows).keys() == {KEY_OF_BROKEN} and "shard is damaged after 4 samples" in rows[BROKEN][REASON]


@pytest.mark.parametrize("count", [1, 100, 511, 512, 513, 600])
@pytest.mark.parametrize("change", ["lost", "added"])
def test_bytes_lost_or_added_in_an_image_cost_one_sample_at_most(tmp_path: Path, change: str, count: int) -> None:
    data, found = _archive(tmp_path)
    at = found[f"{KEY_OF_BROKEN}.jpg"].offset_data + 200
    rest = data[at + count :] if change == "lost" else b"z" * count + data[at:]
    rows = _read_bytes(tmp_path, data[:at] + rest)
    assert good(rows) == [f"{number:09d}" for number in range(SAMPLES) if number != BROKEN]
    assert set(reasons(rows)) == {KEY_OF_BROKEN}


def test_samples_swallowed_by_a_shortened_one_are_found_again(tmp_path: Path) -> None:
    # 4 KiB of the image are gone, so that it would take the members behind it for its own content.
    big = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)), "PNG")
    files = [("a.png", big), ("a.txt", b"a"), *(item for number in range(3) for item in members(number))]
    data = write_tar(tmp_path / "whole.tar", files).read_bytes()
    rows = _read_bytes(tmp_path, data[:1024] + data[1024 + 4096 :])
    assert [row[KEY] for row in rows] == ["a", "000000000", "000000001", "000000002"]
    assert list(reasons(rows)) == ["a"]


@pytest.mark.parametrize("count", [512, 700, 5000, 200_000])
def test_foreign_bytes_between_samples_are_reported_and_cost_none(tmp_path: Path, count: int) -> None:
    data, found = _archive(tmp_path)
    at = found[f"{KEY_OF_BROKEN}.jpg"].offset
    foreign = np.random.default_rng(0).integers(1, 256, count, dtype=np.uint8).tobytes()
    rows = _read_bytes(tmp_path, data[:at] + foreign + data[at:])
    assert len(good(rows)) == SAMPLES and f"{count} bytes are no headers" in reasons(rows)[""]
    assert [row[KEY] for row in rows].index("") == BROKEN


def test_several_damages_are_several_rows(tmp_path: Path) -> None:
    data, found = _archive(tmp_path)
    broken = bytearray(data)
    for name in ("000000001.jpeg", "000000005.txt"):
        broken[found[name].offset : found[name].offset + 512] = b"\xfe" * 512
    rows = _read_bytes(tmp_path, bytes(broken))
    assert set(reasons(rows)) == {"000000001", "000000005"} and len(rows) == SAMPLES


def test_a_cut_shard_gives_what_is_whole_wherever_it_was_cut(tmp_path: Path) -> None:
    data, found = _archive(tmp_path)
    names = [f"{KEY_OF_BROKEN}.{kind}" for kind in ("jpg", "txt", "json")]
    before = [f"{number:09d}" for number in range(BROKEN)]
    cuts = list(
        itertools.chain.from_iterable(
            (found[name].offset, found[name].offset + 100, found[name].offset_data + 3) for name in names
        )
    )
    for number, cut in enumerate(cuts):
        rows = _read_bytes(tmp_path, data[:cut])
        assert good(rows) == before, cut
        # The key is known once a whole header of the sample was read.
        assert [row[KEY] for row in rows[BROKEN:]] == [KEY_OF_BROKEN if number > 1 else ""], cut
        assert "shard is damaged after 4 samples" in rows[-1][REASON]
    whole = _read_bytes(tmp_path, data[: found[f"{BROKEN + 1:09d}.jpeg"].offset])
    assert good(whole) == [*before, KEY_OF_BROKEN] and "the archive's end is missing" in whole[-1][REASON]


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "the file is empty"), (b"hello", "middle of a header"), (b"<html>not found</html>" * 99, "there is no tar header")],
)
def test_what_is_no_archive_is_one_rejected_row(tmp_path: Path, data: bytes, reason: str) -> None:
    (row,) = _read_bytes(tmp_path, data)
    assert reason in row[REASON] and "after 0 samples" in row[REASON] and row[KEY] == ""


def test_joined_archives_are_read_through(tmp_path: Path) -> None:
    parts = [write_shard(tmp_path / "part.tar", numbers).read_bytes() for numbers in (range(3), range(3, 6))]
    rows = _read_bytes(tmp_path, b"".join(parts))
    assert good(rows) == [f"{number:09d}" for number in range(6)] and len(rows) == 6


def test_a_cut_or_altered_compressed_shard_is_reported(tmp_path: Path) -> None:
    files = [item for number in range(SAMPLES) for item in members(number)]
    data = write_tar(tmp_path / "whole.tar.gz", files, mode="w:gz").read_bytes()
    rows = _read_bytes(tmp_path, data[: len(data) * 2 // 3])
    assert 0 < len(good(rows)) < SAMPLES and "shard is damaged" in rows[-1][REASON] and len(rows) == len(good(rows)) + 1
    altered = _read_bytes(tmp_path, data[:-8] + b"\0\0\0\0" + data[-4:])  # the checksum of the whole
    assert len(good(altered)) == SAMPLES and "cannot be decompressed" in altered[-1][REASON]


def test_five_percent_of_each_fault(tmp_path: Path) -> None:
    faults: list[Callable[[int], list[tuple[str, bytes]]]] = [
        lambda number: [(f"{number:09d}.jpg", picture(number)[:200]), *members(number)[1:]],
        lambda number: [members(number)[0], (f"{number:09d}.txt", b"\xff")],
        lambda number: [members(number)[0], (f"{number:09d}.txt", b"x" * 10_000)],
        lambda number: members(number)[1:],
        lambda number: members(number, key=f"{number - 1:09d}"),
    ]
    count, files, bad = 400, [], 0
    for number in range(count):
        kind = number % 20
        broken = 2 <= kind < 2 + len(faults) * 2 and kind % 2 == 0
        files += faults[kind // 2 - 1](number) if broken else members(number)
        bad += broken
    rows = read(WebDatasetLayout(str(write_tar(tmp_path / "0.tar", files))))
    assert len(rows) == count and len(good(rows)) == count - bad and bad == count * len(faults) // 20


# Stores.


class FlakyFileSystem(MemoryFileSystem):
    """Fails as often as it is told, in the middle of a file and otherwise than OSError, as storage libraries do."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    failures = 0
    after = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        stream = super()._open(path, mode, **kwargs)
        if mode == "rb":
            data, cls = stream.getvalue(), type(self)

            class Stream(io.BytesIO):
                def read(self, size: int | None = -1) -> bytes:
                    if cls.failures and self.tell() > cls.after:
                        cls.failures -= 1
                        raise RuntimeError("connection reset by peer")
                    return super().read(size if size is None or size < 0 else min(size, 700))

            return Stream(data)
        return stream


@pytest.fixture
def flaky() -> type[FlakyFileSystem]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.failures, FlakyFileSystem.after = 0, 500
    return FlakyFileSystem


@pytest.mark.parametrize("compressed", [False, True])
def test_a_store_that_fails_for_a_moment_goes_unnoticed(
    tmp_path: Path, flaky: type[FlakyFileSystem], quickly: None, compressed: bool
) -> None:
    files = [item for number in range(SAMPLES) for item in members(number)]
    path = write_tar(tmp_path / "0.tar", files, mode="w:gz" if compressed else "w")
    with fsspec.open("flaky://a/0.tar", "wb") as stream:
        stream.write(path.read_bytes())
    layout = WebDatasetLayout("flaky://a/*.tar")
    (unit,) = layout.units()
    flaky.failures = access.RETRIES
    rows = list(layout.read(unit))
    assert flaky.failures == 0 and [number_of(row) for row in rows] == list(range(SAMPLES))


def test_a_store_that_goes_on_failing_is_out_of_reach(tmp_path: Path, flaky: type[FlakyFileSystem], quickly: None) -> None:
    with fsspec.open("flaky://b/0.tar", "wb") as stream:
        stream.write(write_shard(tmp_path / "0.tar", range(SAMPLES)).read_bytes())
    layout = WebDatasetLayout("flaky://b/0.tar")
    (unit,) = layout.units()
    flaky.failures, flaky.after = 10**6, 9000
    *rows, last = layout.read(unit)
    assert 0 < len(rows) < SAMPLES and [number_of(row) for row in rows] == list(range(len(rows)))
    assert last[REASON].startswith(UNREACHABLE) and "connection reset by peer" in last[REASON] and last[KEY] == ""
    assert flaky.failures == 10**6 - access.RETRIES - 1
    (again,) = layout.read(unit, [rows[-1][POSITION] + 8192])
    assert again[REASON].startswith(UNREACHABLE)


def test_reading_from_an_offset_goes_on_where_it_was(quickly: None) -> None:
    given: list[int] = []

    def start_at(skip: int) -> Any:
        given.append(skip)
        for number in range(skip, 6):
            if number == 4 and len(given) < 3:
                raise TimeoutError("slow")
            yield number

    assert list(access.going_on(start_at)) == list(range(6)) and given == [0, 4, 4]

    def never(skip: int) -> Any:
        raise ConnectionError("refused")

    with pytest.raises(access.Unreachable, match="refused"):
        list(access.going_on(never))
