"""The same rows from any file system: local, in memory, and a real S3 server on loopback."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from moto.server import ThreadedMotoServer
from pictures import caption_of, good, members, number_of, picture, read, reasons, same, write_shard, write_tar

from aptp_ray import sections
from aptp_ray.config import ConfigError
from aptp_ray.data import access, sources
from aptp_ray.data.layout import Layout
from aptp_ray.data.schema import KEY, REASON, SHARD, UNREACHABLE

COUNT = 12


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Storage options of an S3 server with the bucket "images"."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {
        "key": "testing",
        "secret": "testing",
        "endpoint_url": f"http://{host}:{port}",
    }
    fsspec.filesystem("s3", **options).mkdir("images")
    yield options
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """An address to put files under, and its storage options."""
    if request.param == "s3":
        return f"s3://images/{tmp_path.name}", request.getfixturevalue("s3")
    return f"memory://{tmp_path.name}" if request.param == "memory" else f"file://{tmp_path}/store", {}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BACKOFF_SECONDS", 0.001)


def put(address: str, data: bytes, options: dict[str, Any]) -> None:
    fs, path = fsspec.core.url_to_fs(address, **options)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, data)


def opened(source: sections.Layout, options: dict[str, Any]) -> Layout:
    return sources.open_layout(source, "train", storage_options=options)


def shards_at(address: str) -> sections.WebDataset:
    return sections.WebDataset(kind="webdataset", train=address, validation=address)


def test_webdataset(tmp_path: Path, store: tuple[str, dict[str, Any]]) -> None:
    address, options = store
    for shard in range(3):
        made = write_shard(tmp_path / "made.tar", range(4 * shard, 4 * shard + 4))
        with tarfile.open(made) as archive:  # the second is cut within its second sample
            cut = archive.getmember("000000005.txt").offset if shard == 1 else None
        put(f"{address}/shards/{shard:05d}.tar", made.read_bytes()[:cut], options)
    reader = opened(shards_at(f"{address}/shards/{{00000..00003}}.tar"), options)
    rows = read(reader)
    assert [number_of(row) for row in rows if not row[REASON]] == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert [row[KEY] for row in rows if row[REASON]] == ["000000005", ""] and "shard is damaged" in rows[5][REASON]
    assert rows[-1][REASON].startswith(UNREACHABLE) and rows[-1][SHARD].endswith("00003.tar")
    globbed = opened(shards_at(f"{address}/shards/*.tar"), options)
    assert [unit.name for unit in globbed.units()] == [unit.name for unit in reader.units()][:3]
    assert all(unit.version for unit in globbed.units())
    same(read(globbed), rows[:-1])
    protocol = address.partition("://")[0]
    assert all(row[SHARD].startswith("/" if protocol == "file" else f"{protocol}://") for row in rows)
    with pytest.raises(ConfigError, match="no shard matches.*nosuch"):
        opened(shards_at(f"{address}/nosuch/*.tar"), options).units()


def test_conceptual_captions(store: tuple[str, dict[str, Any]]) -> None:
    address, options = store
    lines = [f"{caption_of(number)}\thttps://example.com/{number}".encode() for number in range(COUNT)]
    put(f"{address}/cc/train.tsv", b"\n".join(lines), options)
    for number in range(COUNT):
        if number != 5:
            put(f"{address}/cc/train/{number}_{zlib.crc32(lines[number])}", picture(number), options)
    part = {"tsv": f"{address}/cc/train.tsv", "images": f"{address}/cc/train"}
    rows = read(opened(sections.ConceptualCaptions(kind="conceptual_captions", train=part, validation=part), options))
    assert [row[KEY] for row in rows] == [str(number) for number in range(COUNT)]
    assert reasons(rows) == {"5": "image is missing"}


def test_coco(store: tuple[str, dict[str, Any]]) -> None:
    address, options = store
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(COUNT)]
    notes = [{"id": number, "image_id": number, "caption": caption_of(number)} for number in range(COUNT)]
    put(f"{address}/coco/captions.json", json.dumps({"images": images, "annotations": notes}).encode(), options)
    for number in range(COUNT - 1):
        put(f"{address}/coco/train2017/{number:012d}.jpg", picture(number), options)
    part = {"annotations": f"{address}/coco/captions.json", "images": f"{address}/coco/train2017"}
    rows = read(opened(sections.Coco(kind="coco", train=part, validation=part), options))
    assert len(good(rows)) == COUNT - 1 and reasons(rows) == {"11_11": "image is missing"}


def test_image_folder(store: tuple[str, dict[str, Any]]) -> None:
    address, options = store
    names = [f"{'a/' if number % 2 else ''}{number}.png" for number in range(COUNT)]
    for number, name in enumerate(names):
        put(f"{address}/folder/{name}", picture(number, "png"), options)
    table = [{"file_name": name, "text": caption_of(number)} for number, name in enumerate(names)]
    put(f"{address}/folder/metadata.jsonl", "\n".join(map(json.dumps, table)).encode(), options)
    source = sections.ImageFolder(kind="image_folder", train=f"{address}/folder", validation="nowhere")
    assert good(read(opened(source, options))) == names


def test_huggingface_parquet(tmp_path: Path, store: tuple[str, dict[str, Any]]) -> None:
    address, options = store
    columns = {"image": [{"bytes": picture(number), "path": None} for number in range(COUNT)]}
    columns["text"] = [caption_of(number) for number in range(COUNT)]
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet", batch_size=5)
    put(f"{address}/hf/train-00000.parquet", (tmp_path / "a.parquet").read_bytes(), options)
    part = {"path": f"{address}/hf/*.parquet", "split": "train[2:]"}
    reader = opened(sections.HuggingFace(kind="huggingface", train=part, validation=part), options)
    assert [number_of(row) for row in read(reader)] == list(range(2, COUNT))


def test_tasks_read_from_s3_with_the_options_of_the_config(tmp_path: Path, s3: dict[str, Any], ray_cluster: None) -> None:
    put("s3://images/tasks/0.tar", write_shard(tmp_path / "0.tar", range(4)).read_bytes(), s3)
    source = sections.WebDataset(kind="webdataset", train="s3://images/tasks/*.tar", validation="none", storage_options=s3)
    assert [number_of(row) for row in sources.webdataset(source, "train").take_all()] == list(range(4))


def test_a_server_that_is_gone_is_an_error_at_once_and_later_a_unit_out_of_reach(tmp_path: Path, s3: dict[str, Any]) -> None:
    put("s3://images/gone/0.tar", write_tar(tmp_path / "0.tar", members(0)).read_bytes(), s3)
    reader = opened(shards_at("s3://images/gone/0.tar"), s3)
    (unit,) = reader.units()
    config = {"connect_timeout": 1, "retries": {"max_attempts": 0}}
    nobody = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": config}  # the discard port
    dead = opened(shards_at("s3://images/gone/0.tar"), s3 | nobody)
    with pytest.raises(ConfigError, match="cannot look for 's3://images/gone/0.tar'.*storage_options"):
        dead.units()
    (row,) = dead.read(unit)
    assert row[REASON].startswith(UNREACHABLE) and row[KEY] == ""
    (alive,) = reader.read(unit)
    assert not alive[REASON]
