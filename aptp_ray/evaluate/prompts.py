"""What a report reads of the validation prompts: where they are routed, what kinds there are, how near they are to codes."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.core.router import PromptRouter
from aptp_ray.data.schema import CAPTION, EMBEDDING, EXPERT, GROUP, KEY, METADATA

# The column in which assigned/validation.parquet holds where a row's other captions are routed.
ALTERNATE_EXPERTS = "alternate_experts"
# A metadata field with more values than this is no label of a kind of prompt (a key, a URL, a subject).
_MOST_VALUES = 12


def validation_rows(run: RunDir) -> pa.Table:
    """KEY, CAPTION, GROUP, EXPERT and :data:`ALTERNATE_EXPERTS` of the routed captions.

    Raises:
        RunDirError: if there are none.
    """
    content = run.read_bytes("assigned", "validation.parquet")
    rows = pq.read_table(io.BytesIO(content), columns=[KEY, CAPTION, GROUP, EXPERT, ALTERNATE_EXPERTS])
    if not rows.num_rows:
        raise RunDirError(f"{run.address('assigned', 'validation.parquet')} has no rows: encode validation shards")
    return rows


def similarity_of(run: RunDir, rows: pa.Table, router: PromptRouter) -> torch.Tensor:
    """The similarity of each validation prompt with each code [prompts, K], by the embeddings that were encoded.

    Raises:
        RunDirError: if a prompt is not among the encoded rows.
    """
    embeddings = _encoded(run, rows, EMBEDDING)
    if embeddings is None or None in embeddings:
        raise RunDirError(f"{run.address('encoded', 'validation')} does not hold all prompts of assigned/: assign again")
    return router.assign(torch.tensor(embeddings, dtype=torch.float32)).similarity


def _encoded(run: RunDir, rows: pa.Table, column: str) -> list[Any] | None:
    """A column of the encoded rows, in the order of ``rows``; None for a row that is not among them, or where there are none."""
    files = sorted(run.fs.glob(run.path("encoded", "validation", "part-*.parquet")))
    if not files:
        return None
    found: dict[str, Any] = {}
    for file in files:
        with run.fs.open(file, "rb") as stream:
            table = pq.read_table(stream, columns=[KEY, column])
        found |= zip(table.column(KEY).to_pylist(), table.column(column).to_pylist(), strict=True)
    return [found.get(key) for key in rows.column(KEY).to_pylist()]


def labels_of(run: RunDir, rows: pa.Table) -> dict[str, list[str]]:
    """The prompts' group, and the fields of the source's metadata that name a kind of prompt, where there are any."""
    labels = {GROUP: rows.column(GROUP).to_pylist()}
    encoded = _encoded(run, rows, METADATA)
    if encoded is not None:
        fields = [json.loads(value or "{}") for value in encoded]
        for name in fields[0]:
            values = [field.get(name) for field in fields]
            if name not in labels and all(isinstance(value, str) for value in values):
                labels[name] = values
    # A label names a kind of prompt: few values, each of them shared by prompts.
    most = {name: min(_MOST_VALUES, len(values) // 2) for name, values in labels.items()}
    return {name: values for name, values in labels.items() if 1 < len(set(values)) <= most[name] or name == GROUP}
