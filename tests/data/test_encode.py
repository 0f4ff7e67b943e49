"""Encoded rows against diffusers and the sentence encoder, called directly."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from material import MINILM, RESOLUTION, TOKENS, Shards, caption_of, encode, write_tar
from PIL import Image

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source
from aptp_ray.config import ConfigError
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.data.encoded import (
    ENCODED_SCHEMA,
    LIGHT_SCHEMA,
    count_rows,
    encoded_schema,
    files_of,
    read_encoded,
    read_encoding,
    read_first,
    read_index,
    read_table,
)
from aptp_ray.data.encoder import PRECISION_TOLERANCE, ChunkEncoder, Encoder, EncoderSpec
from aptp_ray.data.rows import (
    CHUNK_SCHEMA,
    CROPPED_SCHEMA,
    REJECTED_ROWS,
    ROWS,
    Framing,
    chunk_rows,
    cropped_table,
    framed,
    pack_rows,
    unpack_rows,
)
from aptp_ray.data.schema import (
    ALTERNATES,
    CAPTION,
    EMBEDDING,
    GROUP,
    IMAGE,
    KEY,
    LATENT_MEAN,
    LATENT_STD,
    METADATA,
    POSITION,
    REASON,
    REJECTED,
    SHARD,
    TEXT_LENGTH,
    TEXT_STATES,
    TEXT_TOKENS,
    VIEW,
)
from aptp_ray.data.tar import WebDatasetLayout
from aptp_ray.encoding import unpack

# Half floats have 11 bits: 1/2048 relative, of values up to about 4.
HALF = {"rtol": 1e-3, "atol": 1e-3}


def _tar_samples(shards: Shards) -> int:
    """Samples by the names in the archives alone, and one more for the archive that was cut."""
    count = 0
    for path in sorted(shards.folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            count += len({name.split(".")[0] for name in archive.getnames()})
    return count + 1


def test_no_row_is_lost(run: RunDir, shards: Shards) -> None:
    counts = run.read_json("encoded", "encoding.json")["splits"]["train"]
    assert counts == {
        "rows_in": _tar_samples(shards), "rows": len(shards.keys), "rejected": len(shards.rejected), "views": 1,
    }  # fmt: skip
    assert counts["rows_in"] == counts["rows"] + counts["rejected"]


def test_rows_are_complete_ordered_and_of_the_contract(run: RunDir, shards: Shards) -> None:
    files = read_index(run, "encoded", "train")
    # Eight rows a file; a rejected row counts in the names, which give the first row of each file.
    assert [name for name, _ in files] == [
        "part-000000-000000.parquet",
        "part-000000-000011.parquet",
        "part-000001-000000.parquet",
        "part-000001-000009.parquet",
        "part-000002-000000.parquet",
    ]
    assert {path.name for path in Path(run.path("encoded", "train")).glob("*.parquet")} == {name for name, _ in files}
    assert [pq.read_metadata(path).num_rows for path in files_of(run, "encoded", "train")] == [rows for _, rows in files]
    assert pq.read_schema(files_of(run, "encoded", "train")[0]).names == ENCODED_SCHEMA.names
    rows = read_encoded(run, "encoded", "train", columns=[KEY, CAPTION]).take_all()
    assert [row[KEY] for row in rows] == shards.keys
    assert [row[CAPTION] for row in rows] == [caption_of(key) for key in shards.keys]
    assert count_rows(run, "encoded", "train") == len(shards.keys)


def test_the_first_rows_are_those_that_a_stream_begins_with(run: RunDir) -> None:
    stream = read_encoded(run, "encoded", "train", columns=[KEY, LATENT_MEAN]).iter_batches(batch_size=7, batch_format="numpy")
    expected = next(iter(stream))
    found = read_first(run, "encoded", "train", columns=[KEY, LATENT_MEAN], rows=7)
    assert list(found[KEY]) == list(expected[KEY]) and list(found[LATENT_MEAN]) == list(expected[LATENT_MEAN])
    everything = count_rows(run, "encoded", "train")
    assert len(read_first(run, "encoded", "train", columns=[KEY], rows=everything + 1)[KEY]) == everything


def test_rejected_rows_are_reported_with_reasons(run: RunDir, shards: Shards) -> None:
    table = pq.read_table(run.path("encoded", "rejected.parquet"))
    assert table.column_names == [*REJECTED, "split"]
    reasons = dict(zip(table[KEY].to_pylist(), table[REASON].to_pylist(), strict=True))
    assert reasons.keys() == shards.rejected.keys()
    assert all(word in reasons[key] for key, word in shards.rejected.items())


def test_tensors_are_what_the_models_give(run: RunDir, shards: Shards, pipeline_dir: Path) -> None:
    encoding = read_encoding(run, "encoded", "train")
    assert encoding.latent_shape == (4, RESOLUTION // 2, RESOLUTION // 2) and encoding.text_shape == (TOKENS, 16)
    table = read_table(run, "encoded", "train", columns=ENCODED_SCHEMA.names)
    vae = AutoencoderKL.from_pretrained(pipeline_dir / "vae")
    means = unpack(table[LATENT_MEAN].to_pylist(), encoding.latent_shape)
    stds = unpack(table[LATENT_STD].to_pylist(), encoding.latent_shape)
    for row, key in enumerate(shards.keys):
        if shards.pixels[key].shape[0] != RESOLUTION:  # the crop has a test of its own
            continue
        sample = torch.from_numpy(shards.pixels[key]).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(sample).latent_dist
        np.testing.assert_allclose(means[row], posterior.mean[0] * 0.7, **HALF)
        np.testing.assert_allclose(stds[row], posterior.std[0] * 0.7, **HALF)
    captions = table[CAPTION].to_pylist()
    expected = PromptEncoder.from_pretrained(resolve_source(MINILM)).encode(captions).numpy()
    np.testing.assert_allclose(np.stack(table[EMBEDDING].to_numpy()), expected, atol=1e-5)
    assert encoding.embedding_dim == expected.shape[1]


def _rows(images: list[np.ndarray], captions: list[str]) -> list[dict[str, Any]]:
    """Raw rows, as a layout gives them."""
    return [
        {
            KEY: str(number), SHARD: "a.tar", POSITION: number, IMAGE: image, CAPTION: caption, ALTERNATES: [], GROUP: "",
            METADATA: "", REASON: "",
        }
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]  # fmt: skip


def _cropped(rows: list[dict[str, Any]], resolution: int = RESOLUTION) -> pa.Table:
    return cropped_table([view for row in rows for view in framed(row, Framing(resolution))])


def test_text_states_are_the_pipelines_own(any_pipeline_dir: Path) -> None:
    captions = ["a cat", "a much longer caption that does not fit into twelve tokens at all, no", "a cat"]
    rows = _cropped(_rows([np.full((RESOLUTION, RESOLUTION, 3), 9, dtype=np.uint8)] * 3, captions))
    encoded = Encoder(EncoderSpec(str(any_pipeline_dir), MINILM))(rows)
    assert encoded.column_names == [*ENCODED_SCHEMA.names, REASON] and encoded[REASON].to_pylist() == [""] * 3
    tokens = Encoder(EncoderSpec(str(any_pipeline_dir), MINILM, text="tokens"))(rows)
    assert tokens.column_names == [*encoded_schema("tokens").names, REASON]
    pipeline = StableDiffusionPipeline.from_pretrained(any_pipeline_dir, safety_checker=None, requires_safety_checker=False)
    for index, caption in enumerate(captions):
        with torch.no_grad():
            expected = pipeline.encode_prompt(caption, "cpu", 1, False)[0][0]
        np.testing.assert_allclose(unpack([encoded[TEXT_STATES][index].as_py()], (TOKENS, 16))[0], expected, **HALF)
        ids = pipeline.tokenizer(caption, padding="max_length", max_length=TOKENS, truncation=True).input_ids
        assert unpack([tokens[TEXT_TOKENS][index].as_py()], (TOKENS,), "<i4")[0].tolist() == ids
    assert encoded[TEXT_LENGTH].to_pylist() == tokens[TEXT_LENGTH].to_pylist() == [4, TOKENS, 4]  # [CLS] a cat [SEP]
    assert tokens[LATENT_MEAN].equals(encoded[LATENT_MEAN]) and tokens[EMBEDDING].equals(encoded[EMBEDDING])
    with torch.no_grad():
        sample = torch.full((1, 3, RESOLUTION, RESOLUTION), 9 / 127.5 - 1)
        mean = pipeline.vae.encode(sample).latent_dist.mean[0]
    # The inverse of how diffusers' pipelines decode, shift included.
    shift = pipeline.vae.config.shift_factor or 0.0
    stored = unpack([encoded[LATENT_MEAN][0].as_py()], tuple(mean.shape))[0]
    np.testing.assert_allclose(stored / 0.7 + shift, mean, rtol=2e-3, atol=2e-3)


def test_half_precision_stays_within_its_stated_tolerance(tmp_path: Path, pipeline_dir: Path) -> None:
    """The demo's VAE and MiniLM, on pictures of the demo."""
    (tmp_path / "vae").symlink_to(resolve_source("package:aptp_ray/demo/weights/vae"))
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(resolve_source(MINILM))
    sheet = np.asarray(Image.open(Path(resolve_source("package:aptp_ray/demo/pictures")) / "teacher.png").convert("RGB"))
    corners = [(64 * i, 64 * j) for i in range(2) for j in range(3)]
    images = [np.ascontiguousarray(sheet[top : top + 64, left : left + 64]) for top, left in corners]
    captions = [f"{count} apples on a {color} ground" for count in ("two", "three") for color in ("red", "green", "blue")]
    rows = _cropped(_rows(images, captions), 64)
    made = {
        precision: Encoder(EncoderSpec(str(tmp_path), MINILM, max_tokens=24, precision=precision))(rows)
        for precision in ("fp32", "bf16", "fp16")
    }
    assert made["bf16"][EMBEDDING].equals(made["fp32"][EMBEDDING])  # z is always float32
    assert not made["bf16"][TEXT_STATES].equals(made["fp32"][TEXT_STATES])
    for precision in ("bf16", "fp16"):
        for column in (LATENT_MEAN, LATENT_STD, TEXT_STATES):
            stored = (b"".join(made[name][column].to_pylist()) for name in ("fp32", precision))
            exact, found = (np.frombuffer(item, "<f2").astype(float) for item in stored)
            error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
            assert error < PRECISION_TOLERANCE[precision], (precision, column, error)


