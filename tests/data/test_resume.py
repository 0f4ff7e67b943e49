"""Killed at any point, the same call goes on: what is done is not done again, and no row is lost or there twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import resume_driver
from material import RESOLUTION, encode, png, write_tar
from resume_driver import Deadly, Slow, children

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.data.encoded import ENCODED_SCHEMA, count_rows, read_encoding, read_index, read_table
from aptp_ray.data.ledger import Ledger
from aptp_ray.data.schema import KEY

SHARDS, SAMPLES = 10, 9  # eight rows a file: two files a shard
TRAIN = ("encoded", "train")
ray.cloudpickle.register_pickle_by_value(resume_driver)  # Ray's workers do not find tests


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("many")
    draws = np.random.default_rng(0)
    for shard in range(SHARDS):
        members = []
        for number in range(SAMPLES):
            key = f"{shard}-{number}"
            pixels = draws.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
            image = b"" if (shard, number) == (2, 4) else png(pixels)
            members += [(f"{key}.png", image), (f"{key}.txt", f"thing {key}".encode())]
        write_tar(folder / f"{shard:03d}.tar", members)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def undisturbed(pattern: str, pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> RunDir:
    run = RunDir(str(tmp_path_factory.mktemp("undisturbed")))
    encode(pattern, run, pipeline_dir, actors=2)
    return run


def same(found: RunDir, expected: RunDir) -> None:
    """All columns of all rows, and the files that hold them."""
    assert read_index(found, *TRAIN) == read_index(expected, *TRAIN)
    columns = ENCODED_SCHEMA.names
    assert read_table(found, *TRAIN, columns=columns).equals(read_table(expected, *TRAIN, columns=columns))
    assert found.read_bytes("encoded", "rejected.parquet") == expected.read_bytes("encoded", "rejected.parquet")
    assert read_encoding(found, *TRAIN) == read_encoding(expected, *TRAIN)
    assert found.read_json("encoded", "encoding.json")["splits"] == expected.read_json("encoded", "encoding.json")["splits"]
    named = {name for name, _ in read_index(found, *TRAIN)}
    assert {path.rsplit("/", 1)[-1] for path in found.fs.glob(found.path(*TRAIN, "part-*"))} == named


def entries(run: RunDir) -> dict[str, int]:
    """When each unit was done."""
    return {path.stem: path.stat().st_mtime_ns for path in Path(run.path(*TRAIN, "_units")).glob("0*.json")}


def kill_with_children(driver: subprocess.Popen[bytes]) -> None:
    """Kills -9 the driver first, and then what it started: its own Ray."""
    family, generation = [driver.pid], [driver.pid]
    while generation:
        generation = [child for parent in generation for child in children(parent)]
        family += generation
    for process in family:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    driver.wait()


def test_a_killed_driver_loses_and_doubles_nothing(
    undisturbed: RunDir, pattern: str, pipeline_dir: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    run = RunDir(str(tmp_path / "run"))
    paths = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(Path(__file__).with_name("resume_driver.py")), pattern, run.uri, str(pipeline_dir), str(marks)]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while len(entries(run)) < SHARDS // 2:
                assert driver.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
        finally:
            kill_with_children(driver)
    before = entries(run)
    assert SHARDS // 2 <= len(before) < SHARDS
    with pytest.raises(RunDirError):
        read_encoding(run, *TRAIN)
    for mark in marks.iterdir():
        mark.unlink()
    encode(Slow(pattern, str(marks)), run, pipeline_dir, actors=1)
    same(run, undisturbed)
    after = entries(run)
    assert len(after) == SHARDS and {name: after[name] for name in before} == before
    read_again = {int(mark.name.split("-")[0]) for mark in marks.iterdir()}
    assert read_again == set(range(SHARDS)) - {int(name) for name in before}


@pytest.mark.slow  # a minute where the machine is slow
def test_an_encoder_that_is_killed_is_started_again(
    undisturbed: RunDir, pattern: str, pipeline_dir: Path, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    run = RunDir(str(tmp_path / "run"))
    encode(Deadly(pattern, str(marks), "004"), run, pipeline_dir, actors=2)
    assert list(marks.iterdir())  # some were killed
    same(run, undisturbed)


def test_what_a_kill_can_leave_behind_is_swept(undisturbed: RunDir, pattern: str, pipeline_dir: Path, tmp_path: Path) -> None:
    run, marks = RunDir(str(tmp_path / "run")), tmp_path / "marks"
    run.fs.copy(undisturbed.path("encoded"), run.path("encoded"), recursive=True)
    marks.mkdir()
    folder = Path(run.path(*TRAIN))
    (folder / "_units" / "000003.json").unlink()  # its files are there, its entry was not written
    (folder / "_units" / "000007.json").write_text('{"unit": 7, "na')  # a host that went down
    next(folder.glob("part-000005-000000*")).unlink()  # an entry without one of its files
    (folder / "part-000003-000004.parquet").write_bytes(b"of other chunks")
    (folder / "part-000001-000000.parquet.1234.tmp").write_bytes(b"half")
    (folder / "_units" / "000001.json.1234.tmp").write_bytes(b"half")
    encode(Slow(pattern, str(marks)), run, pipeline_dir)
    assert sorted(mark.name[:3] for mark in marks.iterdir()) == ["003", "005", "007"]
    same(run, undisturbed)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_changed_shard_and_other_encoders_are_done_again(
    undisturbed: RunDir, pattern: str, pipeline_dir: Path, tmp_path: Path
) -> None:
    run, marks, folder = RunDir(str(tmp_path / "run")), tmp_path / "marks", Path(pattern).parent
    run.fs.copy(undisturbed.path("encoded"), run.path("encoded"), recursive=True)
    marks.mkdir()
    shard = folder / "006.tar"
    old = shard.stat()
    try:
        os.utime(shard, ns=(old.st_atime_ns, old.st_mtime_ns + 10**9))
        encode(Slow(pattern, str(marks)), run, pipeline_dir)
        assert [mark.name[:3] for mark in marks.iterdir()] == ["006"]
        table = read_table(run, *TRAIN, columns=ENCODED_SCHEMA.names)
        assert table.equals(read_table(undisturbed, *TRAIN, columns=ENCODED_SCHEMA.names))
    finally:
        os.utime(shard, ns=(old.st_atime_ns, old.st_mtime_ns))
    one = f"{folder}/00[01].tar"
    encode(Slow(one, str(marks)), run, pipeline_dir)  # fewer shards: the others' rows go
    assert count_rows(run, *TRAIN) == 2 * SAMPLES and sorted(entries(run)) == ["000000", "000001"]
    assert len(list(marks.iterdir())) == 1  # nothing was read
    encode(Slow(one, str(marks)), run, pipeline_dir, text="tokens")
    assert len(list(marks.iterdir())) == 3 and "text_tokens" in read_table(run, *TRAIN, columns=["text_tokens"]).column_names


def test_entries_that_something_else_made_are_forgotten(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    ledger = Ledger(run, TRAIN)
    assert ledger.begin({"shape": (1, 2)}) == {}
    ledger.write("000001", {"a": "é"})
    assert Ledger(run, TRAIN).begin({"shape": [1, 2]}) == {"000001": {"a": "é"}}
    assert Ledger(run, TRAIN).begin({"shape": [1, 3]}) == {} == ledger.begin({"shape": [1, 3]})
    ledger.write("000002", {})
    ledger.remove("000002")
    ledger.remove("000002")
    assert ledger.begin({"shape": [1, 3]}) == {}


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, dict[str, Any]]]:
    """A bucket on a real S3 server, on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
        import s3fs

        s3fs.S3FileSystem(**options).mkdir("encoded-rows")
        yield "s3://encoded-rows", options
    finally:
        server.stop()


