"""Each encoded row goes to the folder of the expert that the router gives its caption, once, before fine-tuning.

One task routes one encoded file; a ledger (see ``ledger.py``) remembers which files are done. Nothing is encoded anew: the
router reads the stored prompt embeddings, so light rows are assigned as rows with tensors are.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.router import PromptRouter
from aptp_ray.data.encoded import (
    ENCODING_FILE,
    INDEX_FILE,
    forget,
    parquet_bytes,
    read_encoding,
    read_index,
    read_table,
)
from aptp_ray.data.ledger import Ledger
from aptp_ray.data.rows import write_file
from aptp_ray.data.schema import ALTERNATES, CAPTION, EMBEDDING, EXPERT, GROUP, KEY
from aptp_ray.data.sources import ordered
from aptp_ray.encoding import fingerprint
from aptp_ray.tracking import Progress

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
) -> dict[str, Any]:
    """Writes ``assigned/expert=<k>/<name of the encoded file>``; called again after a kill, it goes on.

    ``assigned/encoding.json``, written last, says what the rows are made of, as ``encoded/encoding.json`` does: rows that were
    assigned before their split was encoded anew are not taken for the new ones.

    Args:
        run: the run directory.
        router_dir: folder or URI of the router.
        num_experts: K; every one of them must get rows.
        source: the encoded rows, with or without tensors.
        output: where the experts' folders go.

    Returns:
        ``{"rows_in", "rows", "counts": [K], "shares": [K], "similarity": [K], "macs_ratio": [K] or None,
        "groups": {group: [K]}}``; similarity is the mean over an expert's rows of their similarity to its code.

    Raises:
        ValueError: if the router has another number of experts, or an expert gets no rows.
        EncodingError: if the rows' embeddings are not of the prompt encoder on which the router learned.
        RunDirError: if there are no encoded rows, or they are not encoded to their end.
    """
    router = _load_router(run, router_dir)
    if router.num_codes != num_experts:
        raise ValueError(f"the router at {router_dir} has {router.num_codes} experts, router.experts={num_experts}: prune again")
    index = read_index(run, *source)
    encoding = read_encoding(run, *source)
    learned_on = router.config()["prompt_encoder"]
    if learned_on is not None:
        encoding.check(prompt_encoder=learned_on["fingerprint"])
    ledger = Ledger(run, output)
    content = run.read_json(*source, INDEX_FILE).get("content")
    made_by = {
        "router": fingerprint(resolve_source(router_dir, run.storage_options)),
        "encoding": encoding.identity(),
        "source": [*source, content],
    }
    found, there = ledger.begin(made_by), ledger.files()
    done = {name: found[name] for name, _ in index if name in found and there >= set(_files(name, found[name]))}
    pending = [name for name, _ in index if name not in done]
    if pending:
        for path in run.fs.glob(run.path(*output, f"{EXPERT}=*")):  # of any number of experts
            forget(run, (*output, str(path).rsplit("/", 1)[-1]))
        ledger.sweep(file for name in done for file in _files(name, done[name]))
        done |= _assign_files(run, source, output, pending, router, ledger, Progress("assign", len(index), unit="files"))
    facts = _facts([done[name] for name, _ in index], num_experts, sum(rows for _, rows in index), run.address(*source))
    facts["macs_ratio"] = _macs_ratios(run, num_experts)
    splits: dict[str, Any] = {}
    for expert in range(num_experts):
        files = [[name, done[name]["counts"][expert]] for name, _ in index if done[name]["counts"][expert]]
        run.write_json({"files": files, "content": content}, *output, f"{EXPERT}={expert}", INDEX_FILE)
        splits[f"{EXPERT}={expert}"] = {"rows": facts["counts"][expert]}
    ledger.sweep(file for name in done for file in _files(name, done[name]))
    run.write_json({**encoding.to_json(), "splits": splits}, *output, ENCODING_FILE)
    print(_table(facts, "/".join(source)), file=sys.stderr, flush=True)
    return facts


def _assign_files(
    run: RunDir,
    source: tuple[str, ...],
    output: tuple[str, ...],
    names: list[str],
    router: PromptRouter,
    ledger: Ledger,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Parts files among the experts, one task a file; each gets its entry in the ledger as soon as it is done."""
    tasks = ordered(ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names)))
    tasks.context.execution_options.preserve_order = False
    # The router travels with the tasks: a few megabytes, and never another version than the one that was checked.
    receipts = tasks.map_batches(
        _assign_file,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"run": run, "source": source, "output": output, "router": router},
    )
    entries: dict[str, dict[str, Any]] = {}
    for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
        for receipt in batch.to_pylist():
            groups = dict(zip(receipt["groups"], receipt["group_counts"], strict=True))
            entry = {"counts": receipt["counts"], "similarity": receipt["similarity"], "groups": groups}
            ledger.write(receipt["name"], entry)
            entries[receipt["name"]] = entry
            progress.update(len(entries))
    return entries


