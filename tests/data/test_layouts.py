"""Tables beside images: each layout is read as its publisher lays it out, every row with the image that is its own."""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import FORMATS, caption_of, color_of, good, number_of, picture, read, reasons, same
from PIL import Image

from aptp_ray import sections
from aptp_ray.config import ConfigError
from aptp_ray.data import access, layout, records, sources
from aptp_ray.data.layout import DUPLICATE
from aptp_ray.data.schema import ALTERNATES, CAPTION, KEY, POSITION, RAW_ROW, REASON

KINDS = list(FORMATS)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows make several units."""
    for module in (layout, records, sources_module("conceptual"), sources_module("coco"), sources_module("folder")):
        monkeypatch.setattr(module, "ROWS_PER_UNIT", 7)
    for name in ("huggingface", "parquet"):
        monkeypatch.setattr(sources_module(name), "ROWS_PER_UNIT", 7)
    monkeypatch.setattr(access, "BACKOFF_SECONDS", 0.001)


def sources_module(name: str) -> Any:
    return sys.modules[f"aptp_ray.data.{name}"]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Conceptual Captions.


def conceptual(folder: Path, lines: list[bytes], *, newline: bytes = b"\n", end: bytes = b"\n") -> sections.ConceptualCaptions:
    (folder / "train").mkdir(parents=True, exist_ok=True)
    put(folder / "Train_GCC-training.tsv", newline.join(lines) + end)
    part = {"tsv": str(folder / "Train_GCC-training.tsv"), "images": str(folder / "train")}
    return sections.ConceptualCaptions(kind="conceptual_captions", train=part, validation=part)


def url_of(number: int) -> str:
    return f"https://example.com/{number}.jpg?w=1"


def download(folder: Path, number: int, name: str | None = None, kind: str = "jpg") -> None:
    """Stores an image as the usual downloader names it: the row, and the checksum of the address."""
    name = f"{number}_{zlib.crc32(url_of(number).encode())}" if name is None else name
    put(folder / "train" / name, picture(number, kind))


@pytest.mark.parametrize(("newline", "end"), [(b"\n", b"\n"), (b"\r\n", b"\r\n"), (b"\n", b"")])
def test_conceptual_captions_pairs_by_the_row_in_the_name(tmp_path: Path, newline: bytes, end: bytes) -> None:
    lines = [f"{caption_of(number)}\t{url_of(number)}".encode() for number in range(30)]
    lines[9], lines[12], lines[13] = b"no tab here", b"\xe4\xf6\t" + url_of(12).encode(), b"\thttps://example.com"
    missing = {4, 20}
    for number in range(30):
        if number not in missing:
            download(tmp_path, number, kind=KINDS[number % 4])
    download(tmp_path, 99)  # of no row
    put(tmp_path / "train" / "notes.txt", b"text")
    put(tmp_path / "train" / "8_", b"text")
    source = conceptual(tmp_path, lines, newline=newline, end=end)
    reader = sources.open_layout(source, "train")
    units = reader.units()
    assert [(unit.first_row, unit.name.rpartition("[")[2]) for unit in units] == [
        (0, "0:7]"), (7, "7:14]"), (14, "14:21]"), (21, "21:28]"), (28, "28:30]")
    ]  # fmt: skip
    rows = read(reader)
    assert [row[KEY] for row in rows] == [str(number) for number in range(30)]
    assert [row[POSITION] for row in rows] == [number % 7 for number in range(30)]
    expected = {"4": "image is missing", "20": "image is missing", "9": "no tab", "12": "not UTF-8", "13": "caption is empty"}
    found = reasons(rows)
    assert found.keys() == expected.keys() and all(reason in found[key] for key, reason in expected.items())
    assert all(number_of(row) == int(row[KEY]) for row in rows if not row[REASON])


def test_conceptual_captions_takes_any_hash_and_extension(tmp_path: Path) -> None:
    lines = [f"{caption_of(number)}\t{url_of(number)}".encode() for number in range(5)]
    for number, name in enumerate(["0_abc.jpg", "1_1234567.webp", "2_x.y.png", "00003_7"]):
        download(tmp_path, number, name)
    put(tmp_path / "train" / "4_0.jpg", picture(40))  # two files of one row: that of the address is its own
    download(tmp_path, 4)
    source = conceptual(tmp_path, lines)
    first = sources.open_layout(source, "train").units()
    assert good(read(sources.open_layout(source, "train"))) == [str(number) for number in range(5)]
    download(tmp_path, 3, "3_again")
    later = sources.open_layout(source, "train").units()
    assert [unit.name for unit in later] == [unit.name for unit in first] and later[0].version != first[0].version


def test_conceptual_captions_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = conceptual(tmp_path, [b"a\tb"])
    with pytest.raises(ConfigError, match="none is named <row>_<hash>"):
        sources.open_layout(source, "train").units()
    conceptual(tmp_path, [], end=b"")
    with pytest.raises(ConfigError, match="is empty"):
        sources.open_layout(source, "train").units()
    gone = {"tsv": str(tmp_path / "gone.tsv"), "images": str(tmp_path / "gone")}
    source = sections.ConceptualCaptions(kind="conceptual_captions", train=gone, validation=gone | {"tsv": source.train.tsv})
    with pytest.raises(ConfigError, match="gone.tsv.*data.source.*tsv"):
        sources.conceptual_captions(source, "train")
    with pytest.raises(ConfigError, match="no folder.*gone"):
        sources.conceptual_captions(source, "validation")


def test_line_ranges_hold_at_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", 13)
    rng = np.random.default_rng(0)
    for count in (0, 1, 6, 7, 8, 13, 14, 15, 50):
        for end in (b"", b"\n"):
            lines = [b"x" * int(rng.integers(0, 30)) + b"y" for _ in range(count)]
            put(tmp_path / "lines", b"\n".join(lines) + (end if count else b""))
            data = (tmp_path / "lines").read_bytes()
            found = []
            for start, stop, number in records.line_ranges(str(tmp_path / "lines"), {}):
                part = data[start:stop].removesuffix(b"\n").split(b"\n")
                assert len(part) == number <= 7
                found += part
            assert found == lines


# COCO.


def coco(folder: Path, *, captions: str = "all", **changed: Any) -> sections.Coco:
    """Eight images with three captions each; annotations in another order than images, as COCO has them."""
    images = [{"id": 1000 - number, "file_name": f"COCO_train2014_{number:012d}.jpg"} for number in range(8)]
    notes = [
        {"id": 10 * number + index, "image_id": 1000 - number, "caption": f"version {index} of {caption_of(number)}"}
        for index in (2, 0, 1)
        for number in (3, 1, 0, 7, 6, 2, 5, 4)
    ]
    for number in range(8):
        put(folder / "train2014" / f"COCO_train2014_{number:012d}.jpg", picture(number))
    tree = {"info": {}, "licenses": [], "images": images, "annotations": notes} | changed
    put(folder / "annotations" / "captions_train2014.json", json.dumps(tree).encode())
    part = {"annotations": str(folder / "annotations/captions_train2014.json"), "images": str(folder / "train2014")}
    return sections.Coco(kind="coco", train=part, validation=part, captions=captions)


def test_coco_has_a_row_for_every_annotation(tmp_path: Path) -> None:
    reader = sources.open_layout(coco(tmp_path), "train")
    rows = read(reader)
    assert [row[KEY] for row in rows] == [f"{1000 - number}_{10 * number + index}" for number in range(8) for index in range(3)]
    assert not reasons(rows) and len(reader.units()) == 3
    for row in rows:
        number, index = divmod(int(row[KEY].split("_")[1]), 10)
        assert number_of(row) == number and row[CAPTION] == f"version {index} of {caption_of(number)}"
        assert row[ALTERNATES] == [f"version {other} of {caption_of(number)}" for other in range(3) if other != index]
    assert all(len(pickle.dumps(unit)) < 2000 for unit in reader.units())


def test_coco_takes_the_first_caption_by_its_id(tmp_path: Path) -> None:
    rows = read(sources.open_layout(coco(tmp_path, captions="first"), "train"))
    assert [row[KEY] for row in rows] == [str(1000 - number) for number in range(8)]
    assert all(row[CAPTION].startswith("version 0 of") and len(row[ALTERNATES]) == 2 for row in rows)


def test_coco_reports_what_does_not_fit_together(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"COCO_train2014_{number:012d}.jpg"} for number in range(4)]
    images += [
        {"id": 4, "file_name": "gone.jpg"},
        {"id": 5, "file_name": "../secret.jpg"},
        {"id": 6},
        {"id": 7, "file_name": "/etc/x"},
    ]
    notes = [{"id": number, "image_id": number, "caption": caption_of(number)} for number in range(8) if number != 1]
    notes += [
        {"id": 50, "image_id": 77, "caption": "of no image"},
        {"id": 51, "image_id": 2},
        {"id": 3, "image_id": 3, "caption": "x"},
    ]
    put(tmp_path / "secret.jpg", picture(5))
    rows = read(sources.open_layout(coco(tmp_path, images=images, annotations=notes), "train"))
    assert good(rows) == ["0_0", "2_2", "3_3"]
    found = reasons(rows)
    expected = {
        "1": "caption is missing",
        "2_51": "caption is missing",
        "3_3": DUPLICATE,
        "4_4": "image is missing",
        "5_5": "no path inside",
        "6_6": "not listed",
        "7_7": "no path inside",
        "77_50": "not listed",
    }
    assert found.keys() == expected.keys() and all(reason in found[key] for key, reason in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{broken", "no COCO captions file"),
        (b"[]", "no COCO captions file"),
        (b'{"images": [{"id": 1}]}', "no COCO captions file.*annotations"),
        (b'{"images": [3], "annotations": []}', "no COCO captions file"),
        (b'{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "1 images and no annotations"),
    ],
)
def test_coco_annotations_that_are_none_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    source = coco(tmp_path)
    put(Path(source.train.annotations), content)
    with pytest.raises(ConfigError, match=message) as caught:
        sources.coco(source, "train")
    assert "\n" not in str(caught.value)


# Image folders.


def folder_source(folder: Path, column: str = "text") -> sections.ImageFolder:
    return sections.ImageFolder(kind="image_folder", train=str(folder), validation=str(folder), caption_column=column)


def _names(count: int) -> list[str]:
    """Also in folders below."""
    return [f"{'sub/deep/' if number % 3 == 1 else ''}{number}.{KINDS[number % 4]}" for number in range(count)]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _csv(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


@pytest.mark.parametrize(("table", "made"), [("metadata.jsonl", _jsonl), ("metadata.csv", _csv)])
def test_image_folder_reads_what_its_metadata_name(
    tmp_path: Path, table: str, made: Callable[[list[dict[str, Any]]], bytes]
) -> None:
    names = _names(25)
    for number, name in enumerate(names):
        put(tmp_path / name, picture(number, KINDS[number % 4]))
    put(tmp_path / "unnamed.jpg", picture(1))
    rows = [
        {"file_name": name, "id": 0, "text": f'"two lines,\n quoted" {caption_of(number)}'} for number, name in enumerate(names)
    ]
    rows[3]["file_name"], rows[8]["file_name"] = "gone.png", "../out.png"
    rows[10]["text"], rows[17]["file_name"], rows[18]["file_name"] = " ", names[16], ""
    put(tmp_path / table, b"\xef\xbb\xbf" + made(rows))
    read_rows = read(sources.open_layout(folder_source(tmp_path), "train"))
    bad = {3, 8, 10, 17, 18}
    assert good(read_rows) == [name for number, name in enumerate(names) if number not in bad]
    assert [number_of(row) for row in read_rows if not row[REASON]] == [number for number in range(25) if number not in bad]
    expected = {3: "image is missing", 8: "no path inside", 10: "caption is empty", 18: "file_name is missing"}
    assert len(read_rows) == 25 and all(reason in read_rows[number][REASON] for number, reason in expected.items())


def test_image_folder_of_the_datasets_convention_gives_the_same(tmp_path: Path) -> None:
    for number, name in enumerate(_names(10)):
        put(tmp_path / name, picture(number, KINDS[number % 4]))
    put(tmp_path / "metadata.jsonl", _jsonl([{"file_name": name, "text": caption_of(n)} for n, name in enumerate(_names(10))]))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    ours = {row[CAPTION]: row["image"] for row in read(sources.open_layout(folder_source(tmp_path), "train"))}
    assert len(theirs) == len(ours) == 10
    for row in theirs:
        np.testing.assert_array_equal(np.asarray(row["image"].convert("RGB")), ours[row["text"]])


def test_image_folder_faults_of_single_lines_cost_one_row(tmp_path: Path) -> None:
    for number in range(6):
        put(tmp_path / f"{number}.jpg", picture(number))
    lines = _jsonl([{"file_name": f"{number}.jpg", "text": [caption_of(number), " "]} for number in range(6)]).split(b"\n")
    lines[1], lines[2], lines[4] = b"{broken", b'["list"]', b'{"file_name": "4.jpg", "text": "\xff"}'
    lines.insert(3, b"")
    put(tmp_path / "metadata.jsonl", b"\n".join(lines))
    rows = read(sources.open_layout(folder_source(tmp_path), "train"))
    assert good(rows) == ["0.jpg", "3.jpg", "5.jpg"] and len(rows) == 7
    assert reasons(rows).keys() == {"1", "2", "3", "5"}
    put(tmp_path / "metadata.jsonl", b"")
    with pytest.raises(ConfigError, match="metadata.jsonl' has no rows"):
        sources.image_folder(folder_source(tmp_path), "train")
    (tmp_path / "metadata.jsonl").unlink()
    latin = _csv([{"file_name": f"{number}.jpg", "text": caption_of(number)} for number in range(6)]).replace(
        b"number 4", b"\xe4 4"
    )
    put(tmp_path / "metadata.csv", latin)
    rows = read(sources.open_layout(folder_source(tmp_path), "train"))
    assert len(good(rows)) == 5 and "not UTF-8" in reasons(rows)["4.jpg"]


def test_image_folder_names_the_columns_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a metadata.jsonl nor a metadata.csv"):
        sources.image_folder(folder_source(tmp_path), "train")
    for name, made in (("metadata.csv", _csv), ("metadata.jsonl", _jsonl)):
        put(tmp_path / name, made([{"file_name": "a.jpg", "caption": "x"}]))
        with pytest.raises(ConfigError, match="no column 'text', but file_name, caption"):
            sources.image_folder(folder_source(tmp_path), "train")


# Hugging Face datasets.


def _rows(count: int, *, many: bool = False) -> dict[str, list[Any]]:
    captions: list[Any] = [caption_of(number) for number in range(count)]
    if many:
        captions = [[f"{word} {text}" for word in ("one", "two", "three")] for text in captions]
    return {
        "picture": [{"bytes": picture(number, KINDS[number % 4]), "path": None} for number in range(count)],
        "title": captions,
        "name": [f"n{number}" for number in range(count)],
        "other": list(range(count)),
    }


def _dataset(count: int, **options: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(_rows(count, **options)).cast_column("picture", datasets.Image())


def hub_source(path: object, split: str = "train", **more: Any) -> sections.HuggingFace:
    part = {"path": str(path), "split": split}
    columns = {"image_column": "picture", "caption_column": "title"}
    return sections.HuggingFace(kind="huggingface", train=part, validation=part, **columns | more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One dataset of 40 rows in each form in which the library keeps one."""
    root = tmp_path_factory.mktemp("saved")
    dataset = _dataset(40)
    dataset.save_to_disk(root / "disk")
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(5))}).save_to_disk(root / "dict")
    for index in range(2):
        part = dataset.select(range(20 * index, 20 * index + 20))
        part.to_parquet(root / "files" / f"train-{index:05d}-of-00002.parquet", batch_size=8)
        part.save_to_disk(root / f"arrow{index}")
    put(root / "repository" / "README.md", b"---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n")
    for file in sorted((root / "files").iterdir()):
        put(root / "repository" / "data" / file.name, file.read_bytes())
    return {
        "disk": root / "disk",
        "dict": root / "dict",
        "parquet": root / "files" / "*.parquet",
        "arrow": root / "arrow{0,1}" / "*.arrow",
        "repository": root / "repository",
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    sources_module("huggingface")._open.cache_clear()


@pytest.mark.parametrize("form", ["disk", "dict", "parquet", "arrow", "repository", "streamed"])
def test_huggingface_datasets_in_every_form_give_the_same_rows(saved: dict[str, Path], form: str) -> None:
    path = saved["repository" if form == "streamed" else form]
    source = hub_source(path, streaming=form == "streamed")
    reader = sources.open_layout(source, "train")
    rows = read(reader)
    assert [number_of(row) for row in rows] == list(range(40)) and not reasons(rows)
    assert len({row[KEY] for row in rows}) == 40
    if form == "streamed":
        assert [row[KEY] for row in rows] == [f"{shard}-{number}" for shard in range(2) for number in range(20)]
    else:
        assert [row[KEY] for row in rows] == [str(number) for number in range(40)]
    assert len(reader.units()) == {"parquet": 6, "streamed": 2}.get(form, 6)
    assert len({unit.name for unit in reader.units()}) == len(reader.units())
    assert len(pickle.dumps(reader)) < 2000
    named = sources.open_layout(hub_source(path, streaming=form == "streamed", key_column="name"), "train")
    assert good(read(named)) == [f"n{number}" for number in range(40)]


@pytest.mark.parametrize("form", ["disk", "dict", "parquet", "arrow", "repository"])
@pytest.mark.parametrize(
    ("split", "wanted"), [("train[:25%]", range(10)), ("train[12:31]", range(12, 31)), ("train[-3:]", range(37, 40))]
)
def test_huggingface_splits_are_sliced(saved: dict[str, Path], form: str, split: str, wanted: range) -> None:
    rows = read(sources.open_layout(hub_source(saved[form], split), "train"))
    assert [number_of(row) for row in rows] == list(wanted)


def test_huggingface_positions_read_only_their_row_groups(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = sources.open_layout(hub_source(saved["parquet"]), "train")
    units = reader.units()
    rows = list(reader.read(units[1]))
    taken: list[Any] = []
    original = pq.ParquetFile.iter_batches

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.extend(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    same(reader.read(units[1], [3, 0, 3]), [rows[3], rows[0], rows[3]])
    assert taken == [1]


def test_huggingface_lists_of_captions_are_drawn_by_key(tmp_path: Path) -> None:
    dataset = _dataset(40, many=True)
    dataset.to_parquet(tmp_path / "a.parquet")
    source = hub_source(tmp_path / "a.parquet")

    def words(seed: int) -> list[str]:
        rows = read(sources.open_layout(source, "train", seed=seed))
        for row in rows:
            assert sorted([row[CAPTION], *row[ALTERNATES]]) == sorted(_rows(40, many=True)["title"][number_of(row)])
        return [row[CAPTION].split()[0] for row in rows]

    first = words(0)
    assert words(0) == first and words(1) != first
    assert all(8 <= first.count(word) <= 20 for word in ("one", "two", "three"))


def test_huggingface_images_may_be_bytes_paths_or_missing(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / "images" / f"{number}.jpg", picture(number))
    table = {
        "picture": [
            "images/0.jpg",
            str(tmp_path / "images/1.jpg"),
            f"file://{tmp_path}/images/2.jpg",
            None,
            "gone.jpg",
            "no://x",
        ],
        "title": [caption_of(number) for number in range(6)],
    }
    pq.write_table(pa.table(table), tmp_path / "paths.parquet")
    rows = read(sources.open_layout(hub_source(tmp_path / "paths.parquet"), "train"))
    assert [number_of(row) for row in rows if not row[REASON]] == [0, 1, 2]
    assert [row[REASON].split(":")[0] for row in rows[3:]] == ["image is missing", "image is missing", "image is unreadable"]
    raw = [picture(0), b"", b"<html>", picture(3)]
    captions = pa.array([b"thing number 0", b"x", b"y", b"\xff"])
    pq.write_table(pa.table({"picture": raw, "title": captions}), tmp_path / "bytes.parquet")
    rows = read(sources.open_layout(hub_source(tmp_path / "bytes.parquet"), "train"))
    assert good(rows) == ["0"] and [row[REASON].split(":")[0] for row in rows[1:]] == [
        "image is unreadable", "image is unreadable", "caption is not UTF-8"
    ]  # fmt: skip
    pq.write_table(pa.table({"picture": [7], "title": ["x"]}), tmp_path / "ints.parquet")
    assert "image is a int" in read(sources.open_layout(hub_source(tmp_path / "ints.parquet"), "train"))[0][REASON]


def test_huggingface_keys_that_repeat_are_reported(tmp_path: Path) -> None:
    table = {"picture": [picture(number) for number in range(3)], "title": [caption_of(number) for number in range(3)]}
    pq.write_table(pa.table(table | {"id": ["a", "a", None]}), tmp_path / "a.parquet")
    rows = read(sources.open_layout(hub_source(tmp_path / "a.parquet", key_column="id"), "train"))
    assert [(row[KEY], row[REASON]) for row in rows] == [("a", ""), ("a", DUPLICATE), ("2", "")]


@pytest.mark.parametrize("form", ["disk", "parquet", "streamed"])
def test_huggingface_columns_that_are_not_there_are_named(saved: dict[str, Path], form: str) -> None:
    path = saved["repository" if form == "streamed" else form]
    for knob in ("image_column", "caption_column", "key_column"):
        source = hub_source(path, streaming=form == "streamed", **{knob: "nosuch"})
        with pytest.raises(ConfigError, match=f"no column 'nosuch', but picture, title, name, other: set data.source.{knob}"):
            sources.huggingface(source, "train")


def test_huggingface_datasets_that_are_not_there_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "gone-*.parquet"): "gone-",
        str(tmp_path / "gone"): "cannot open the dataset",
        str(saved["dict"]): "no split 'nosuch', but train, test",
        str(saved["repository"]): "cannot open the dataset.*nosuch",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=message) as caught:
            sources.huggingface(hub_source(path, "nosuch"), "train")
        assert "\n" not in str(caught.value)
    put(tmp_path / "bad.parquet", b"PAR1 no PAR1")
    with pytest.raises(ConfigError, match="cannot read .*bad.parquet"):
        sources.huggingface(hub_source(tmp_path / "bad.parquet"), "train")
    with pytest.raises(ConfigError, match="split 'train.nonsense.' is not understood"):
        sources.huggingface(hub_source(saved["parquet"], "train[nonsense]"), "train")


def test_without_datasets_the_package_to_install_is_named(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install 'datasets"):
        sources.huggingface(hub_source(saved["disk"]), "train")
    assert len(read(sources.open_layout(hub_source(saved["parquet"]), "train"))) == 40  # which needs it not


# On a cluster.


def test_each_layouts_function_is_a_dataset_of_raw_rows(tmp_path: Path, saved: dict[str, Path], ray_cluster: None) -> None:
    lines = [f"{caption_of(number)}\t{url_of(number)}".encode() for number in range(9)]
    for number in range(9):
        download(tmp_path, number)
    put(tmp_path / "folder" / "a.jpg", picture(3))
    put(tmp_path / "folder" / "metadata.jsonl", _jsonl([{"file_name": "a.jpg", "text": caption_of(3)}]))
    made = [
        (sources.conceptual_captions(conceptual(tmp_path, lines), "train"), 9),
        (sources.coco(coco(tmp_path), "train"), 24),
        (sources.huggingface(hub_source(saved["disk"]), "train"), 40),
        (sources.image_folder(folder_source(tmp_path / "folder"), "train"), 1),
    ]
    for dataset, count in made:
        rows = dataset.take_all()
        assert len(rows) == count and set(rows[0]) == set(RAW_ROW)
        numbers = [number_of(row) for row in rows]
        assert numbers == sorted(numbers) and not reasons(rows)


def test_the_colors_of_neighbors_differ() -> None:
    for number in range(100):
        assert max(np.abs(np.subtract(color_of(number), color_of(number + 1)))) > 40
    assert Image.open(io.BytesIO(picture(3))).format == "JPEG"
