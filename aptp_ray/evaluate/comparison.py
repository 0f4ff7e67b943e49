"""The report's comparison: a table of systems with intervals, quality against compute as a plot, and what images get right."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

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
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 320, 62, 40, 16, 16
# Pixels from one mark to the next that may not cover it.
_MARK = 15.0
# Shapes, not colors alone, tell systems apart in print and to the color-blind.
_FORMS = ("circle", "square", "diamond", "triangle", "down", "bar")
_SHAPES = tuple((form, kind) for kind in ("full", "hollow") for form in _FORMS)


def comparison(scores: dict[str, Any]) -> str:
    """Returns the sections of ``evaluation/scores.json``."""
    parts = [section("Against what it replaces", _note(scores), _systems(scores) + _seeds(scores) + _plots(scores))]
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
    for name, thing in seeds["things"].items():
        cells = [_cell(thing["scores"].get(score), seeds["differences"].get(score, {}).get(name)) for score in names]
        rows.append([escape(name), str(len(thing["runs"])), *cells])
    note = (
        "<p class=note>Means over seeds of pruning and fine-tuning, in round brackets each run; intervals are over captions, and "
        f"stars mark differences to {escape(seeds['against'])} as above.</p>"
    )
    return note + table(["system", "runs", *(_SCORES[score] for score in names)], rows)


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


# -- quality against compute -----------------------------------------------------------------------------------------------


def _plots(scores: dict[str, Any]) -> str:
    found = [_plot(scores, name) for name in _PLOTTED if name in _names(scores)]
    return f"<div class=plots>{''.join(found)}</div>"


def _plot(scores: dict[str, Any], name: str) -> str:
    points = [
        (system, found["macs_per_image"] / 1e9, found["scores"][name])
        for system, found in scores["systems"].items()
        if name in found["scores"] and None not in found["scores"][name].values()
    ]
    if not points:
        return ""
    shapes = {system: _SHAPES[index % len(_SHAPES)] for index, system in enumerate(scores["systems"])}
    # The same in every plot, whichever systems have a score of its kind.
    xs = _Axis([found["macs_per_image"] / 1e9 for found in scores["systems"].values()], _LEFT, _WIDTH - _RIGHT)
    places = _apart([xs(x) for _, x, _ in points])
    ys = _Axis([one[end] for _, _, one in points for end in ("low", "high")], _HEIGHT - _BOTTOM, _TOP)
    marks = "".join(
        f"<g><title>{escape(system)}: {_SCORES[name]} {one['value']:.4g} at {x:.1f} GMACs an image</title>"
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{ys(one["low"]):.1f}" y2="{ys(one["high"]):.1f}"/>'
        f"{_mark(shapes[system], place, ys(one['value']))}</g>"
        for place, (system, x, one) in zip(places, points, strict=True)
    )
    grid = "".join(
        f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{ys(tick):.1f}" y2="{ys(tick):.1f}"/>'
        f'<text class=y x="{_LEFT - 8}" y="{ys(tick) + 4:.1f}">{tick:.4g}</text>'
        for tick in ys.ticks
    ) + "".join(f'<text class=x x="{xs(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}">{tick:.4g}</text>' for tick in xs.ticks)
    better = "higher" if scores["better"][name] == "higher" else "lower"
    legend = "".join(
        f'<span><svg viewBox="-8 -8 16 16">{_mark(shapes[system], 0, 0)}</svg>{escape(system)}</span>' for system, _, _ in points
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{_SCORES[name]} against MACs an image">{grid}{marks}'
        f'<text class=x x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 4}">GMACs an image</text></svg>'
        f"<figcaption>{_SCORES[name]}; {better} is better<small class=shapes>{legend}</small></figcaption></figure>"
    )


def _apart(places: Sequence[float]) -> list[float]:
    """Moves marks that would lie on one another, systems of one cost above all, side by side about where they belong."""
    order = sorted(range(len(places)), key=places.__getitem__)
    groups: list[list[int]] = []
    for index in order:
        if groups and places[index] - places[groups[-1][-1]] < _MARK:
            groups[-1].append(index)
        else:
            groups.append([index])
    found = list(places)
    for group in groups:
        middle = sum(places[index] for index in group) / len(group)
        # Not out of the picture on either side.
        half = _MARK * (len(group) - 1) / 2
        middle = min(max(middle, _LEFT + half + _MARK), _WIDTH - _RIGHT - half - _MARK)
        for turn, index in enumerate(sorted(group)):
            found[index] = middle - half + _MARK * turn
    return found


class _Axis:
    """Values to pixels, with a margin, and round numbers in between."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        self._low, self._high, self._first, self._last = low - margin, high + margin, first, last
        step = _round_step((self._high - self._low) / 5)
        start = -int(-self._low // step)
        self.ticks = [step * index for index in range(start, start + 12) if self._low <= step * index <= self._high]

    def __call__(self, value: float) -> float:
        return self._first + (value - self._low) / (self._high - self._low) * (self._last - self._first)


def _round_step(wanted: float) -> float:
    power = 10.0 ** _floor_log10(wanted)
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * 0.999)


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def _mark(look: tuple[str, str], x: float, y: float) -> str:
    shape, kind = look
    if shape == "circle":
        return f'<circle class={kind} cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    half, tall = 5.0, 6.5
    corners = {
        "square": ((-half, -half), (half, -half), (half, half), (-half, half)),
        "diamond": ((0, -tall), (tall, 0), (0, tall), (-tall, 0)),
        "triangle": ((0, -tall), (tall, half), (-tall, half)),
        "down": ((0, tall), (tall, -half), (-tall, -half)),
        "bar": ((-tall, -2.5), (tall, -2.5), (tall, 2.5), (-tall, 2.5)),
    }[shape]
    return f'<polygon class={kind} points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


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
