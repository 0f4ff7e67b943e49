"""The demo's data set as WebDataset shards, laid out as img2dataset writes CC3M.

`<output_uri>/<split>/00000.tar` holds `<key>.png`, `<key>.txt` and `<key>.json`; `00000_stats.json` beside it has the
counts. A shard is a pure function of its `ShardSpec`: bytes are the same on every run, so shards can be written by any
number of tasks in any order.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec

from aptp_ray.demo.captions import captions
from aptp_ray.demo.scenes import SPLITS, Scene, generator, held_out, render, sample_scene

# Raise when the images or captions of an unchanged seed change, so that old shards are not taken for new ones.
DATA_VERSION = 2
_INDEX_DIGITS = 4


@dataclass(frozen=True)
class ShardSpec:
    """One shard to write.

    Attributes:
        split: "train" or "validation".
        shard: Number of the shard in its split.
        start: Index of its first image in the split.
        images: How many images it holds.
        split_images: How many images the whole split has.
        seed: The data set's seed.
        image_size: Side of the images in pixels.
    """

    split: str
    shard: int
    start: int
    images: int
    split_images: int
    seed: int
    image_size: int
    version: int = field(default=DATA_VERSION)


def plan_shards(
    *, seed: int, image_size: int = 64, train_images: int, validation_images: int, images_per_shard: int
) -> list[ShardSpec]:
    """Lists the shards of a data set, to be handed to `write_shard` one by one or as tasks.

    Raises:
        ValueError: If a number is out of range.
    """
    if not 0 < images_per_shard <= 10**_INDEX_DIGITS:
        raise ValueError(
            f"images_per_shard={images_per_shard} must be in 1..{10**_INDEX_DIGITS}: keys have {_INDEX_DIGITS} digits"
        )
    if image_size < 16:
        raise ValueError(f"image_size={image_size} is too small for a drawing to be seen: use 64")
    if min(train_images, validation_images) < 0 or seed < 0:
        raise ValueError(
            f"seed={seed}, train_images={train_images}, validation_images={validation_images} must not be negative"
        )
    specs = []
    for split, total in zip(SPLITS, (train_images, validation_images), strict=True):
        for shard, start in enumerate(range(0, total, images_per_shard)):
            size = min(images_per_shard, total - start)
            specs.append(ShardSpec(split, shard, start, size, total, seed, image_size))
    return specs


def build_shards(
    output_uri: str,
    *,
    seed: int,
    image_size: int = 64,
    train_images: int,
    validation_images: int,
    images_per_shard: int,
    progress: Callable[[int, int], None] | None = None,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Writes the demo's data set, leaving out shards that are already complete.

    Args:
        output_uri: Any fsspec URI of a directory.
        seed: Seed of all contents and captions.
        image_size: Side of the images in pixels.
        train_images: Size of the train split.
        validation_images: Size of the validation split, a third of it held-out combinations.
        images_per_shard: At most 10000.
        progress: Called with (shards done, shards in all) after each shard.
        storage_options: Handed to fsspec.

    Returns:
        Counts: images of each split, "shards", and "skipped" (shards that were already there).

    Raises:
        ValueError: If a number is out of range, or the directory holds shards of another data set.
    """
    specs = plan_shards(
        seed=seed,
        image_size=image_size,
        train_images=train_images,
        validation_images=validation_images,
        images_per_shard=images_per_shard,
    )
    check_output(output_uri, specs, storage_options)
    counts = {"train": train_images, "validation": validation_images, "shards": len(specs), "skipped": 0}
    for done, spec in enumerate(specs, start=1):
        counts["skipped"] += not write_shard(output_uri, spec, storage_options)
        if progress is not None:
            progress(done, len(specs))
    return counts


