"""What fine-tuning made of each run that was compared: its error against the teacher, beside the changes that made the run."""

from __future__ import annotations

from html import escape
from typing import Any

from aptp_ray.artifacts import RunDir
from aptp_ray.evaluate.widgets import table

_LOSS = "validation/distillation"


def trained_figures(run: RunDir) -> dict[str, float | None]:
    """Returns ``together`` and ``end``: the held-out squared error against the teacher's output, of one denoising step.

    After the shared phase, and of the experts at their end, weighted by share. None for what the run does not say: it had no
    shared phase, or was imported.
    """
    outcome = ("train", "finetune-shared", "outcome.json")
    together = run.read_json(*outcome).get(_LOSS) if run.exists(*outcome) else None
    experts = run.read_json("routing.json")["experts"]
    files = [("experts", str(expert["id"]), "expert.json") for expert in experts]
    losses = [run.read_json(*file).get(_LOSS) for file in files if run.exists(*file)]
    errors = [float(loss) for loss in losses if loss is not None]
    if len(errors) < len(experts):
        return {"together": together, "end": None}
    shares = [float(expert["share"]) for expert in experts]
    return {"together": together, "end": sum(s * e for s, e in zip(shares, errors, strict=True)) / sum(shares)}


def trained(scores: dict[str, Any]) -> str:
    """Returns a table of the compared runs: what each was made with, and what its fine-tuning came to; empty without any."""
    changes = {one["name"]: one.get("changes") or [] for one in scores.get("evaluation", {}).get("systems", [])}
    rows = []
    for name, system in scores["systems"].items():
        found = system.get("trained")
        if not found or (found["together"] is None and found["end"] is None):
            continue
        made = ", ".join(f"<code>{escape(change)}</code>" for change in changes.get(name, []))
        who = f"<b>{escape(name)}</b>" + (f"<small class=changes>{made}</small>" if made else "")
        rows.append([who, _number(found["together"]), _number(found["end"])])
    if not rows:
        return ""
    note = (
        "<h3>How they were trained</h3><p class=note>Each run's changes to the config, and its squared error against the "
        "teacher's output on held-out rows, of one denoising step: after the phase in which experts share their weights, and at "
        "the end, weighted by share. Each run draws its own noise: differences of a tenth are chance.</p>"
    )
    return note + table(["run", "shared phase", "end"], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
