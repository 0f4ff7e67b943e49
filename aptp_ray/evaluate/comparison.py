"""The report's comparison: a table of systems with intervals, plots of them, how they were trained, and what images get right."""

from __future__ import annotations

from html import escape
from typing import Any

from aptp_ray.evaluate.plots import compute_plots
from aptp_ray.evaluate.trained import trained
from aptp_ray.evaluate.widgets import section, table

# As people read them; and what each is.
_SCORES = {
    "frechet": "Frechet distance",
    "kid": "kernel distance",
    "cmmd": "CMMD",
    "fid": "FID",
    "inception_kid": "KID",
    "clip_score": "image-text score",
    "facts": "facts right",
    "teacher_psnr": "likeness to the teacher, dB",
}
_PLOTTED = ("fid", "frechet", "clip_score", "facts", "teacher_psnr")


def comparison(scores: dict[str, Any]) -> str:
    """Returns the sections of ``evaluation/scores.json``."""
    plots = compute_plots(scores, {name: _SCORES[name] for name in _PLOTTED if name in _names(scores)})
    tables = _systems(scores) + _seeds(scores) + _pairs(scores)
    parts = [section("Against what it replaces", _note(scores), tables + plots + trained(scores))]
    facts = _facts(scores)
    if facts:
        parts.append(section("What the images get right", _facts_note(), facts))
    return "".join(parts)


def _names(scores: dict[str, Any]) -> list[str]:
    found = {score for system in scores["systems"].values() for score in system["scores"]}
    return [name for name in _SCORES if name in found]


def _note(scores: dict[str, Any]) -> str:
    labels = "; ".join(escape(text) for text in scores["labels"].values())
    return (
        f"{scores['images']} held-out captions, one image each by every system from the same noise; in brackets, 95 % intervals "
        f"by bootstrap over captions. A star marks a difference to {escape(scores['differences']['against'])}, on the same "
        f"captions, whose interval leaves out zero. {labels}."
    )


def _systems(scores: dict[str, Any]) -> str:
    names, differences = _names(scores), scores["differences"]["scores"]
    better = scores["better"]
    arrows = {name: "&uarr;" if better[name] == "higher" else "&darr;" for name in names}
    head = ["system", "steps", "MACs an image", *(f"{_SCORES[name]} {arrows[name]}" for name in names)]
    ordered = sorted(scores["systems"].items(), key=lambda item: item[1]["macs_per_image"])
    rows = []
    for system, found in ordered:
        cells = [_cell(found["scores"].get(name), differences.get(name, {}).get(system)) for name in names]
        rows.append([escape(system), str(found["steps"]), f"{found['macs_per_image'] / 1e9:.1f} G", *cells])
    return table(head, rows)


def _seeds(scores: dict[str, Any]) -> str:
    """Means over the runs of what was run with several seeds, beside what was run once."""
    seeds = scores.get("seeds")
    if not seeds:
        return ""
    names = [name for name in _names(scores) if any(name in thing["scores"] for thing in seeds["things"].values())]
    rows = []
    compute = {name: scores["systems"][thing["runs"][0]]["macs_per_image"] for name, thing in seeds["things"].items()}
    for name, thing in sorted(seeds["things"].items(), key=lambda item: compute[item[0]]):
        cells = [_cell(thing["scores"].get(score), seeds["differences"].get(score, {}).get(name)) for score in names]
        rows.append([escape(name), str(len(thing["runs"])), *cells])
    note = (
        "<p class=note>Means over seeds of pruning and fine-tuning, in round brackets each run; intervals are over captions, and "
        f"stars mark differences to {escape(seeds['against'])} as above.</p>"
    )
    return note + table(["system", "runs", *(_SCORES[score] for score in names)], rows)


def _pairs(scores: dict[str, Any]) -> str:
    """Paired differences of systems to those that they were said to be compared with, besides the run's own mixture."""
    pairs = scores.get("pairs")
    if not pairs:
        return ""
    names = [name for name in _names(scores) if any(name in one["scores"] for one in pairs.values())]
    rows = [
        [f"{escape(name)} minus {escape(one['against'])}", " and ".join(map(str, one["runs"]))]
        + [_gain(one["scores"].get(score)) for score in names]
        for name, one in pairs.items()
    ]
    note = "<p class=note>Differences on the same captions, of means over runs; a star marks an interval without zero.</p>"
    return note + table(["difference", "runs", *(_SCORES[score] for score in names)], rows)


def _cell(one: dict[str, Any] | None, apart: dict[str, float | None] | None) -> str:
    """A score with its interval, a star where it differs from what it is compared with, and the value of each of several runs."""
    if one is None:
        return ""
    star = "*" if apart and _without_zero(apart) else ""
    runs = one.get("values", [])
    each = f" <small>({'; '.join(f'{value:.4g}' for value in runs)})</small>" if len(runs) > 1 else ""
    return f"{_with_interval(one)}{star}{each}"


def _without_zero(apart: dict[str, float | None]) -> bool:
    low, high = apart["low"], apart["high"]
    return low is not None and high is not None and low * high > 0


