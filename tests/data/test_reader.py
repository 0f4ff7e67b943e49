"""The reader against the rows that were written: by number, in any order, some columns, over any store, in bounded memory."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from material import MINILM, RESOLUTION

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.data.encoder import Encoder, EncoderSpec, describe
from aptp_ray.data.layout import Unit, usable
from aptp_ray.data.reader import EncodedReader, ahead
from aptp_ray.data.rows import Framing, cropped_table, framed
from aptp_ray.data.schema import CAPTION, EMBEDDING, KEY, LATENT_MEAN, REASON, TEXT_LENGTH, TEXT_STATES
from aptp_ray.encoding import Encoding
from aptp_ray.train.draws import decode_encoded, training_columns
from aptp_ray.train.feed import first_rows
from aptp_ray.train.teacher import first_images
from aptp_ray.train.worker import text_states_of

PARTS = ("encoded", "train")
ROWS, PER_FILE, PER_GROUP = 50, 20, 8
COLUMNS = (KEY, LATENT_MEAN, EMBEDDING, TEXT_LENGTH)


def content(number: int) -> dict[str, Any]:
    """A row that names its own number in every column."""
    return {
        KEY: f"key {number}",
        CAPTION: "x" * number,
        LATENT_MEAN: np.full(6, number, dtype="<f2").tobytes(),
        TEXT_STATES: np.full(10, number, dtype="<f2").tobytes(),
        TEXT_LENGTH: number % 7,
        EMBEDDING: [float(number), -float(number)],
    }


SCHEMA = pa.schema(
    [
        (KEY, pa.string()),
        (CAPTION, pa.string()),
        (LATENT_MEAN, pa.binary()),
        (TEXT_STATES, pa.binary()),
        (TEXT_LENGTH, pa.int32()),
        (EMBEDDING, pa.list_(pa.float32())),
    ]
)


def write(run: RunDir, rows: list[dict[str, Any]], *, per_file: int = PER_FILE, per_group: int = PER_GROUP) -> None:
    """Writes rows as encoding does: several row groups a file, several files, an index that names them last."""
    index = []
    for number, begin in enumerate(range(0, len(rows), per_file)):
        table = pa.Table.from_pylist(rows[begin : begin + per_file], schema=SCHEMA)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=per_group, compression="NONE")
        name = f"part-{number:06d}-000000.parquet"
        run.write_bytes(buffer.getvalue().to_pybytes(), *PARTS, name)
        index.append([name, len(table)])
    run.write_json({"files": index}, *PARTS, "index.json")


@pytest.fixture(params=["file", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunDir]:
    made = RunDir(str(tmp_path) if request.param == "file" else f"memory://{tmp_path.name}/run")
    write(made, [content(number) for number in range(ROWS)])
    yield made
    made.remove("encoded")


def check(rows: dict[str, np.ndarray], numbers: list[int]) -> None:
    assert rows[KEY].tolist() == [f"key {number}" for number in numbers]
    assert rows[LATENT_MEAN].dtype == np.uint8 and rows[LATENT_MEAN].shape == (len(numbers), 12)
    assert (rows[LATENT_MEAN].view("<f2") == np.array(numbers)[:, None]).all()
    assert rows[EMBEDDING].dtype == np.float32
    assert rows[EMBEDDING].tolist() == [[number, -number] for number in numbers]
    assert rows[TEXT_LENGTH].tolist() == [number % 7 for number in numbers]


def test_rows_come_by_number_whatever_the_files_and_groups(run: RunDir) -> None:
    reader = EncodedReader.open(run, *PARTS, columns=COLUMNS)
    assert reader.num_rows == ROWS and list(reader.groups) == [8, 8, 4, 8, 8, 4, 8, 2]
    requests = [[(0, 50)], [(3, 4)], [(19, 21)], [(30, 33), (0, 2), (5, 7), (48, 50)], [(8, 16)], [(7, 17)]]
    for ranges, rows in zip(requests, reader.stream(requests), strict=True):
        assert set(rows) == set(COLUMNS)
        check(rows, [number for begin, end in ranges for number in range(begin, end)])


def test_it_travels_to_another_process_without_showing_secrets(run: RunDir) -> None:
    run.storage_options = {"secret": "hunter2"}
    reader = EncodedReader.open(run, *PARTS, columns=COLUMNS)
    assert "hunter2" not in str({"rows": reader}) and run.address(*PARTS) in repr(reader)
    again = pickle.loads(pickle.dumps(reader))
    check(next(again.stream([[(41, 44)]])), [41, 42, 43])


def test_only_the_columns_asked_for_are_fetched(tmp_path: Path) -> None:
    """Counts the bytes that are read from a file whose other column is a hundred times as large."""
    run = RunDir(f"memory://{tmp_path.name}/columns")
    rows = [content(number) | {TEXT_STATES: bytes(100_000)} for number in range(16)]
    write(run, rows)
    reader = EncodedReader.open(run, *PARTS, columns=[LATENT_MEAN])
    read = 0
    opened = run.fs.open

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal read
        file = opened(*arguments, **options)
        inner = file.read

        def count(size: int = -1) -> bytes:
            nonlocal read
            data = inner(size)
            read += len(data)
            return data

        file.read = count
        return file

    reader._run.fs.open = counting  # type: ignore[method-assign]
    try:
        next(reader.stream([[(0, 16)]]))
    finally:
        del reader._run.fs.open
        run.remove("encoded")
    assert 0 < read < 200_000  # the other column has 1,600,000 bytes; a footer read takes up to 64 kB


def test_a_few_rows_of_a_group_do_not_keep_all_of_it(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    write(run, [content(number) for number in range(16)])
    rows = next(EncodedReader.open(run, *PARTS, columns=[LATENT_MEAN]).stream([[(2, 4)]]))
    column = rows[LATENT_MEAN]
    owner = column if column.base is None else column.base
    assert isinstance(owner, np.ndarray) and owner.nbytes == 24


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("unfinished", "has the stage that writes it run"),
        ("gone", "is gone: make the stage again"),
        ("shorter", "holds 20 rows, index.json says 21"),
        ("column", "has no column nonsense"),
    ],
)
def test_what_does_not_fit_the_index_is_refused_at_once(run: RunDir, damage: str, message: str) -> None:
    first = "part-000000-000000.parquet"
    if damage == "unfinished":
        run.remove(*PARTS, "index.json")
    if damage == "gone":
        run.remove(*PARTS, first)
    if damage == "shorter":
        run.write_json({"files": [[first, 21]]}, *PARTS, "index.json")
    with pytest.raises(RunDirError, match=message):
        EncodedReader.open(run, *PARTS, columns=["nonsense"] if damage == "column" else COLUMNS)


@pytest.mark.parametrize(
    ("value", "message"), [(b"short", "differ in length"), (None, "rows without a value")], ids=["length", "null"]
)
def test_tensors_that_do_not_fit_together_are_refused(tmp_path: Path, value: bytes | None, message: str) -> None:
    run = RunDir(str(tmp_path))
    write(run, [content(0), content(1) | {LATENT_MEAN: value}])
    reader = EncodedReader.open(run, *PARTS, columns=[LATENT_MEAN])
    with pytest.raises(RunDirError, match=message):
        next(reader.stream([[(0, 2)]]))


def test_files_that_change_under_a_run_are_noticed(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    write(run, [content(number) for number in range(16)])
    reader = EncodedReader.open(run, *PARTS, columns=COLUMNS)
    write(run, [content(number) for number in range(7)])
    with pytest.raises(RunDirError, match="changed while it was being read"):
        next(reader.stream([[(0, 8)]]))


def test_reading_ahead_keeps_order_and_stops_at_its_bound() -> None:
    made, taken = [], []
    lock = threading.Lock()

    def make(number: int) -> int:
        time.sleep(0.02 if number % 3 == 0 else 0)
        with lock:
            made.append(number)
        return number

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    stream = ahead(make, items(), threads=2, most=4)
    assert [next(stream) for _ in range(10)] == list(range(10))
    time.sleep(0.2)
    assert len(taken) == 14 and sorted(made) == list(range(14))
    threads = threading.active_count()
    stream.close()
    assert threading.active_count() == threads - 2 and len(taken) == 14


def test_an_error_of_a_read_reaches_the_caller() -> None:
    def make(number: int) -> int:
        return 1 // (3 - number)

    stream = ahead(make, range(10), threads=2, most=2)
    with pytest.raises(ZeroDivisionError):
        list(stream)


@pytest.mark.parametrize("rows", [400, 4000])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, rows: int) -> None:
    """What pyarrow and numpy hold at once while all rows are read: a few requests' worth."""
    run = RunDir(str(tmp_path))
    tensor = bytes(8192)
    write(run, [content(number % 100) | {LATENT_MEAN: tensor} for number in range(rows)], per_file=200, per_group=32)
    reader = EncodedReader.open(run, *PARTS, columns=[LATENT_MEAN])
    gc.collect()
    before, most, seen = pa.total_allocated_bytes(), 0, 0
    for part in reader.stream([[(begin, begin + 40)] for begin in range(0, rows, 40)]):
        seen += len(part[LATENT_MEAN])
        most = max(most, pa.total_allocated_bytes() - before)
    assert seen == rows
    # Two threads at a request of two groups each, of 32 x 8 kB, and what decoding a page takes besides.
    assert most < 4 << 20


