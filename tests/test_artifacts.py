"""The run directory: atomic writes, stages that are refused or redone, sources that are found, on disk and in memory."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from aptp_ray import artifacts
from aptp_ray.artifacts import RunDir, RunDirError, fetch, load_run, open_run, resolve_source
from aptp_ray.config import STAGES, Config, ConfigError, parse_config, stage_hash


def make_config(**changes: object) -> Config:
    data = {"source": {"kind": "webdataset", "train": "a.tar", "validation": "b.tar"}}
    return parse_config({"run_dir": "unused", "data": data, "teacher": {"source": "somewhere"}} | changes)


A, B = make_config(), make_config(prune={"budget": 0.5})


@pytest.fixture(params=["local", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunDir]:
    if request.param == "local":
        yield RunDir(str(tmp_path / "run"))
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield RunDir(uri)
    fsspec.filesystem("memory").rm(uri, recursive=True) if fsspec.filesystem("memory").exists(uri) else None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(run: RunDir) -> dict[str, bytes]:
    """All that the run directory holds, hidden and temporary files included."""
    return {name: run.fs.cat_file(name) for name in run.fs.find(run.root)} if run.exists() else {}


# -- files ---------------------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_and_replaced(run: RunDir) -> None:
    run.write_bytes(b"old", "a", "b.bin")
    run.write_bytes(b"new", "a", "b.bin")
    run.write_json({"x": [1, 2]}, "a", "c.json")
    assert run.read_bytes("a", "b.bin") == b"new" and run.read_json("a", "c.json") == {"x": [1, 2]}
    assert set(content(run)) == {run.path("a", "b.bin"), run.path("a", "c.json")}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(str(tmp_path / "run"))
    run.write_bytes(b"old", "a.bin")
    write = type(run.fs).pipe_file

    def half(self: object, path: str, value: bytes, **options: object) -> None:
        write(self, path, value[: len(value) // 2])  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(run.fs), "pipe_file", half)
    with pytest.raises(OSError, match="No space"):
        run.write_bytes(b"new content", "a.bin")
    assert content(run) == {run.path("a.bin"): b"old"}


def test_what_is_missing_or_broken_is_named(run: RunDir) -> None:
    with pytest.raises(RunDirError, match=r"routing\.json is not there"):
        run.read_json("routing.json")
    run.write_bytes(b"{", "routing.json")
    with pytest.raises(RunDirError, match=r"routing\.json is not JSON"):
        run.read_json("routing.json")
    with pytest.raises(RunDirError, match="teacher is not there"):
        run.local("teacher")


def test_remove_spares_the_run_directory_itself(run: RunDir) -> None:
    run.write_bytes(b"1", "a", "b")
    run.remove("none")
    with pytest.raises(ValueError, match="never removed"):
        run.remove()
    run.remove("a")
    assert content(run) == {}


# -- folders -------------------------------------------------------------------------------------------------------------------


def test_writing_replaces_a_folder_whole(run: RunDir) -> None:
    for name in ("old", "new"):
        with run.writing("experts", "0") as folder:
            assert list(folder.iterdir()) == []
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
            (folder / "both").write_text(name)
    assert content(run) == {run.path("experts", "0", "sub", "new"): b"new", run.path("experts", "0", "both"): b"new"}


def test_a_reader_sees_the_old_folder_until_the_block_ends(run: RunDir) -> None:
    with run.writing("teacher") as folder:
        (folder / "v").write_text("old")
    with run.writing("teacher") as folder:
        (folder / "v").write_text("new")
        assert run.read_bytes("teacher", "v") == b"old"
    assert run.read_bytes("teacher", "v") == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_folder_and_nothing_else(run: RunDir, error: type[BaseException]) -> None:
    with run.writing("teacher") as folder:
        (folder / "v").write_text("old")
    before = content(run)
    with pytest.raises(error), run.writing("teacher") as folder:
        (folder / "v").write_text("half")
        raise error
    assert content(run) == before


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(str(tmp_path / "run"))
    with run.writing("teacher") as folder:
        (folder / "v").write_text("old")
    before, replace, calls = content(run), os.replace, []

    def fail_once_the_old_is_aside(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(artifacts.os, "replace", fail_once_the_old_is_aside)
    with pytest.raises(OSError, match="Input/output"), run.writing("teacher") as folder:
        (folder / "v").write_text("new")
    assert content(run) == before


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    left = tmp_path / "run" / ".teacher.dead.tmp"
    left.mkdir(parents=True)
    (left / "v").write_text("half")
    with run.writing("teacher") as folder:
        (folder / "v").write_text("new")
    assert content(run) == {run.path("teacher", "v"): b"new"}


# -- stages --------------------------------------------------------------------------------------------------------------------


def test_a_stage_is_done_once_it_is_finished(run: RunDir) -> None:
    assert run.manifest() == {"stages": {}} and not run.is_done(A, "teacher")
    run.prepare(A, "teacher")
    assert not run.is_done(A, "teacher")
    entry = run.finish(A, "teacher", parameters=7)
    assert entry["parameters"] == 7 and entry["config_hash"] == stage_hash(A, "teacher") and entry["versions"]["torch"]
    assert run.is_done(A, "teacher") and not run.is_done(A, "encode")
    assert not run.is_done(A, "teacher", overwrite=True)
    assert run.manifest()["stages"]["teacher"] == entry
    assert open_run(make_config(run_dir=run.uri)).is_done(A, "teacher")


def finished(run: RunDir, config: Config, *stages: str) -> None:
    for stage in stages:
        run.prepare(config, stage)
        run.finish(config, stage)


def test_a_finished_stage_refuses_another_config_and_harms_nothing(run: RunDir) -> None:
    finished(run, A, "teacher", "encode", "prune")
    before = content(run)
    assert run.is_done(B, "encode")  # the budget changes nothing before prune
    with pytest.raises(RunDirError, match=r"stage 'prune' .* another config .*--overwrite") as error:
        run.is_done(B, "prune")
    assert "\n" not in str(error.value) and run.uri in str(error.value)
    assert content(run) == before


def test_a_stage_on_top_of_another_configs_stages_is_refused(run: RunDir) -> None:
    """assign has not run yet, but the router that it would use is of another budget."""
    finished(run, A, "teacher", "encode", "prune")
    before = content(run)
    with pytest.raises(RunDirError, match="stage 'prune'"):
        run.is_done(B, "assign")
    with pytest.raises(RunDirError, match="stage 'prune'"):  # --overwrite remakes assign, not what it is made from
        run.prepare(B, "assign", overwrite=True)
    assert content(run) == before


def test_a_stage_on_top_of_a_stage_that_is_missing_is_refused(run: RunDir) -> None:
    finished(run, A, "teacher")
    before = content(run)
    assert run.missing_before("assign") == ["encode", "prune"] and run.missing_before("encode") == []
    with pytest.raises(RunDirError, match=r"stage 'encode' makes.*jobs/encode\.py") as error:
        run.prepare(A, "assign")
    assert "\n" not in str(error.value) and content(run) == before


def test_a_stage_that_was_begun_with_another_config_is_refused(run: RunDir) -> None:
    finished(run, A, "teacher", "encode")
    run.prepare(A, "prune")
    run.write_bytes(b"weights", "train", "prune", "checkpoint_1", "state.safetensors")
    before = content(run)
    assert not run.is_done(A, "prune")  # goes on from its checkpoint
    with pytest.raises(RunDirError, match="stage 'prune' .* begun with another config"):
        run.is_done(B, "prune")
    assert content(run) == before


def test_overwriting_forgets_a_stage_and_what_was_made_from_it(run: RunDir) -> None:
    finished(run, A, "teacher", "encode", "prune", "assign", "finetune")
    for name in ("prune", "teacher-unet", "expert-0"):
        run.write_bytes(b"1", "train", name, "checkpoint_1", "state.safetensors")
    assert not run.is_done(B, "prune", overwrite=True)
    run.prepare(B, "prune", overwrite=True)
    assert not run.exists("train", "prune", "checkpoint_1") and not run.exists("train", "expert-0", "checkpoint_1")
    assert run.exists("train", "teacher-unet", "checkpoint_1", "state.safetensors")
    assert not run.is_done(B, "prune"), "killed while it is remade, it is not done"
    run.finish(B, "prune")
    assert run.is_done(B, "prune") and run.is_done(B, "encode")
    # Experts of the codes before are not experts of these.
    assert not run.is_done(B, "assign") and not run.is_done(B, "finetune")


def test_going_on_keeps_the_checkpoints(run: RunDir) -> None:
    finished(run, A, "teacher", "encode")
    for _ in range(2):
        run.prepare(A, "prune")
        run.write_bytes(b"1", "train", "prune", "state")
        assert run.read_bytes("train", "prune", "state") == b"1"


def test_the_config_comes_back_equal(run: RunDir) -> None:
    run.prepare(B)
    found, config = load_run(run.uri)
    assert config == B and found.uri == run.uri
    with pytest.raises(RunDirError, match=r"holds no config\.yaml"):
        load_run(run.uri + "/elsewhere")


def test_a_changed_prompt_encoder_never_meets_old_embeddings(run: RunDir) -> None:
    finished(run, A, "teacher", "encode")
    other = make_config(router={"prompt_encoder": "some/other"})
    assert run.is_done(other, "teacher")
    with pytest.raises(RunDirError, match="stage 'encode' .* another config"):
        run.is_done(other, "prune")


def test_secrets_are_not_kept_and_asked_for_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"secret": "hunter2", "listings_expiry_time": 60}
    shards = {"source": A.data.source.model_dump() | {"storage_options": {"token": "hunter3"}}}
    config = make_config(run_dir=run.uri, storage_options=options, data=shards)
    run.prepare(config, "teacher")
    run.finish(config, "teacher")
    assert not [name for name, data in content(run).items() if b"hunter" in data]

    _, served = load_run(run.uri, {"listings_expiry_time": 60})  # what opens the directory opens it again
    assert served.storage_options == {"listings_expiry_time": 60} and run.is_done(served, "teacher")
    again = run.config()
    with pytest.raises(ConfigError, match=r"storage_options\.secret .* APTP_STORAGE_OPTIONS_SECRET is not set") as error:
        open_run(again)
    assert "\n" not in str(error.value) and "storage_options.secret=..." in str(error.value)
    with pytest.raises(ConfigError, match=r"data\.source\.storage_options\.token"):
        again.source_options()
    monkeypatch.setenv("APTP_STORAGE_OPTIONS_SECRET", "hunter2")
    monkeypatch.setenv("APTP_DATA_SOURCE_STORAGE_OPTIONS_TOKEN", "hunter3")
    assert again.source_options() == {"token": "hunter3"}
    assert artifacts.revealed(again.storage_options) == options


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirError, match="cannot write the run directory") as error:
        RunDir(str(tmp_path / "file" / "run")).prepare(A)
    assert "run_dir" in str(error.value) and "\n" not in str(error.value)


def test_unfinished_work_is_named_by_stage() -> None:
    assert set(artifacts._PROGRESS) <= set(STAGES)


def test_listings_of_shared_storage_are_never_cached() -> None:
    """Another process's files would stay unseen until the cache ends."""
    assert RunDir(f"memory://{uuid.uuid4().hex}").fs.dircache.use_listings_cache is False


