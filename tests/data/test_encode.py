"""Encoded rows against diffusers and the sentence encoder, called directly; and nothing half-written, ever."""

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
from ray.data.extensions import ArrowVariableShapedTensorArray

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source
from aptp_ray.config import ConfigError
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.data.encoded import count_rows, read_encoded, read_encoding, read_first, read_table, replacing
from aptp_ray.data.encoder import Encoder, EncoderSpec
from aptp_ray.data.rows import PASSED_ON, crop_rows
from aptp_ray.data.schema import (
    CAPTION,
    EMBEDDING,
    ENCODED,
    IMAGE,
    KEY,
    LATENT_MEAN,
    LATENT_STD,
    REASON,
    REJECTED,
    TEXT_LENGTH,
    TEXT_STATES,
)
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
    assert counts == {"rows_in": _tar_samples(shards), "rows": len(shards.keys), "rejected": len(shards.rejected)}
    assert counts["rows_in"] == counts["rows"] + counts["rejected"]


def test_rows_are_complete_ordered_and_of_the_contract(run: RunDir, shards: Shards) -> None:
    files = sorted(Path(run.path("encoded", "train")).iterdir())
    assert [file.name for file in files] == [f"part-{index:06d}.parquet" for index in range(len(files))] and len(files) > 1
    assert pq.read_schema(files[0]).names == list(ENCODED)
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
    table = read_table(run, "encoded", "train", columns=ENCODED)
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


def test_text_states_are_the_pipelines_own(any_pipeline_dir: Path) -> None:
    captions = ["a cat", "a much longer caption that does not fit into twelve tokens at all, no", "a cat"]
    names, images = pa.array(["a", "b", "c"]), [np.full((RESOLUTION, RESOLUTION, 3), 9, dtype=np.uint8)] * 3
    table = pa.table({KEY: names, CAPTION: captions, IMAGE: ArrowVariableShapedTensorArray.from_numpy(images)})
    encoded = Encoder(EncoderSpec(str(any_pipeline_dir), MINILM))(crop_rows(table, resolution=RESOLUTION))
    pipeline = StableDiffusionPipeline.from_pretrained(any_pipeline_dir, safety_checker=None, requires_safety_checker=False)
    for index, caption in enumerate(captions):
        with torch.no_grad():
            expected = pipeline.encode_prompt(caption, "cpu", 1, False)[0][0]
        np.testing.assert_allclose(unpack([encoded[TEXT_STATES][index].as_py()], (TOKENS, 16))[0], expected, **HALF)
    assert encoded[TEXT_LENGTH].to_pylist() == [4, TOKENS, 4]  # [CLS] a cat [SEP]
    with torch.no_grad():
        sample = torch.full((1, 3, RESOLUTION, RESOLUTION), 9 / 127.5 - 1)
        mean = pipeline.vae.encode(sample).latent_dist.mean[0]
    # The inverse of how diffusers' pipelines decode, shift included.
    shift = pipeline.vae.config.shift_factor or 0.0
    stored = unpack([encoded[LATENT_MEAN][0].as_py()], tuple(mean.shape))[0]
    np.testing.assert_allclose(stored / 0.7 + shift, mean, rtol=2e-3, atol=2e-3)


def test_crop_keeps_the_center_and_leaves_fitting_images_alone(shards: Shards) -> None:
    wide = np.zeros((RESOLUTION * 2, RESOLUTION * 6, 3), dtype=np.uint8)
    wide[:, RESOLUTION * 2 : RESOLUTION * 4] = 180
    tall = np.random.default_rng(1).integers(0, 256, (40, RESOLUTION, 3), dtype=np.uint8)
    exact = shards.pixels["00001"]
    images = [wide, tall, exact, wide[..., :1]]
    names = pa.array([str(index) for index in range(len(images))])
    # The least that a Dataset from elsewhere has to have; the other columns are filled.
    table = pa.table({KEY: names, CAPTION: names, IMAGE: ArrowVariableShapedTensorArray.from_numpy(images)})
    rows = crop_rows(table, resolution=RESOLUTION)
    assert set(rows.column_names) == {*PASSED_ON, IMAGE, REASON}
    made = rows[IMAGE].to_pylist()
    middle = np.frombuffer(made[0], np.uint8).reshape(RESOLUTION, RESOLUTION, 3)[:, 2:-2]
    assert (np.abs(middle.astype(int) - 180) <= 1).all()
    top = (40 - RESOLUTION) // 2
    assert made[1] == tall[top : top + RESOLUTION].tobytes()
    assert made[2] == exact.tobytes()
    assert made[3] is None and "uint8" in rows[REASON].to_pylist()[3]