@pytest.mark.slow  # a store, and three runs
def test_a_run_directory_on_s3_holds_the_same_rows_and_goes_on(
    undisturbed: RunDir, pattern: str, pipeline_dir: Path, tmp_path: Path, bucket: tuple[str, dict[str, Any]]
) -> None:
    address, options = bucket
    run, marks = RunDir(f"{address}/run", options), tmp_path / "marks"
    marks.mkdir()
    few = f"{Path(pattern).parent}/00[0-3].tar"
    encode(Slow(few, str(marks)), run, pipeline_dir)
    count = count_rows(run, *TRAIN)
    assert count == 4 * SAMPLES - 1
    expected = read_table(undisturbed, *TRAIN, columns=ENCODED_SCHEMA.names).slice(0, count)
    assert read_table(run, *TRAIN, columns=ENCODED_SCHEMA.names).equals(expected)
    run.remove(*TRAIN, "_units", "000002.json")
    run.write_bytes(b"stray", *TRAIN, "part-000002-000003.parquet")
    encode(Slow(few, str(marks)), run, pipeline_dir)
    assert sorted(mark.name[:3] for mark in marks.iterdir()) == ["000", "001", "002", "002", "003"]
    assert pa.compute.all(pa.compute.equal(read_table(run, *TRAIN, columns=[KEY])[KEY], expected[KEY])).as_py()
    assert not run.exists(*TRAIN, "part-000002-000003.parquet")
    assert json.loads(run.read_bytes("encoded", "encoding.json"))["splits"]["train"]["rows"] == count
