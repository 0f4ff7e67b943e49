"""Quality against compute, as a plot for each score: an interval and a mark for every system."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 320, 62, 40, 16, 16
# Pixels from one mark to the next that may not cover it.
_MARK = 15.0
# Shapes, not colors alone, tell systems apart in print and to the color-blind.
_CORNERS = {
    "square": ((-5, -5), (5, -5), (5, 5), (-5, 5)),
    "diamond": ((0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)),
    "triangle": ((0, -6.5), (6.5, 5), (-6.5, 5)),
    "down": ((0, 6.5), (6.5, -5), (-6.5, -5)),
    "bar": ((-6.5, -2.5), (6.5, -2.5), (6.5, 2.5), (-6.5, 2.5)),
    "post": ((-2.5, -6.5), (2.5, -6.5), (2.5, 6.5), (-2.5, 6.5)),
    "hourglass": ((-6, -6), (6, -6), (-6, 6), (6, 6)),
    "left": ((-6.5, 0), (5, -6.5), (5, 6.5)),
    "plus": (
        *((-2, -6.5), (2, -6.5), (2, -2), (6.5, -2), (6.5, 2), (2, 2)),
        *((2, 6.5), (-2, 6.5), (-2, 2), (-6.5, 2), (-6.5, -2), (-2, -2)),
    ),
    "house": ((0, -6.5), (6, -1), (6, 6), (-6, 6), (-6, -1)),
}
_SHAPES = tuple((form, kind) for kind in ("full", "hollow") for form in ("circle", *_CORNERS))


def compute_plots(scores: dict[str, Any], titles: dict[str, str]) -> str:
    """Returns a plot of each score over the MACs of an image; where there were seeds, of the means over them.

    Args:
        scores: what ``evaluation/scores.json`` holds.
        titles: of the scores that are plotted, by name.
    """
    compute = {name: found["macs_per_image"] / 1e9 for name, found in scores["systems"].items()}
    if scores.get("seeds"):
        things = scores["seeds"]["things"]
        values = {name: thing["scores"] for name, thing in things.items()}
        compute = {name: float(np.mean([compute[run] for run in thing["runs"]])) for name, thing in things.items()}
    else:
        values = {name: found["scores"] for name, found in scores["systems"].items()}
    plots = [_plot(compute, values, name, title, scores["better"][name]) for name, title in titles.items()]
    return f"<div class=plots>{''.join(plots)}</div>"


def _plot(compute: dict[str, float], values: dict[str, dict[str, Any]], score: str, title: str, better: str) -> str:
    ordered = sorted(values, key=lambda name: compute[name])
    found = {name: values[name][score] for name in ordered if score in values[name]}
    shown = {name: one for name, one in found.items() if None not in one.values()}
    if not shown:
        return ""
    shapes = {name: _SHAPES[index % len(_SHAPES)] for index, name in enumerate(ordered)}
    # The same in every plot, whichever systems have a score of its kind.
    xs = _Axis(list(compute.values()), _LEFT, _WIDTH - _RIGHT)
    places = side_by_side([xs(compute[name]) for name in shown], _LEFT + _MARK, _WIDTH - _RIGHT - _MARK)
    left_out = off_the_scale({name: (one["low"], one["high"]) for name, one in shown.items()})
    within = [one[end] for name, one in shown.items() if name not in left_out for end in ("low", "high")]
    ys = _Axis(within, _HEIGHT - _BOTTOM, _TOP)
    marks = "".join(
        f"<g><title>{escape(name)}: {title} {one['value']:.4g} at {compute[name]:.1f} GMACs an image</title>"
        f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{ys(one["low"]):.1f}" y2="{ys(one["high"]):.1f}"/>'
        f"{_mark(shapes[name], place, ys(one['value']))}</g>"
        for place, (name, one) in zip(places, shown.items(), strict=True)
        if name not in left_out
    )
    far = "".join(f" Off the scale: {escape(name)}, {shown[name]['value']:.4g}." for name in left_out)
    grid = "".join(
        f'<line class=grid x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{ys(tick):.1f}" y2="{ys(tick):.1f}"/>'
        f'<text class=y x="{_LEFT - 8}" y="{ys(tick) + 4:.1f}">{tick:.4g}</text>'
        for tick in ys.ticks
    ) + "".join(f'<text class=x x="{xs(tick):.1f}" y="{_HEIGHT - _BOTTOM + 18}">{tick:.4g}</text>' for tick in xs.ticks)
    legend = "".join(
        f'<span><svg viewBox="-8 -8 16 16">{_mark(shapes[name], 0, 0)}</svg>{escape(name)}</span>'
        for name in shown
        if name not in left_out
    )
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{title} against MACs an image">{grid}{marks}'
        f'<text class=x x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 4}">GMACs an image</text></svg>'
        f"<figcaption>{title}; {better} is better.{far}<small class=shapes>{legend}</small></figcaption></figure>"
    )


def off_the_scale(intervals: dict[str, tuple[float, float]]) -> list[str]:
    """Returns the systems that are so far from the others that the rest would be squeezed into less than half of the plot.

    Args:
        intervals: (low, high) by system.
    """
    found, left = list[str](), dict(intervals)

    def extent(names: Sequence[str]) -> float:
        return max(left[name][1] for name in names) - min(left[name][0] for name in names)

    while len(left) > 2:
        rest = {name: extent([other for other in left if other != name]) for name in left}
        farthest = min(rest, key=rest.__getitem__)
        if rest[farthest] >= 0.5 * extent(list(left)):
            break
        found.append(farthest)
        del left[farthest]
    return found


def side_by_side(places: Sequence[float], first: float, last: float) -> list[float]:
    """Moves marks that would lie on one another, systems of one cost above all, as little as can be (in squares).

    Args:
        places: pixels, where marks belong.
        first, last: the ends between which they stay, as far as all find room there.
    """
    from scipy.optimize import isotonic_regression

    order = sorted(range(len(places)), key=places.__getitem__)
    # With the room that those before it take off, a mark may stand at any place not below the one before: a monotone fit.
    room = _MARK * np.arange(len(places))
    fitted = isotonic_regression([places[index] for index in order] - room).x
    fitted = np.clip(fitted, first, max(first, last - room[-1])) + room
    found = list(places)
    for index, place in zip(order, fitted.tolist(), strict=True):
        found[index] = place
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
    form, kind = look
    if form == "circle":
        return f'<circle class={kind} cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    return f'<polygon class={kind} points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _CORNERS[form])}"/>'
