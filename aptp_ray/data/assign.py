"""Each encoded row goes to the folder of the expert that the router gives its caption, once, before fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.router import PromptRouter
from aptp_ray.data.encoded import (
    ENCODED_SCHEMA,
    ENCODING_FILE,
    PARQUET_OPTIONS,
    count_rows,
    read_encoded,
    read_encoding,
    read_table,
    replacing,
)
from aptp_ray.data.schema import ALTERNATES, CAPTION, EMBEDDING, EXPERT, GROUP, KEY

VALIDATION_FILE = "validation.parquet"
ALTERNATE_EXPERTS = "alternate_experts"  # list[int]: where the row's other captions are routed
_ROUTING_SCHEMA = pa.schema(
    [
        (KEY, pa.string()),
        (CAPTION, pa.string()),
        (GROUP, pa.string()),
        (EXPERT, pa.int32()),
        (ALTERNATE_EXPERTS, pa.list_(pa.int32())),
    ]
)


def assign_split(
    run: RunDir,
    *,
    router_dir: str,
    num_experts: int,
    source: tuple[str, ...] = ("encoded", "train"),
    output: tuple[str, ...] = ("assigned",),
    rows_per_file: int = 2000,
) -> dict[str, Any]:
    """Writes ``assigned/expert=<k>/*.parquet`` in row order, replacing what is there once all is written.

    ``assigned/encoding.json`` says what the rows are made of, as ``encoded/encoding.json`` does: rows that were assigned
    before their split was encoded anew are not taken for the new ones.

    Args:
        run: the run directory.
        router_dir: folder or URI of the router.
        num_experts: K; every one of them must get rows.
        source: the encoded rows.
        output: where the experts' folders go.
        rows_per_file: rows that one task parts among the experts.

    Returns:
        ``{"rows_in", "rows", "shares": [K], "counts": [K], "groups": {group: [K]}}``.

    Raises:
        ValueError: if the router has another number of experts, or an expert gets no rows.
        EncodingError: if the rows' embeddings are not of the prompt encoder on which the router learned.
        RunDirError: if there are no encoded rows, or they are not encoded to their end.
    """
    router = _load_router(run, router_dir)
    if router.num_codes != num_experts:
        raise ValueError(
            f"the router at {router_dir} has {router.num_codes} experts, router.experts={num_experts}: prune again"
        )
    rows_in = count_rows(run, *source)
    encoding = read_encoding(run, *source)
    learned_on = router.config()["prompt_encoder"]
    if learned_on is not None:
        encoding.check(prompt_encoder=learned_on["fingerprint"])
    rows = read_encoded(run, *source)
    with replacing(run, *output) as folder:
        if run.is_local:  # object stores have no folders to make
            for expert in range(num_experts):
                Path(folder, f"{EXPERT}={expert}").mkdir()
        sink = _AssignedSink(folder, run.storage_options, router, rows_per_file)
        rows.write_datasink(sink)
        groups: dict[str, list[int]] = {}
        for result in sink.results:
            for group, counts in result.items():
                groups[group] = [a + b for a, b in zip(groups.get(group, [0] * num_experts), counts, strict=True)]
        counts = [sum(column) for column in zip(*groups.values(), strict=True)]
        if sum(counts) != rows_in:
            raise RuntimeError(f"{run.address(*source)} has {rows_in} rows, but {sum(counts)} were assigned")
        empty = [expert for expert, count in enumerate(counts) if not count]
        if empty:
            raise ValueError(
                f"no row of {run.address(*source)} is routed to expert {', '.join(map(str, empty))} "
                f"(rows of each: {counts}): prune again with fewer router.experts or more prune.weights.commitment, or "
                "encode more data"
            )
        splits = {f"{EXPERT}={expert}": {"rows": count} for expert, count in enumerate(counts)}
        with fsspec.open(f"{folder}/{ENCODING_FILE}", "w", **run.storage_options) as stream:
            json.dump({**encoding.to_json(), "splits": splits}, stream)
    return {
        "rows_in": rows_in,
        "rows": sum(counts),
        "counts": counts,
        "shares": [count / rows_in for count in counts],
        "groups": dict(sorted(groups.items())),
    }


class _AssignedSink(Datasink[dict[str, list[int]]]):
    """Routes rows by their embedding and writes one file an expert and task; returns rows by group and expert."""

    def __init__(self, folder: str, storage_options: dict[str, Any], router: PromptRouter, rows_per_file: int) -> None:
        # The router travels with the tasks: a few megabytes, and never another version than the one that was checked.
        self._folder, self._storage_options, self._router = folder, storage_options, router
        self._rows_per_file = rows_per_file
        self.results: list[dict[str, list[int]]] = []

    @property
    def min_rows_per_write(self) -> int:
        return self._rows_per_file

    def write(self, blocks: Iterable[Block], ctx: Any) -> dict[str, list[int]]:
        rows = pa.concat_tables([BlockAccessor.for_block(block).to_arrow() for block in blocks])
        rows = rows.select(ENCODED_SCHEMA.names).cast(ENCODED_SCHEMA)
        experts = self._router.assign(_embeddings(rows)).expert.numpy()
        groups: dict[str, list[int]] = {}
        for group, expert in zip(rows.column(GROUP).to_pylist(), experts.tolist(), strict=True):
            groups.setdefault(group, [0] * self._router.num_codes)[expert] += 1
        for expert in range(self._router.num_codes):
            part = rows.filter(pa.array(experts == expert))
            if part.num_rows:
                path = f"{self._folder}/{EXPERT}={expert}/part-{ctx.task_idx:06d}.parquet"
                with fsspec.open(path, "wb", **self._storage_options) as stream:
                    pq.write_table(part, stream, **PARQUET_OPTIONS)
        return groups

    def on_write_complete(self, write_result: Any) -> None:
        self.results = list(write_result.write_returns)


def routing_table(
    run: RunDir,
    *,
    router_dir: str,
    prompt_encoder: PromptEncoder | str | None = None,
    source: tuple[str, ...] = ("encoded", "validation"),
    output: tuple[str, ...] = ("assigned",),
) -> pa.Table:
    """Routes a split's captions and their alternates, and writes the result as ``assigned/validation.parquet``.

    Call it after :func:`assign_split`, which replaces the folder.

    Args:
        run: the run directory.
        router_dir: folder or URI of the router.
        prompt_encoder: the encoder, or its source; None: the one that the router records.
        source: the encoded rows.
        output: folder of the file.

    Returns:
        One row a caption, in row order: KEY, CAPTION, GROUP, EXPERT and ``ALTERNATE_EXPERTS``, those of ALTERNATES.

    Raises:
        ValueError: if the router learned on another prompt encoder.
        RunDirError: if there are no encoded rows.
    """
    rows = read_table(run, *source, columns=(KEY, CAPTION, GROUP, ALTERNATES, EMBEDDING))
    router = _load_router(run, router_dir, prompt_encoder)
    alternates = rows.column(ALTERNATES).to_pylist()
    unique = list(dict.fromkeys(caption for captions in alternates for caption in captions))
    routed = dict(zip(unique, router.route(unique).expert.tolist(), strict=True)) if unique else {}
    table = pa.table(
        {
            **{name: rows.column(name) for name in (KEY, CAPTION, GROUP)},
            EXPERT: router.assign(_embeddings(rows)).expert.numpy(),
            ALTERNATE_EXPERTS: [[routed[caption] for caption in captions] for captions in alternates],
        }
    ).cast(_ROUTING_SCHEMA)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    run.write_bytes(buffer.getvalue().to_pybytes(), *output, VALIDATION_FILE)
    return table


def _load_router(run: RunDir, router_dir: str, prompt_encoder: PromptEncoder | str | None = None) -> PromptRouter:
    if isinstance(prompt_encoder, str):
        prompt_encoder = resolve_source(prompt_encoder)
    return PromptRouter.from_pretrained(
        resolve_source(router_dir, run.storage_options), prompt_encoder=prompt_encoder
    ).requires_grad_(False)


def _embeddings(rows: pa.Table) -> torch.Tensor:
    """z of a table's rows, [n, dim]."""
    return torch.from_numpy(np.stack(rows.column(EMBEDDING).to_numpy()))
