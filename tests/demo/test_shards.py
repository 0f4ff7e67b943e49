"""Shards: read back by the webdataset library, reproducible to the byte, complete or refused."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import uuid

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from aptp_ray.demo.scenes import held_out, render, sample_scene
from aptp_ray.demo.shards import build_shards, plan_shards, shard_bytes, write_shard

SIZES = {"seed": 3, "train_images": 50, "validation_images": 30, "images_per_shard": 20}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    calls: list[tuple[int, int]] = []
    counts = build_shards(str(root), **SIZES, progress=lambda done, total: calls.append((done, total)))
    assert counts == {"train": 50, "validation": 30, "shards": 5, "skipped": 0}
    assert calls == [(done, 5) for done in range(1, 6)]
    return root


def _read(root, split: str) -> list[dict]:
    urls = sorted(str(path) for path in (root / split).glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_webdataset_reads_what_the_scenes_say(built, split):
    rows = _read(built, split)
    assert len(rows) == SIZES[f"{split}_images"]
    for index, row in enumerate(rows):
        record = json.loads(row["json"])
        scene = sample_scene(3, split, index)
        assert row["__key__"] == record["key"] == f"{index // 20:05d}{index % 20:04d}"
        image = Image.open(io.BytesIO(row["png"]))
        assert image.size == (record["width"], record["height"]) == (64, 64) and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), np.asarray(render(scene)))
        assert record["sha256"] == hashlib.sha256(row["png"]).hexdigest()
        assert record["caption"] == row["txt"].decode() and record["caption"] not in record["alternates"]
        assert len(record["alternates"]) == 2 and record["status"] == "success"
        assert record["subjects"] == [item.subject for item in scene.items]
        assert record["colors"] == [item.color for item in scene.items]
        facts = {"style": scene.style, "kind": scene.kind, "group": scene.group, "ground": scene.ground}
        assert {name: record[name] for name in facts} == facts
        assert record["held_out"] == held_out(scene)
        assert record["held_out"] is None or split == "validation"


def test_stats_count_what_the_tar_holds(built):
    counts = []
    for path in sorted((built / "train").glob("*_stats.json")):
        stats = json.loads(path.read_text())
        tar = path.with_name(path.name.replace("_stats.json", ".tar"))
        with tarfile.open(tar) as archive:
            members = archive.getmembers()
        assert stats["successes"] == stats["count"] == stats["status_dict"]["success"] == len(members) // 3
        assert stats["failed_to_download"] == stats["failed_to_resize"] == 0
        assert stats["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
        assert {member.mtime for member in members} == {0}
        counts.append(stats["successes"])
    assert counts == [20, 20, 10]


def test_the_same_bytes_on_every_run(built, tmp_path):
    build_shards(str(tmp_path), **SIZES)
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*")} for root in (built, tmp_path)
    )
    assert first == second and len(first) == 10


def test_another_process_and_order_give_the_same_bytes(built):
    # Sprite caches and hash randomisation must not reach the pixels.
    code = (
        "import hashlib, sys\n"
        "from aptp_ray.demo.shards import plan_shards, shard_bytes\n"
        f"spec = plan_shards(**{SIZES!r})[2]\n"
        "assert 'ray' not in sys.modules\n"
        "print(hashlib.sha256(shard_bytes(spec)).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert out == hashlib.sha256((built / "train" / "00002.tar").read_bytes()).hexdigest()


def test_shard_boundaries_do_not_change_the_images():
    whole, halves = plan_shards(**{**SIZES, "images_per_shard": 40})[0], plan_shards(**SIZES)[:2]

    def images(payload: bytes) -> list[bytes]:
        with tarfile.open(fileobj=io.BytesIO(payload)) as archive:
            return [archive.extractfile(m).read() for m in archive if m.name.endswith(".png")]

    assert images(shard_bytes(whole)) == images(shard_bytes(halves[0])) + images(shard_bytes(halves[1]))


def test_complete_shards_are_skipped_and_lost_ones_written_again(built, tmp_path):
    root = str(tmp_path)
    build_shards(root, **SIZES)
    tar, stats = tmp_path / "train" / "00001.tar", tmp_path / "train" / "00000_stats.json"
    tar.unlink()
    # A shard whose stats never came was cut short, whatever its tar holds.
    stats.unlink()
    (tmp_path / "train" / "00000.tar").write_bytes(b"half")
    kept = (tmp_path / "train" / "00002.tar").stat().st_mtime_ns
    assert build_shards(root, **SIZES)["skipped"] == 3
    assert (tmp_path / "train" / "00002.tar").stat().st_mtime_ns == kept
    for name in ("00000.tar", "00001.tar"):
        assert (tmp_path / "train" / name).read_bytes() == (built / "train" / name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_data_set_in_the_same_place_is_refused(built):
    with pytest.raises(ValueError, match="another data set"):
        build_shards(str(built), **{**SIZES, "seed": 4})
    with pytest.raises(ValueError, match="train/00001.tar"):
        build_shards(str(built), **{**SIZES, "train_images": 20})


def test_any_fsspec_store():
    uri = f"memory://{uuid.uuid4().hex}"
    spec = plan_shards(**SIZES)[-1]
    assert write_shard(uri, spec) and not write_shard(uri, spec)
    fs, root = fsspec.core.url_to_fs(uri)
    assert sorted(path.rsplit("/", 1)[-1] for path in fs.find(root)) == ["00001.tar", "00001_stats.json"]
    assert fs.cat_file(f"{root}/validation/00001.tar") == shard_bytes(spec)


@pytest.mark.parametrize(
    "change", [{"images_per_shard": 0}, {"images_per_shard": 10001}, {"image_size": 8}, {"seed": -1}]
)
def test_bad_numbers_are_refused_before_work(change, tmp_path):
    with pytest.raises(ValueError, match=next(iter(change))):
        build_shards(str(tmp_path), **{**SIZES, **change})
    assert not list(tmp_path.iterdir())