def test_again_gives_the_same_bytes_and_splits_stand_side_by_side(
    run: RunDir, tmp_path: Path, shards: Shards, pipeline_dir: Path
) -> None:
    again = RunDir(str(tmp_path))
    encode(shards.pattern, again, pipeline_dir, num_actors=1)  # the other had two
    for file in Path(run.path("encoded", "train")).iterdir():
        assert file.read_bytes() == Path(again.path("encoded", "train", file.name)).read_bytes(), file.name
    encode(f"{shards.folder}/00001.tar", again, pipeline_dir, ("encoded", "validation"))
    splits = again.read_json("encoded", "encoding.json")["splits"]
    assert splits["train"]["rows"] == len(shards.keys) and splits["validation"] == {
        "rows_in": 10,
        "rows": 9,
        "rejected": 1,
    }
    rejected = pq.read_table(again.path("encoded", "rejected.parquet"))["split"].to_pylist()
    assert rejected.count("validation") == 1 and rejected.count("train") == len(shards.rejected)
    assert _leftovers(again) == []


def test_failure_keeps_the_old_rows_off_and_leaves_nothing_behind(
    tmp_path: Path, shards: Shards, pipeline_dir: Path, ray_cluster: None
) -> None:
    run = RunDir(str(tmp_path / "run"))
    broken = tmp_path / "broken" / "00000.tar"
    write_tar(broken, [("0.png", b"not an image"), ("0.txt", b"text"), ("1.txt", b"text")])
    with pytest.raises(ValueError, match="no row.*image is missing"):
        encode(str(broken), run, pipeline_dir)
    assert _leftovers(run) == [] and not run.exists("encoded", "train")
    with pytest.raises(RunDirError, match="has the stage"):
        read_encoding(run, "encoded", "train")
    with pytest.raises(RunDirError, match="has the stage"):
        read_encoded(run, "encoded", "train")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"source": "/nowhere/*.tar"}, ConfigError, "/nowhere/"),
        ({"resolution": 15}, ValueError, "data.resolution=15 is not a multiple of 2"),
        ({"precision": "int8"}, ValueError, "data.precision"),
        ({"prompt_encoder_source": "/nowhere"}, ConfigError, "router.prompt_encoder='/nowhere'"),
        ({"pipeline_dir": Path("/nowhere")}, FileNotFoundError, "/nowhere is not a diffusers pipeline"),
    ],
)
def test_errors_come_before_work_starts(
    tmp_path: Path, shards: Shards, pipeline_dir: Path, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = {"source": shards.pattern, "pipeline_dir": pipeline_dir} | given
    with pytest.raises(error, match=message):
        encode(run=RunDir(str(tmp_path)), **settings)
    assert list(tmp_path.iterdir()) == []


def test_rows_written_to_an_object_store_shaped_file_system_are_removed_on_failure() -> None:
    run = RunDir("memory://store/run")
    with pytest.raises(RuntimeError, match="halfway"), replacing(run, "encoded", "train") as folder:
        run.fs.pipe_file(f"{folder}/part-000000.parquet", b"half")
        raise RuntimeError("halfway")
    assert not run.exists("encoded", "train")
    with replacing(run, "encoded", "train") as folder:
        run.fs.pipe_file(f"{folder}/part-000000.parquet", b"whole")
    assert run.read_bytes("encoded", "train", "part-000000.parquet") == b"whole"


def _leftovers(run: RunDir) -> list[str]:
    root = Path(run.root)
    return (
        [str(path) for path in root.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
        if root.exists()
        else []
    )