def _assign_file(
    tasks: pa.Table, *, run: RunDir, source: tuple[str, ...], output: tuple[str, ...], router: PromptRouter
) -> Iterator[pa.Table]:
    torch.set_num_threads(1)  # as many tasks run as there are cores
    for name in tasks.column("name").to_pylist():
        rows = pq.read_table(pa.BufferReader(run.read_bytes(*source, name)))
        routing = router.assign(_embeddings(rows))
        experts = routing.expert.numpy()
        similarity = routing.similarity.numpy()[np.arange(len(experts)), experts]
        groups: dict[str, list[int]] = {}
        for group, expert in zip(rows.column(GROUP).to_pylist(), experts.tolist(), strict=True):
            groups.setdefault(group, [0] * router.num_codes)[expert] += 1
        for expert in range(router.num_codes):
            part = rows.filter(pa.array(experts == expert))
            if part.num_rows:
                write_file(run, parquet_bytes(part), *output, f"{EXPERT}={expert}", name)
        yield pa.table(
            {
                "name": [name],
                "counts": [np.bincount(experts, minlength=router.num_codes).tolist()],
                "similarity": [np.bincount(experts, similarity, router.num_codes).tolist()],  # sums
                "groups": [list(groups)],
                "group_counts": [list(groups.values())],
            }
        )


def _files(name: str, entry: dict[str, Any]) -> list[str]:
    """The files of an entry, below the output folder."""
    return [f"{EXPERT}={expert}/{name}" for expert, count in enumerate(entry["counts"]) if count]


def _facts(entries: list[dict[str, Any]], num_experts: int, rows_in: int, where: str) -> dict[str, Any]:
    """Adds up the ledger's entries, and looks whether the sums are right."""
    groups: dict[str, list[int]] = {}
    for entry in entries:
        for group, counts in entry["groups"].items():
            groups[group] = [a + b for a, b in zip(groups.get(group, [0] * num_experts), counts, strict=True)]
    counts = np.sum([entry["counts"] for entry in entries], axis=0).tolist()
    if sum(counts) != rows_in:
        raise RuntimeError(f"{where} has {rows_in} rows, but {sum(counts)} were assigned")
    empty = [expert for expert, count in enumerate(counts) if not count]
    if empty:
        raise ValueError(
            f"no row of {where} is routed to expert {', '.join(map(str, empty))} (rows of each: {counts}): prune again with "
            "fewer router.experts or more prune.weights.commitment, or encode more data"
        )
    sums = np.sum([entry["similarity"] for entry in entries], axis=0)
    return {
        "rows_in": rows_in,
        "rows": sum(counts),
        "counts": counts,
        "shares": [count / rows_in for count in counts],
        "similarity": (sums / counts).tolist(),
        "groups": dict(sorted(groups.items())),
    }


def _macs_ratios(run: RunDir, num_experts: int) -> list[float] | None:
    """MACs of each expert over the teacher's, as pruning recorded them; None where the router came from elsewhere."""
    if not run.exists("routing.json"):
        return None
    experts = run.read_json("routing.json")["experts"]
    return [float(expert["macs_ratio"]) for expert in experts] if len(experts) == num_experts else None


def _table(facts: dict[str, Any], where: str) -> str:
    lines = [f"{where}: {facts['rows']:,} rows assigned; MACs over the teacher's, similarity to the expert's own code"]
    lines.append(f"{'expert':>8} {'rows':>12} {'share':>7} {'similarity':>11} {'MACs':>7}")
    for expert, count in enumerate(facts["counts"]):
        macs = f"{facts['macs_ratio'][expert]:.3f}" if facts["macs_ratio"] else "-"
        share, similarity = facts["shares"][expert], facts["similarity"][expert]
        lines.append(f"{expert:>8} {count:>12,} {share:>7.3f} {similarity:>11.4f} {macs:>7}")
    return "\n".join(lines)


def routing_table(
    run: RunDir,
    *,
    router_dir: str,
    prompt_encoder: PromptEncoder | str | None = None,
    source: tuple[str, ...] = ("encoded", "validation"),
    output: tuple[str, ...] = ("assigned",),
) -> pa.Table:
    """Routes a split's captions and their alternates, and writes the result as ``assigned/validation.parquet``.

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
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    run.write_bytes(buffer.getvalue(), *output, VALIDATION_FILE)
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
