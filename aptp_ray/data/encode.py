"""Images and captions become latents, text states and prompt embeddings, once: no training step runs an encoder.

Rows stream: tar shards -> decode and crop (tasks) -> batches of exactly ``batch_size`` rows -> encode (a pool of
actors, which hold the models) -> Parquet (tasks). Row order is kept throughout, so batches, files and their names
depend on the source alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, Dataset

from aptp_ray.artifacts import RunDir
from aptp_ray.data.encoded import ENCODING_FILE, REJECTED_FILE, replacing
from aptp_ray.data.encoder import DTYPES, Encoder, EncoderSpec, describe
from aptp_ray.data.rows import EncodedSink, crop_rows
from aptp_ray.data.schema import REASON, REJECTED
from aptp_ray.data.sources import expand, ordered, webdataset
from aptp_ray.encoding import Encoding

_REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in (*REJECTED, "split")])


def encode_split(
    source: Dataset | str,
    output: RunDir,
    parts: tuple[str, ...],
    *,
    pipeline_dir: str,
    prompt_encoder_source: str,
    resolution: int,
    batch_size: int = 64,
    num_actors: int | None = None,
    precision: str = "fp32",
    rows_per_file: int = 2000,
    max_tokens: int | None = None,
    threads: int = 1,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Encodes one split.

    Args:
        source: a shard pattern (see :func:`~aptp_ray.data.sources.expand`), or a Dataset with at least KEY, IMAGE and
            CAPTION.
        output: the run directory.
        parts: where in it the rows go, e.g. ``("encoded", "train")``; what is there is replaced once all is encoded.
        pipeline_dir: folder or URI of the teacher's pipeline.
        prompt_encoder_source: hub id, folder, URI or ``package:NAME/sub/folder``.
        resolution: pixels of an image's side.
        batch_size: rows that an actor encodes at once.
        num_actors: encoding actors; None: one a GPU, or one for every two CPUs.
        precision: "fp32", "bf16" or "fp16", of the VAE and the text encoder.
        rows_per_file: rows of a file, rounded up to a multiple of ``batch_size``.
        max_tokens: see :class:`~aptp_ray.data.encoder.EncoderSpec`.
        threads: torch threads of an actor on CPU.
        storage_options: of a shard pattern, for fsspec.

    Returns:
        ``{"rows_in", "rows", "rejected", "encoding"}``; rows_in = rows + rejected.

    Raises:
        ConfigError: if the pattern matches nothing.
        FileNotFoundError: if an encoder is not there.
        ValueError: if the arguments do not fit the encoders, or no row is usable.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(DTYPES)}: set data.precision")
    shards = expand(source, storage_options) if isinstance(source, str) else None
    spec = EncoderSpec(pipeline_dir, prompt_encoder_source, max_tokens, precision, threads, output.storage_options)
    encoding = describe(spec, resolution)
    expected = _promised_rows(shards, storage_options) if shards else None
    print(_estimate(encoding, expected, output.address(*parts)), file=sys.stderr, flush=True)
    rows = webdataset(source, storage_options=storage_options) if isinstance(source, str) else ordered(source)
    encoded = _encoded(rows, spec, resolution=resolution, batch_size=batch_size, num_actors=num_actors)
    if not output.is_local:
        forget(output, parts)  # there, the old rows go first: see `replacing`
    with replacing(output, *parts) as folder:
        sink = EncodedSink(folder, output.storage_options, rows_per_file)
        encoded.write_datasink(sink)
        rejected = [row for result in sink.results for row in result["rejected"]]
        kept = sum(result["rows"] for result in sink.results)
        counts = {"rows_in": sink.rows_in, "rows": kept, "rejected": len(rejected)}
        _check_counts(counts, rejected, expected, source)
        forget(output, parts)
    _write_rejected(output, parts, rejected)
    _remember(output, parts, encoding, counts)
    return {**counts, "encoding": encoding}


def _encoded(rows: Dataset, spec: EncoderSpec, *, resolution: int, batch_size: int, num_actors: int | None) -> Dataset:
    """Raw rows -> lazy rows of ``OUTPUT_SCHEMA``, in the same order."""
    cropped = rows.map_batches(
        crop_rows,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"resolution": resolution},
    )
    # Exact batches, whatever the shards' sizes. It also keeps Ray Data from decoding inside of the actors.
    batches = cropped.repartition(target_num_rows_per_block=batch_size, strict=True)
    return batches.map_batches(
        Encoder, fn_constructor_args=(spec,), batch_size=batch_size, batch_format="pyarrow", **_pool(num_actors)
    )


def _pool(num_actors: int | None) -> dict[str, Any]:
    """Resources of the actor pool."""
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 1), int(have.get("GPU", 0))
    actors = num_actors or gpus or max(1, int(cpus // 2))
    if gpus:
        return {"compute": ActorPoolStrategy(size=actors), "num_gpus": 1, "num_cpus": 1}
    # Actors hold their CPUs until the end: with none left, the decoding tasks would wait for ever.
    return {"compute": ActorPoolStrategy(size=actors), "num_cpus": 1 if actors < cpus else 0}


def _promised_rows(shards: list[str], storage_options: dict[str, Any] | None) -> int | None:
    """Sums what img2dataset's ``<shard>_stats.json`` files say; None if a shard has none."""
    total = 0
    for shard in shards:
        try:
            with fsspec.open(f"{shard.rsplit('.', 1)[0]}_stats.json", "rb", **(storage_options or {})) as stream:
                total += int(json.load(stream)["successes"])
        except (OSError, KeyError, ValueError):
            return None
    return total