def test_latents_that_are_not_finite_reject_all_views_of_their_row(pipeline_dir: Path) -> None:
    encoder = ChunkEncoder(EncoderSpec(str(pipeline_dir), MINILM), 4, False)
    bad = np.full((RESOLUTION, RESOLUTION, 3), 7, dtype=np.uint8)
    vae = encoder._encoder._vae
    plain = vae.encode
    vae.encode = lambda sample: plain(torch.where(sample == bad[0, 0, 0] / 127.5 - 1, torch.inf, sample))
    other = np.random.default_rng(0).integers(8, 256, bad.shape, dtype=np.uint8)
    rows = [view for row in _rows([other, bad, other], ["a", "b", "c"]) for view in framed(row, Framing(RESOLUTION), (0, 1))]
    rows[3][IMAGE] = other.tobytes()  # one of two views
    head: dict[str, Any] = {"unit": 0, "ordinal": 6, "number": 0, "last": True, "rows_in": 4, REJECTED_ROWS: '[[5, "x", "why"]]'}
    chunk = pa.Table.from_pylist([head | {ROWS: pack_rows(cropped_table(rows))}], schema=CHUNK_SCHEMA)
    made = encoder(chunk)
    kept = unpack_rows(made)
    assert list(zip(kept[KEY].to_pylist(), kept[VIEW].to_pylist(), strict=True)) == [("0", 0), ("0", 1), ("2", 0), ("2", 1)]
    assert made[REJECTED_ROWS][0].as_py() == (
        '[[5, "x", "why"], [6, "1", "latents are not finite: try encode.precision=fp32"]]'
    )


