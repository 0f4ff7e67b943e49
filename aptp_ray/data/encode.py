"""Images and captions become latents, text states and prompt embeddings, once: no training step runs an encoder.

The stream itself, and how it goes on after a kill, stands in ``stream.py``; here is what the encoders add to it.
"""

from __future__ import annotations

import sys
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset

from aptp_ray.artifacts import RunDir
from aptp_ray.config import ConfigError
from aptp_ray.data.encoded import ENCODING_FILE
from aptp_ray.data.encoder import ChunkEncoder, EncoderSpec, describe
from aptp_ray.data.layout import Layout
from aptp_ray.data.rows import Framing, chunk_rows
from aptp_ray.data.stream import promised_rows, write_split
from aptp_ray.encoding import Encoding
from aptp_ray.growth import kinds_to_come

_MOST_UNKNOWN = 16  # encoding actors, where an autoscaler does not say how many nodes it may add; encode.actors says otherwise


def encode_split(
    layout: Layout,
    output: RunDir,
    parts: tuple[str, ...],
    *,
    spec: EncoderSpec,
    framing: Framing,
    mode: str = "offline",
    batch_size: int = 64,
    actors: int | None = None,
    rows_per_file: int = 512,
    max_rejected_fraction: float = 0.1,
    resources: dict[str, float] | None = None,
    on_gpu: bool = False,
) -> dict[str, Any]:
    """Encodes one split; called again after a kill, it goes on with the units that are not done.

    Args:
        layout: of the source.
        output: the run directory.
        parts: where in it the rows go, e.g. ``("encoded", "train")``.
        spec: the encoders.
        framing: how images become squares.
        mode: "offline", or "online": light rows without tensors; images are decoded and checked all the same.
        batch_size: rows that an actor encodes at once.
        actors: encoding actors; None: one a GPU, or one for every two CPUs, of the cluster or of what it may grow to.
        rows_per_file: about how many rows a file holds; fewer where images are large.
        max_rejected_fraction: of the source rows; and of the units, as to those that stay out of reach.
        resources: custom Ray resources of an actor.
        on_gpu: ask for GPUs also where none is there yet, but nodes may come.

    Returns:
        ``{"rows_in", "rows", "rejected", "views", "shards": {name: [rows in, rows, rejected]}, "encoding"}``;
        rows = views * (rows_in - rejected), for every shard and in total.

    Raises:
        ConfigError: if the source has no units or no usable row, or too many rows are rejected; in the latter case
            what was encoded is kept, and a call with a higher bound goes on.
        FileNotFoundError: if an encoder is not there.
        ValueError: if the arguments do not fit the encoders.
    """
    if mode not in ("offline", "online"):
        raise ConfigError(f"encode.mode={mode!r} is neither offline nor online")
    light = mode == "online"
    encoding = describe(spec, framing, mode)
    pool = _pool(actors, resources, on_gpu)
    units = layout.units()
    promised = promised_rows(layout, units)
    print(_estimate(encoding, promised, output.address(*parts)), file=sys.stderr, flush=True)

    def encoded(chunks: Dataset) -> Dataset:
        return chunks.map_batches(
            ChunkEncoder, fn_constructor_args=(spec, batch_size, light), batch_size=1, batch_format="pyarrow", **pool
        )

    accounts = write_split(
        layout,
        units,
        output,
        parts,
        made_by={"encoding": encoding.identity()},
        framing=framing,
        light=light,
        rows=chunk_rows(rows_per_file, batch_size, 0 if light else 3 * framing.resolution**2, encoding.row_bytes()),
        encoded=encoded,
        max_rejected_fraction=max_rejected_fraction,
        promised=promised,
    )
    _remember(output, parts, encoding, accounts.counts())
    return {**accounts.counts(), "shards": accounts.shards(), "encoding": encoding}