# -- what training makes of the rows -------------------------------------------------------------------------------------------

CAPTIONS = ["a cat", "a much longer caption that does not fit into twelve tokens at all, no", "a red apple", "a cat"]


def encode_captions(folder: Path, pipeline_dir: Path, text: str, precision: str) -> tuple[EncodedReader, Encoding]:
    """Runs the encoders on a few rows, in this process, and writes what they give."""
    spec, framing = EncoderSpec(str(pipeline_dir), MINILM, text=text, precision=precision), Framing(RESOLUTION)
    unit, rng = Unit(0, "shard"), np.random.default_rng(0)
    raw = [
        usable(unit, number, str(number), rng.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8), caption)
        for number, caption in enumerate(CAPTIONS)
    ]
    made = Encoder(spec)(cropped_table([row for item in raw for row in framed(item, framing)]))
    run, buffer = RunDir(str(folder)), pa.BufferOutputStream()
    pq.write_table(made.drop_columns([REASON]), buffer)
    run.write_bytes(buffer.getvalue().to_pybytes(), *PARTS, "part-000000-000000.parquet")
    run.write_json({"files": [["part-000000-000000.parquet", len(raw)]]}, *PARTS, "index.json")
    encoding = describe(spec, framing)
    return EncodedReader.open(run, *PARTS, columns=training_columns(encoding, embedding=True)), encoding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_made_of_tokens_are_those_that_would_have_been_stored(
    any_pipeline_dir: Path, tmp_path: Path, precision: str
) -> None:
    decoded = {}
    for text in ("states", "tokens"):
        reader, encoding = encode_captions(tmp_path / text, any_pipeline_dir, text, precision)
        assert (TEXT_STATES in reader.columns) == (text == "states")
        text_states = text_states_of(encoding, str(any_pipeline_dir), torch.device("cpu"))
        rows = first_rows(reader, 10)
        decoded[text] = decode_encoded(rows, encoding, text_states)
        # Rows that another process read come as objects where they went through Ray's store as bytes; they decode alike.
        objects = {name: objects_of(column) if column.dtype == np.uint8 else column for name, column in rows.items()}
        again = decode_encoded(objects, encoding, text_states)
        assert torch.equal(again["text_states"], decoded[text]["text_states"])
    stored, made = decoded["states"], decoded["tokens"]
    for name in ("mean", "std", "embedding"):
        assert stored[name].dtype == np.float32 and (stored[name] == made[name]).all()
    assert made["text_states"].dtype == torch.float32 and not made["text_states"].requires_grad
    # A half float, and the rounding of another batch: the two equal captions were encoded once there, twice here.
    tolerance = 2e-3 if precision == "fp32" else 2e-2
    torch.testing.assert_close(made["text_states"], stored["text_states"], rtol=tolerance, atol=tolerance)
    assert torch.equal(made["text_states"], made["text_states"].half().float())
    with pytest.raises(ValueError, match="takes the text encoder"):
        decode_encoded(rows, encoding)
    with pytest.raises(ValueError, match="encoding.json is not theirs"):
        decode_encoded(rows | {LATENT_MEAN: rows[LATENT_MEAN][:, 2:]}, encoding, text_states)


def objects_of(column: np.ndarray) -> np.ndarray:
    values = np.empty(len(column), dtype=object)
    values[:] = [row.tobytes() for row in column]
    return values


def test_images_of_a_teacher_made_here_come_as_squares(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)
    run, buffer = RunDir(str(tmp_path)), pa.BufferOutputStream()
    pq.write_table(pa.table({"image": pa.array([image.tobytes() for image in pixels], pa.binary())}), buffer)
    run.write_bytes(buffer.getvalue().to_pybytes(), *PARTS, "part-000000-000000.parquet")
    run.write_json({"files": [["part-000000-000000.parquet", 5]]}, *PARTS, "index.json")
    images = first_images(EncodedReader.open(run, *PARTS, columns=["image"]), 3)
    expected = pixels[:3].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    assert images.shape == (3, 3, 6, 6) and images.is_contiguous()
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