def test_a_square_is_the_center_and_fitting_images_are_left_alone(shards: Shards) -> None:
    wide = np.zeros((RESOLUTION * 2, RESOLUTION * 6, 3), dtype=np.uint8)
    wide[:, RESOLUTION * 2 : RESOLUTION * 4] = 180
    tall = np.random.default_rng(1).integers(0, 256, (40, RESOLUTION, 3), dtype=np.uint8)
    exact = shards.pixels["00001"]
    sliver = np.full((1, 3_000_000, 3), 77, dtype=np.uint8)  # resized whole, it would be 48 million pixels wide
    made = [Framing(RESOLUTION).frame(row) for row in _rows([wide, tall, exact, sliver], ["a", "b", "c", "d"])]
    middle = np.frombuffer(made[0], np.uint8).reshape(RESOLUTION, RESOLUTION, 3)[:, 2:-2]
    assert (np.abs(middle.astype(int) - 180) <= 1).all()
    top = (40 - RESOLUTION) // 2
    assert made[1] == tall[top : top + RESOLUTION].tobytes()
    assert made[2] == exact.tobytes()
    assert set(made[3]) == {77} and len(made[3]) == 3 * RESOLUTION**2


def test_random_squares_and_flips_are_drawn_by_key_alone() -> None:
    columns = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], RESOLUTION, axis=0).repeat(3, axis=2)
    framing = Framing(RESOLUTION, crop="random", flip=True, views=3, seed=5)
    rows = _rows([columns] * 60, ["a"] * 60)
    starts, mirrored = [], []
    for row in rows:
        views = framing.frames(row)
        assert views == [framing.frame(dict(row), view) for view in range(3)] and len(set(views)) > 1
        for view in views:
            line = np.frombuffer(view, np.uint8).reshape(RESOLUTION, RESOLUTION, 3)[0, :, 0].astype(int)
            assert (np.abs(np.diff(line)) == 1).all()  # a piece of the picture, as it is
            starts.append(line.min())
            mirrored.append(line[0] > line[-1])
    spare = 200 - RESOLUTION
    assert min(starts) < 0.1 * spare and max(starts) > 0.9 * spare  # all of what the square leaves over
    assert abs(np.mean(starts) / spare - 0.5) < 0.1 and abs(np.mean(mirrored) - 0.5) < 0.15
    for other in ({SHARD: "b.tar"}, {KEY: "another"}):
        assert framing.frame(rows[0] | other) != framing.frame(rows[0])
    assert Framing(RESOLUTION, crop="random", flip=True, views=3, seed=6).frame(rows[0]) != framing.frame(rows[0])
    assert len({framing.frame(row, 1) for row in rows}) > 30


