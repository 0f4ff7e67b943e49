"""What was tried on the way to a run's settings: variants of pruning, each with what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from aptp_ray.evaluate.widgets import section, table

# Written by jobs/benchmark.py switches: [{"name", "changes", "figures"}], the first of which is the start; "failed" is the
# reason in place of figures.
TRIED = ("evaluation", "tried.json")
# Name of a figure, as people read it, its format, and whether its ratio to the start's is shown.
_FIGURES = {
    "error": ("error", ".4f", True),
    "error_after_finetuning": ("fine-tuned", ".4f", True),
    "style_information": ("style information", ".2f", False),
    "experts_in_use": ("experts in use", ".2f", False),
    "largest_overlap": ("largest overlap", ".1%", False),
    "macs_ratio": ("MACs", ".1%", False),
}


def with_ratios(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries as given, each with ``ratios``: its errors over the start's, where both are there."""
    start = entries[0].get("figures") or {} if entries else {}
    found = []
    for entry in entries:
        figures = entry.get("figures") or {}
        ratios = {
            name: figures[name] / start[name]
            for name, (_, _, relative) in _FIGURES.items()
            if relative and figures.get(name) is not None and start.get(name)
        }
        found.append({**entry, "ratios": ratios})
    return found


def tried(entries: Sequence[dict[str, Any]]) -> str:
    """Returns the section of what :func:`with_ratios` made of ``evaluation/tried.json``; empty if nothing was tried."""
    if not entries:
        return ""
    shown = [name for name in _FIGURES if any(name in (entry.get("figures") or {}) for entry in entries)]
    rows = [[_named(entry, number == 0), *_cells(entry, shown, number == 0)] for number, entry in enumerate(entries)]
    return section("What was tried", _note(entries[0]), table(["variant", *(_FIGURES[name][0] for name in shown)], rows))


def _note(start: dict[str, Any]) -> str:
    changes = f" ({_code(start['changes'])})" if start.get("changes") else ""
    return (
        f"Every variant was pruned anew from the start{changes} with the changes under its name, on the same rows in the same "
        "order, and judged on the same held-out rows under the same noise. Error: the teacher's output under the experts' masks "
        "against its own, squared, over its mean square, before any fine-tuning; fine-tuned: the squared error as it is after a "
        "short shared fine-tuning. &times;: over the start's, below 1 is better. Style information: normalized mutual "
        "information of expert and style (0: none). Experts in use: perplexity of their shares. Largest overlap: share of "
        "entries in which two codes agree. One run each, unless a second seed is listed: small differences are chance."
    )


def _named(entry: dict[str, Any], is_start: bool) -> str:
    changes = "" if is_start or not entry.get("changes") else f"<small class=changes>{_code(entry['changes'])}</small>"
    # A reason is a sentence: in a column of figures it would stretch the table.
    failed = "" if entry.get("figures") else f"<small class=changes>failed: {escape(entry.get('failed') or 'no figures')}</small>"
    return f"<b>{escape(entry['name'])}</b>{changes}{failed}"


def _cells(entry: dict[str, Any], shown: Sequence[str], is_start: bool) -> list[str]:
    figures, cells = entry.get("figures") or {}, []
    for name in shown:
        value, ratio = figures.get(name), entry["ratios"].get(name)
        times = "" if ratio is None or is_start else f" <small>&times;&nbsp;{ratio:.2f}</small>"
        cells.append("" if value is None else f"{value:{_FIGURES[name][1]}}{times}")
    return cells


def _code(changes: Sequence[str]) -> str:
    return ", ".join(f"<code>{escape(change)}</code>" for change in changes)