def write_squares(
    layout: Layout,
    output: RunDir,
    parts: tuple[str, ...],
    *,
    framing: Framing,
    rows_per_file: int = 512,
    max_rejected_fraction: float = 0.1,
) -> dict[str, Any]:
    """Writes the images themselves, cropped, for training a VAE; as :func:`encode_split`, but no encoder runs.

    Returns:
        ``{"rows_in", "rows", "rejected", "views", "shards"}``. The rows have IMAGE in place of what is encoded.
    """
    side = 3 * framing.resolution**2
    accounts = write_split(
        layout,
        layout.units(),
        output,
        parts,
        made_by={"framing": framing.to_json()},
        framing=framing,
        light=False,
        rows=chunk_rows(rows_per_file, 1, side, side),
        encoded=lambda chunks: chunks,
        max_rejected_fraction=max_rejected_fraction,
    )
    return {**accounts.counts(), "shards": accounts.shards()}


def _pool(actors: int | None, resources: dict[str, float] | None, on_gpu: bool = False) -> dict[str, Any]:
    """Resources of the actor pool: by what the cluster has, or, where nodes come when they are asked for, by what it may have."""
    have, kinds = ray.cluster_resources(), kinds_to_come()
    known = set(have).union(*(kind for kind, _ in kinds or []))
    missing = [name for name, amount in (resources or {}).items() if name not in known or (kinds == [] and have[name] < amount)]
    if missing and kinds is not None:
        raise ConfigError(
            f"encode.resources asks for {', '.join(missing)}, the cluster has {', '.join(sorted(known))}: "
            "start nodes with that resource, or leave encode.resources empty"
        )

    def total(name: str) -> int:
        coming = sum(kind.get(name, 0) * count for kind, count in kinds or [])
        return int(have.get(name, 0) + coming)

    gpus, cpus = int(have.get("GPU", 0)), int(have.get("CPU", 1))
    grows = kinds != []
    if gpus or (grows and on_gpu):
        most = actors or max(1, gpus, total("GPU") if kinds is not None else _MOST_UNKNOWN)
        each = {"num_gpus": 1, "num_cpus": 1}
    else:
        most = actors or max(1, total("CPU") // 2 if kinds is not None else max(cpus // 2, _MOST_UNKNOWN))
        # Actors hold their CPUs until the end: with none left, the decoding tasks would wait for ever.
        each = {"num_cpus": 1 if grows or most < cpus else 0}
    # Where nodes come and go, the pool begins with one actor and asks for more while chunks wait.
    size: dict[str, Any] = {"size": most} if actors or not grows else {"min_size": 1, "max_size": most}
    # Two chunks an actor: one is encoded while the other is fetched. More would queue up in memory.
    return {"compute": ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=2), "resources": resources or None, **each}


def _estimate(encoding: Encoding, rows: int | None, where: str) -> str:
    views = int(encoding.framing["views"])
    many = (1_000_000 if rows is None else rows) * views
    count = f"{rows or 1_000_000:,} {'images' if rows is not None else 'images (their number is not known yet)'}"
    each = f"{count}, {views} view{'s' if views > 1 else ''} each"
    if encoding.mode == "online":
        one = encoding.row_bytes()
        return f"light rows into {where}: {one / 1e3:.1f} kB a row without texts, {one * many / 1e9:.2f} GB for {each}"
    sizes = {text: encoding.row_bytes(text) for text in ("states", "tokens")}
    other = "tokens" if encoding.text == "states" else "states"
    return (
        f"encoding into {where}: {sizes[encoding.text] / 1e3:.1f} kB a row without texts, "
        f"{sizes[encoding.text] * many / 1e9:.2f} GB for {each}; with encode.text={other} it would be "
        f"{sizes[other] / 1e3:.1f} kB a row, {sizes[other] * many / 1e9:.2f} GB"
    )


def _remember(output: RunDir, parts: tuple[str, ...], encoding: Encoding, counts: dict[str, int]) -> None:
    where = (*parts[:-1], ENCODING_FILE)
    splits: dict[str, Any] = {}
    if output.exists(*where):
        old = output.read_json(*where)
        # Splits made by other encoders do not belong together; those rows have to be made again.
        same = all(old.get(name) == value for name, value in encoding.identity().items())
        splits = old["splits"] if same else {}
    output.write_json({**encoding.to_json(), "splits": {**splits, parts[-1]: counts}}, *where)