@pytest.mark.parametrize(
    ("framing", "message"),
    [({"crop": "left"}, "encode.crop"), ({"views": 0}, "encode.views=0"), ({"views": 2}, "same square again")],
)
def test_framings_that_make_no_sense_are_refused(framing: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Framing(RESOLUTION, **framing)


def test_chunks_fit_into_memory() -> None:
    assert chunk_rows(512, 64, 3 * 64**2, 10_000) == 512
    assert chunk_rows(500, 64, 3 * 64**2, 10_000) == 448  # whole batches
    assert chunk_rows(512, 64, 3 * 1024**2, 300_000) == 42  # 128 MiB of squares
    assert chunk_rows(10**6, 64, 3 * 64**2, 158_000) == 1664  # 256 MiB of states
    assert chunk_rows(1, 64, 3, 3) == 1


@pytest.mark.slow  # a minute where the machine is slow
def test_other_actors_give_the_same_bytes_and_splits_stand_side_by_side(
    run: RunDir, tmp_path: Path, shards: Shards, pipeline_dir: Path
) -> None:
    again = RunDir(str(tmp_path))
    encode(shards.pattern, again, pipeline_dir, actors=1)  # the other had two
    assert read_index(again, "encoded", "train") == read_index(run, "encoded", "train")
    for name, _ in read_index(run, "encoded", "train"):
        assert again.read_bytes("encoded", "train", name) == run.read_bytes("encoded", "train", name), name
    encode(f"{shards.folder}/00001.tar", again, pipeline_dir, ("encoded", "validation"))
    splits = again.read_json("encoded", "encoding.json")["splits"]
    assert splits["train"]["rows"] == len(shards.keys)
    assert splits["validation"] == {"rows_in": 10, "rows": 9, "rejected": 1, "views": 1}
    rejected = pq.read_table(again.path("encoded", "rejected.parquet"))["split"].to_pylist()
    assert rejected == ["train"] * len(shards.rejected) + ["validation"]
    assert _leftovers(again) == []


@pytest.mark.slow
def test_views_are_rows_of_their_own_and_light_rows_are_the_same_without_tensors(
    tmp_path: Path, shards: Shards, pipeline_dir: Path, ray_cluster: None
) -> None:
    framing = {"crop": "random", "flip": True, "views": 2, "seed": 3}
    whole, light = RunDir(str(tmp_path / "whole")), RunDir(str(tmp_path / "light"))
    counts = encode(shards.pattern, whole, pipeline_dir, framing=framing, text="tokens")
    told = encode(shards.pattern, light, pipeline_dir, framing=framing, text="tokens", mode="online")
    shapes = ("rows_in", "rows", "rejected", "views", "shards")
    assert [counts[name] for name in shapes] == [told[name] for name in shapes]
    assert counts["rows"] == 2 * len(shards.keys) == 2 * (counts["rows_in"] - counts["rejected"])
    rows = read_table(whole, "encoded", "train", columns=encoded_schema("tokens").names)
    assert rows[KEY].to_pylist() == [key for key in shards.keys for _ in range(2)]
    assert rows[VIEW].to_pylist() == [0, 1] * len(shards.keys)
    means = rows[LATENT_MEAN].to_pylist()
    assert sum(first != second for first, second in zip(means[::2], means[1::2], strict=True)) > len(shards.keys) // 2
    columns = [name for name in LIGHT_SCHEMA.names if name != EMBEDDING]
    names = [path.rsplit("/", 1)[-1] for path in files_of(light, "encoded", "train")]
    assert pq.read_schema(light.path("encoded", "train", names[0])).names == LIGHT_SCHEMA.names
    thin = read_table(light, "encoded", "train", columns=LIGHT_SCHEMA.names)
    assert thin.select(columns).equals(rows.select(columns))
    np.testing.assert_allclose(*(np.stack(table[EMBEDDING].to_numpy()) for table in (thin, rows)), atol=1e-6)
    # What a row says of its place is enough to make it again.
    layout = WebDatasetLayout(shards.pattern)
    units = {unit.name: unit for unit in layout.units()}
    row = thin.slice(21, 1).to_pylist()[0]
    (raw,) = layout.read(units[row[SHARD]], [row[POSITION]])
    view = cropped_table(list(framed(raw, Framing(RESOLUTION, **framing), [row[VIEW]])))  # type: ignore[arg-type]
    assert view.schema == CROPPED_SCHEMA
    mean = Encoder(EncoderSpec(str(pipeline_dir), MINILM, text="tokens"))(view)[LATENT_MEAN].to_pylist()
    np.testing.assert_allclose(unpack(mean, (4, 8, 8))[0], unpack([means[21]], (4, 8, 8))[0], **HALF)
    with pytest.raises(ValueError, match="mode"):
        read_encoding(light, "encoded", "train").check_same(read_encoding(whole, "encoded", "train"))


def test_a_source_without_a_usable_row_is_an_error_and_publishes_nothing(
    tmp_path: Path, pipeline_dir: Path, ray_cluster: None
) -> None:
    run = RunDir(str(tmp_path / "run"))
    broken = tmp_path / "broken" / "00000.tar"
    write_tar(broken, [("0.png", b"not an image"), ("0.txt", b"text"), ("1.txt", b"text")])
    with pytest.raises(ConfigError, match="no row.*image is missing.*broken/00000.tar"):
        encode(str(broken), run, pipeline_dir)
    assert _leftovers(run) == []
    with pytest.raises(RunDirError, match="has the stage"):
        read_encoding(run, "encoded", "train")
    with pytest.raises(RunDirError, match="has the stage"):
        read_encoded(run, "encoded", "train")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"source": "/nowhere/*.tar"}, ConfigError, "/nowhere/"),
        ({"framing": {"resolution": 15}}, ValueError, "data.resolution=15 is not a multiple of 2"),
        ({"precision": "int8"}, ConfigError, "encode.precision"),
        ({"text": "words"}, ConfigError, "encode.text='words'"),
        ({"mode": "both"}, ConfigError, "encode.mode='both'"),
        ({"resources": {"quiet_nodes": 1}}, ConfigError, "encode.resources asks for quiet_nodes"),
        ({"prompt_encoder": "/nowhere"}, ConfigError, "router.prompt_encoder='/nowhere'"),
        ({"pipeline_dir": Path("/nowhere")}, FileNotFoundError, "/nowhere is not a diffusers pipeline"),
    ],
)
def test_errors_come_before_work_starts(
    tmp_path: Path,
    shards: Shards,
    pipeline_dir: Path,
    ray_cluster: None,
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    settings = {"source": shards.pattern, "pipeline_dir": pipeline_dir} | given
    with pytest.raises(error, match=message):
        encode(run=RunDir(str(tmp_path)), **settings)
    assert not list(tmp_path.rglob("part-*")) and not (tmp_path / "encoded" / "encoding.json").exists()


def _leftovers(run: RunDir) -> list[str]:
    root = Path(run.root)
    return (
        [str(path) for path in root.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
        if root.exists()
        else []
    )
