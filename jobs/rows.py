"""From a config to the rows that the stages read and write: layouts, encoders, readers."""

from __future__ import annotations

from typing import Any

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.sections import OpenMoji, WebDataset
from aptp_ray.tracking import Progress


def layout_of(config: Config, run: RunDir, split: str) -> Any:
    """Returns where a split's captioned images lie; the demo's are drawn first, where they are not there yet.

    Raises:
        ConfigError: if there is nothing.
    """
    from aptp_ray.data.sources import Limits, open_layout

    source: Any = config.data.source
    options = config.source_options()
    if isinstance(source, OpenMoji):
        draw_shards(config, run)
        patterns = {name: run.address("shards", name, "*.tar") for name in ("train", "validation")}
        source, options = WebDataset(kind="webdataset", **patterns), run.storage_options
    limits = Limits(max_pixels=config.data.max_pixels, max_caption_characters=config.data.max_caption_characters)
    return open_layout(source, split, storage_options=options, seed=config.encode.seed, limits=limits)


def draw_shards(config: Config, run: RunDir) -> None:
    """Draws the demo's shards into the run directory; those that are there are kept."""
    from aptp_ray.demo.shards import build_shards

    source = config.data.source
    assert isinstance(source, OpenMoji)
    total = source.train_images + source.validation_images
    progress = Progress("shards", total, unit="images")
    build_shards(
        run.address("shards"),
        seed=config.seed,
        image_size=config.data.resolution,
        train_images=source.train_images,
        validation_images=source.validation_images,
        images_per_shard=source.images_per_shard,
        progress=lambda done, _: progress.update(done),
        storage_options=run.storage_options or None,
    )


def encoder_spec(config: Config, pipeline_dir: str) -> Any:
    """Returns which encoders run, and how."""
    from aptp_ray.data.encoder import EncoderSpec

    return EncoderSpec(
        pipeline_dir,
        config.router.prompt_encoder,
        precision=config.encode.precision,
        text=config.encode.text,
        storage_options=config.storage_options,
    )


def framing(config: Config) -> Any:
    """Returns how images become squares."""
    from aptp_ray.data.rows import Framing

    encode = config.encode
    return Framing(config.data.resolution, crop=encode.crop, flip=encode.flip, views=encode.views, seed=encode.seed)


def encode_rows(config: Config, run: RunDir, split: str, parts: tuple[str, ...], pipeline_dir: str) -> dict[str, Any]:
    """Encodes one split as the config says; see ``aptp_ray.data.encode.encode_split``."""
    from aptp_ray.data.encode import encode_split

    encode = config.encode
    return encode_split(
        layout_of(config, run, split),
        run,
        parts,
        spec=encoder_spec(config, pipeline_dir),
        framing=framing(config),
        mode=encode.mode,
        batch_size=encode.batch_size,
        actors=encode.actors,
        rows_per_file=encode.rows_per_file,
        max_rejected_fraction=encode.max_rejected_fraction,
        resources=encode.resources,
        on_gpu=config.compute.gpus_per_worker > 0,
    )


def write_images(config: Config, run: RunDir, split: str, parts: tuple[str, ...]) -> dict[str, Any]:
    """Writes one split's cropped images themselves, for training a VAE."""
    from aptp_ray.data.encode import write_squares

    return write_squares(
        layout_of(config, run, split),
        run,
        parts,
        framing=framing(config),
        rows_per_file=config.encode.rows_per_file,
        max_rejected_fraction=config.encode.max_rejected_fraction,
    )


def reader_of(
    config: Config, run: RunDir, *parts: str, embedding: bool = False, pipeline_dir: str | None = None
) -> Any:
    """Returns the reader by which training reads encoded (or assigned) rows: only the columns that it uses.

    Args:
        config: of the run.
        run: its directory.
        parts: e.g. ``"encoded", "train"``.
        embedding: whether prompt embeddings are read, too.
        pipeline_dir: where the encoders are that made the rows; None: the teacher's.
    """
    from aptp_ray.data import schema
    from aptp_ray.data.encoded import read_encoding
    from aptp_ray.data.online import OnlineReader
    from aptp_ray.data.reader import EncodedReader
    from aptp_ray.train.draws import training_columns

    if parts[0] == "teacher_images":
        return EncodedReader.open(run, *parts, columns=[schema.IMAGE])
    columns = training_columns(read_encoding(run, *parts), embedding=embedding)
    if config.encode.mode == "offline":
        return EncodedReader.open(run, *parts, columns=columns)
    workers = config.compute.workers
    most = workers if isinstance(workers, int) else workers[1]
    return OnlineReader.open(
        run,
        *parts,
        columns=columns,
        layout=layout_of(config, run, "validation" if parts[-1] == "validation" else "train"),
        spec=encoder_spec(config, pipeline_dir or run.address("teacher")),
        framing=framing(config),
        batch_size=config.encode.batch_size,
        actors=config.encode.actors,
        resources=config.encode.resources,
        held_gpus=most * config.compute.gpus_per_worker,
    )
