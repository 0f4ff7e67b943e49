"""The sections that say where captioned images lie and how they are encoded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from aptp_ray.section import HOW, Positive, Precision, Section


class Layout(Section):
    """What the layouts of captioned images share."""

    storage_options: Annotated[dict[str, Any], HOW] = Field(
        default_factory=dict, repr=False, description="of the images, for fsspec; secrets as env:NAME (see credentials.py)"
    )


class WebDataset(Layout):
    """Tar shards, as img2dataset writes them: ``<key>.jpg|png|webp``, ``<key>.txt``, ``<key>.json``."""

    kind: Literal["webdataset"]
    train: str = Field(description="path, URI, glob or brace pattern of the training shards")
    validation: str = Field(description="the same for validation")


class TsvPart(Section):
    """One split of Conceptual Captions."""

    tsv: str = Field(description="captions and addresses, e.g. Train_GCC-training.tsv")
    images: str = Field(description="folder of the images, named <row>_<hash>, with or without an extension")


class ConceptualCaptions(Layout):
    """Conceptual Captions as its publisher lays it out: a TSV beside a folder of downloaded images."""

    kind: Literal["conceptual_captions"]
    train: TsvPart
    validation: TsvPart


class CocoPart(Section):
    """One split of MS-COCO."""

    annotations: str = Field(description="captions_*.json")
    images: str = Field(description="folder of the split's images, e.g. train2017")


class Coco(Layout):
    """MS-COCO captions, 2014 or 2017."""

    kind: Literal["coco"]
    train: CocoPart
    validation: CocoPart
    captions: Literal["all", "first"] = Field("all", description="a row for every caption, or one for every image")


class HuggingFacePart(Section):
    """One split of a Hugging Face dataset."""

    path: str = Field(description="hub id, folder written by save_to_disk, or path, URI or glob of Parquet or Arrow files")
    split: str = Field("train", description="e.g. train, or train[:95%] where the whole dataset is at hand")


class HuggingFace(Layout):
    """Any dataset that the ``datasets`` library reads."""

    kind: Literal["huggingface"]
    train: HuggingFacePart
    validation: HuggingFacePart
    name: str | None = Field(None, description="configuration of a hub dataset")
    revision: str | None = Field(None, description="pinned revision of a hub dataset")
    streaming: bool = Field(False, description="read over the network instead of downloading first")
    image_column: str = "image"
    caption_column: str = Field("text", description="a string, or a list of strings of which one is drawn by key")
    key_column: str | None = Field(None, description="null: the row's number")


class ImageFolder(Layout):
    """Images beside a ``metadata.jsonl`` or ``metadata.csv`` with a ``file_name`` column."""

    kind: Literal["image_folder"]
    train: str = Field(description="folder or URI")
    validation: str = Field(description="folder or URI")
    caption_column: str = Field("text", description="a string, or in metadata.jsonl a list, of which one is drawn")


class OpenMoji(Section):
    """The demo's drawings, made in the run directory and read as a WebDataset."""

    kind: Literal["openmoji"]
    train_images: Positive = Field(12000, description="how many to draw")
    validation_images: Positive = Field(1500, description="how many to draw")
    images_per_shard: Positive = 1000


Source = Annotated[
    WebDataset | ConceptualCaptions | Coco | HuggingFace | ImageFolder | OpenMoji, Field(discriminator="kind")
]


class Data(Section):
    """The images and captions."""

    source: Source
    resolution: Positive = Field(64, description="pixels of a side; the VAE's factor must divide it")
    max_pixels: Positive = Field(100_000_000, description="a larger image is rejected unread: a few bytes can name any size")
    max_caption_characters: Positive = Field(2000, description="a longer caption is rejected: such texts are no captions")


class Encode(Section):
    """How images and captions become what training reads; the README's "Bring your data" has the arithmetic."""

    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: encoded once and stored; online: encoded anew in each epoch, no tensor is stored"
    )
    text: Literal["states", "tokens"] = Field(
        "states", description="states: of the text encoder, which then rests in training; tokens: ids, a thousandth of the size"
    )
    precision: Precision = Field("fp32", description="in which the encoders run; what they give is stored as half floats")
    crop: Literal["center", "random"] = Field("center", description="of what the square leaves over; random: drawn by key")
    flip: bool = Field(False, description="mirror every second view, drawn by key")
    views: Positive = Field(1, description="augmented views of a row, each a row of its own in training")
    seed: int = Field(0, description="of crops, flips, and captions drawn from a list")
    batch_size: Annotated[Positive, HOW] = Field(64, description="rows that an encoding actor takes at once")
    actors: Annotated[Positive | None, HOW] = Field(None, description="encoding actors; null: from the cluster's size")
    resources: Annotated[dict[str, float], HOW] = Field(
        default_factory=dict, description="custom Ray resources of an actor, to place them on nodes of their own"
    )
    rows_per_file: Annotated[Positive, HOW] = Field(512, description="about how many rows an encoded Parquet file holds")
    max_rejected_fraction: Annotated[float, Field(ge=0.0, le=1.0), HOW] = Field(
        0.1, description="a split of which more is rejected fails; what was encoded is kept"
    )