def check_output(output_uri: str, specs: list[ShardSpec], storage_options: dict[str, Any] | None = None) -> None:
    """Refuses a directory with shards beyond the planned ones: readers take every .tar, and would mix data sets.

    Raises:
        ValueError: Naming the first such shard.
    """
    fs, root = fsspec.core.url_to_fs(output_uri, **(storage_options or {}))
    planned = {f"{spec.split}/{spec.shard:05d}.tar" for spec in specs}
    for split in SPLITS:
        for path in sorted(fs.glob(f"{root}/{split}/*.tar")):
            name = f"{split}/{path.rsplit('/', 1)[-1]}"
            if name not in planned:
                raise ValueError(
                    f"{output_uri} already holds {name}, which this data set of {len(specs)} shards does not have: "
                    "choose another directory, or delete it"
                )


def write_shard(output_uri: str, spec: ShardSpec, storage_options: dict[str, Any] | None = None) -> bool:
    """Writes one shard and then its stats file, whose presence says that the shard is complete.

    Args:
        output_uri: Directory of the data set.
        spec: Which shard, from `plan_shards`.
        storage_options: Handed to fsspec.

    Returns:
        False if the shard was already there.

    Raises:
        ValueError: If a shard of another data set is in its place.
    """
    fs, root = fsspec.core.url_to_fs(output_uri, **(storage_options or {}))
    base = f"{root}/{spec.split}/{spec.shard:05d}"
    if fs.exists(f"{base}_stats.json"):
        with fs.open(f"{base}_stats.json", "rb") as file:
            found = json.load(file).get("spec")
        if found != asdict(spec):
            raise ValueError(
                f"{base}.tar belongs to another data set ({found}, wanted {asdict(spec)}): "
                "choose another directory, or delete it"
            )
        if fs.exists(f"{base}.tar"):
            return False
    fs.makedirs(f"{root}/{spec.split}", exist_ok=True)
    payload = shard_bytes(spec)
    # img2dataset's stats, without its clock times: a shard has the same bytes on every run.
    stats = {
        "count": spec.images,
        "successes": spec.images,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
        "status_dict": {"success": spec.images},
        "spec": asdict(spec),
    }
    _write_atomically(fs, f"{base}.tar", payload)
    _write_atomically(fs, f"{base}_stats.json", json.dumps(stats, indent=2, sort_keys=True).encode())
    return True


def _write_atomically(fs: fsspec.AbstractFileSystem, path: str, payload: bytes) -> None:
    # The temporary name must not end in .tar, or a reader's glob could catch half a shard.
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    fs.pipe_file(temporary, payload)
    fs.mv(temporary, path)


def shard_bytes(spec: ShardSpec) -> bytes:
    """The tar file of one shard."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, payload in _members(spec):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            info.mode = 0o644
            info.mtime = 0
            archive.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def _members(spec: ShardSpec) -> Iterator[tuple[str, bytes]]:
    for offset in range(spec.images):
        key = f"{spec.shard:05d}{offset:0{_INDEX_DIGITS}d}"
        index = spec.start + offset
        scene = sample_scene(spec.seed, spec.split, index)
        texts = captions(scene, generator(spec.seed, spec.split, index, 1))
        png = io.BytesIO()
        render(scene, spec.image_size).save(png, format="png", compress_level=6)
        image = png.getvalue()
        record = sample_record(scene, key, texts, image, spec.image_size)
        yield f"{key}.png", image
        yield f"{key}.txt", texts[0].encode()
        yield f"{key}.json", json.dumps(record, sort_keys=True).encode()


def sample_record(scene: Scene, key: str, texts: list[str], image: bytes, image_size: int) -> dict[str, Any]:
    """The json of one sample: img2dataset's fields, then ours.

    `group` is "color", "recolor" or "line" for single subjects, and kind and style for the others ("count-color",
    "pair-line", ...); `held_out` is null, "color", "style" or "pair".
    """
    return {
        "caption": texts[0],
        "key": key,
        "width": image_size,
        "height": image_size,
        "original_width": image_size,
        "original_height": image_size,
        "status": "success",
        "error_message": None,
        "sha256": hashlib.sha256(image).hexdigest(),
        "alternates": texts[1:],
        "style": scene.style,
        "kind": scene.kind,
        "group": scene.group,
        "subjects": [item.subject for item in scene.items],
        "colors": [item.color for item in scene.items],
        "count": scene.count,
        "ground": scene.ground,
        "size": scene.size,
        "position": scene.position,
        "held_out": held_out(scene),
    }