def _with_interval(one: dict[str, float | None], style: str = ".4g") -> str:
    if one["value"] is None:
        return "not a number"
    low, high = one["low"], one["high"]
    interval = "" if low is None or high is None else f" <small>[{low:{style}}, {high:{style}}]</small>"
    return f"{one['value']:{style}}{interval}"


# -- needs ---------------------------------------------------------------------------------------------------------------


def tailoring(needs: dict[str, Any], gains: dict[str, Any] | None = None) -> str:
    """Returns the section of ``evaluation/needs.json``: whether kinds of prompts need different parts of the teacher, or more.

    Args:
        needs: what the file holds.
        gains: from :func:`~aptp_ray.evaluate.gains.gains`: what was predicted beside what was measured.
    """
    between = {tuple(pair.split(" | ")): value for pair, value in needs["between"].items()}
    least, most = min(between, key=between.__getitem__), max(between, key=between.__getitem__)
    halves = needs["within"].values()
    note = (
        "A mixture can win by which entries an expert keeps only where kinds of prompts need different ones. The rank "
        f"correlation of importances between two kinds is {between[least]:.3f} ({' and '.join(map(escape, least))}) to "
        f"{between[most]:.3f} ({' and '.join(map(escape, most))}); two measurements of one kind agree to {min(halves):.3f} to "
        f"{max(halves):.3f}. It can win by how many only where a MAC buys more for one kind than for another: below, the "
        "teacher-match error of one static code, not fine-tuned, by kind"
        + (", made by ablation in rounds." if needs.get("importances_at") else ".")
    )
    kinds = list(needs["within"])
    rows = [[f"{float(at):.0%}", *(f"{errors[kind]:.5f}" for kind in kinds)] for at, errors in needs["error"].items()]
    body = table(["MACs", *map(escape, kinds)], rows)
    for at, found in needs.get("water_filling", {}).items():
        sizes = ", ".join(f"{escape(kind)} {ratio:.0%}" for kind, ratio in found["ratios"].items())
        body += (
            f"<p class=note>An expert for each kind, sized so that a MAC buys the same, at a mean of {float(at):.0%}: {sizes}. "
            f"That predicts an error of {found['unequal']:.5f} in place of {found['equal']:.5f} with equal sizes, before "
            "fine-tuning.</p>"
        )
    return section("Is there anything to tailor?", note, body + (_gains(gains) if gains else ""))


def _gains(found: dict[str, Any]) -> str:
    """What the error curves predict, beside what the mixture gained over systems of one code at its MACs."""
    predicted, measured = found["predicted"], found["measured"]
    names = [name for name in ("teacher_psnr", *_SCORES) if any(name in one["scores"] for one in measured)]
    names = list(dict.fromkeys(names))  # likeness first: it is what was predicted
    head = ["mixture against", "runs", "predicted, dB", *(_SCORES[name] for name in names)]
    rows = [
        [
            escape(one["system"]),
            str(one["runs"]),
            f"{predicted['decibels']:+.2f}",
            *(_gain(one["scores"].get(name)) for name in names),
        ]
        for one in measured
    ]
    note = (
        f"<h3>Predicted and measured</h3><p class=note>At {found['at']:.0%} of the MACs the curves predict an error of "
        f"{predicted['unequal']:.5f} in place of {predicted['equal']:.5f}, a gain of {predicted['decibels']:.2f} dB by sizes "
        "alone: of one denoising step, before fine-tuning, with an expert for each kind. Beside it, what this mixture gained "
        "over one code for all captions at the same MACs, on whole images, after fine-tuning, by its own routing: above zero the "
        "mixture is better, whichever way the score counts; a star marks an interval without zero. Likeness to the teacher comes "
        "closest to what is predicted.</p>"
    )
    return f"{note}{table(head, rows)}"


def _gain(one: dict[str, float | None] | None) -> str:
    return "" if one is None else f"{_with_interval(one, '+.3g')}{'*' if _without_zero(one) else ''}"


# -- facts -----------------------------------------------------------------------------------------------------------------


def _facts_note() -> str:
    return (
        "Questions that the data's own scene answers, asked of each image by classifier heads: the share that is right, for "
        "combinations that training held and for those that it never saw."
    )


def _facts(scores: dict[str, Any]) -> str:
    systems = scores["systems"]
    found = {name: system["facts"] for name, system in systems.items() if system.get("facts")}
    parts = []
    for kind, title in (("seen", "Seen combinations"), ("held_out", "Held-out combinations")):
        questions = sorted({question for facts in found.values() for question in facts.get(kind, {})})
        if not questions:
            continue
        rows = [
            [escape(name), *(f"{facts[kind][q]['right']:.1%}" if q in facts.get(kind, {}) else "" for q in questions)]
            for name, facts in found.items()
        ]
        asked = next(iter(found.values()))[kind]
        head = ["system", *(f"{escape(q)} ({asked[q]['asked']})" if q in asked else escape(q) for q in questions)]
        parts.append(f"<h3>{title}</h3>{table(head, rows)}")
    return "".join(parts)