def _estimate(encoding: Encoding, rows: int | None, where: str) -> str:
    one = 2 * (2 * int(np.prod(encoding.latent_shape)) + int(np.prod(encoding.text_shape))) + 4 * encoding.embedding_dim
    many, count = (rows, f"{rows} rows") if rows is not None else (1_000_000, "a million rows")
    return f"encoding into {where}: {one / 1e3:.1f} kB a row without captions, {one * many / 1e9:.2f} GB for {count}"


def _check_counts(counts: dict[str, int], rejected: list[dict[str, str]], expected: int | None, source: Any) -> None:
    name = repr(source) if isinstance(source, str) else "the Dataset"
    if counts["rows_in"] != counts["rows"] + counts["rejected"]:
        raise RuntimeError(f"rows were lost while encoding {name}: {counts}")
    if not counts["rows"]:
        reasons = "; ".join(list(dict.fromkeys(row[REASON] for row in rejected))[:3]) or "it has no rows"
        raise ValueError(f"no row of {name} could be encoded: {reasons}")
    if expected is not None and expected != counts["rows_in"]:
        print(f"warning: {name} has {counts['rows_in']} rows, its *_stats.json files say {expected}", file=sys.stderr)


def _write_rejected(output: RunDir, parts: tuple[str, ...], rejected: list[dict[str, str]]) -> None:
    where = (*parts[:-1], REJECTED_FILE)
    kept = []
    if output.exists(*where):
        old = pq.read_table(pa.BufferReader(output.read_bytes(*where)))
        kept = [row for row in old.to_pylist() if row["split"] != parts[-1]]
    rows = kept + [row | {"split": parts[-1]} for row in rejected]
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["split"]), schema=_REJECTED_SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    output.write_bytes(buffer.getvalue().to_pybytes(), *where)


def forget(output: RunDir, parts: tuple[str, ...]) -> None:
    """Takes a split out of ``encoding.json``, so that no reader trusts rows that are being replaced."""
    where = (*parts[:-1], ENCODING_FILE)
    if output.exists(*where):
        value = output.read_json(*where)
        value["splits"].pop(parts[-1], None)
        output.write_json(value, *where)


def _remember(output: RunDir, parts: tuple[str, ...], encoding: Encoding, counts: dict[str, int]) -> None:
    where = (*parts[:-1], ENCODING_FILE)
    splits: dict[str, Any] = {}
    if output.exists(*where):
        old = output.read_json(*where)
        # Splits made by other encoders do not belong together; those rows have to be made again.
        splits = old["splits"] if Encoding.from_json(old) == encoding else {}
    output.write_json({**encoding.to_json(), "splits": {**splits, parts[-1]: counts}}, *where)