def test_a_run_directory_can_be_moved(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"))
    finished(run, A, "teacher")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert RunDir(str(tmp_path / "moved")).is_done(A, "teacher")
    assert str(tmp_path) not in json.dumps(RunDir(str(tmp_path / "moved")).manifest())


# -- sources -------------------------------------------------------------------------------------------------------------------


def test_local_gives_the_content(run: RunDir, cache: Path) -> None:
    run.write_bytes(b"1", "teacher", "unet", "config.json")
    assert Path(run.local("teacher"), "unet", "config.json").read_bytes() == b"1"


def test_a_remote_folder_is_fetched_once_a_version(cache: Path) -> None:
    uri = f"memory://{uuid.uuid4().hex}/m"
    fs = fsspec.filesystem("memory")
    fs.pipe({f"{uri}/a/x.bin": b"one", f"{uri}/y.bin": b"two"})
    first = fetch(uri)
    assert Path(first, "a", "x.bin").read_bytes() == b"one" and Path(first, "y.bin").read_bytes() == b"two"
    Path(first, "mark").touch()
    assert fetch(uri) == first and Path(first, "mark").exists()
    fs.pipe_file(f"{uri}/a/x.bin", b"six")  # the same size
    second = fetch(uri)
    assert second != first and Path(second, "a", "x.bin").read_bytes() == b"six"
    assert {p.name for p in cache.iterdir()} == {Path(first).name, Path(second).name}


def test_an_empty_remote_folder_is_refused(cache: Path) -> None:
    with pytest.raises(RunDirError, match="empty or not there"):
        fetch(f"memory://{uuid.uuid4().hex}/none")


def test_sources_are_resolved(cache: Path, tmp_path: Path) -> None:
    assert resolve_source("some-org/some-model") == "some-org/some-model"
    assert resolve_source(str(tmp_path)) == str(tmp_path)
    assert Path(resolve_source("package:aptp_ray/demo")) == Path(artifacts.__file__).parent / "demo"
    uri = f"memory://{uuid.uuid4().hex}/m"
    fsspec.filesystem("memory").pipe_file(f"{uri}/config.json", b"{}")
    assert Path(resolve_source(uri), "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("package:no_such_package_xyz/model", "not installed"),
        ("package:aptp_ray/no/such/folder", "not a folder"),
        ("package:aptp_ray/config.py", "not a folder"),
        ("package:this.is.nothing/x", "not installed"),
        ("package:fractions/x", "no package"),  # a module, which holds no folders
        ("package:", "no package"),
    ],
)
def test_a_package_source_that_is_not_there_is_refused(source: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        resolve_source(source)
    assert "\n" not in str(error.value) and source in str(error.value)
