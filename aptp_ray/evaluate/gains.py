"""What a mixture should gain over one code by its prompts' error curves, beside what it gained when both were drawn."""

from __future__ import annotations

import math
from typing import Any

# Relative: MACs that count as equal.
_SAME_MACS = 0.02


def gains(needs: dict[str, Any], scores: dict[str, Any] | None, budget: float) -> dict[str, Any] | None:
    """Puts the two beside each other.

    Args:
        needs: ``evaluation/needs.json``.
        scores: ``evaluation/scores.json``, if there is one.
        budget: of the mixture.

    Returns:
        None without a prediction at the budget, or without a system of one code at the mixture's MACs. Else ``at``;
        ``predicted``: the mean error with ``equal`` and with ``unequal`` sizes, and by how many ``decibels`` it falls;
        ``measured``: of each system of one code {"system", "runs", "scores": {score: gain of the mixture}}, estimates that are
        positive where the mixture is better, whichever way the score counts.
    """
    at = next((at for at in needs.get("water_filling", {}) if math.isclose(float(at), budget, abs_tol=0.005)), None)
    if at is None or scores is None:
        return None
    own, differences, runs = _compared(scores)
    alone = [name for name in runs if name != own and _is_one_code(scores, own, runs[name])]
    measured = [
        {
            "system": name,
            "runs": len(runs[name]),
            "scores": {
                score: _gain(found[name], scores["better"][score] == "higher")
                for score, found in differences.items()
                if name in found
            },
        }
        for name in alone
    ]
    if not measured:
        return None
    found = needs["water_filling"][at]
    decibels = 10 * math.log10(found["equal"] / found["unequal"])
    predicted = {"equal": found["equal"], "unequal": found["unequal"], "decibels": decibels}
    return {"at": float(at), "predicted": predicted, "measured": measured}


def _compared(scores: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, list[str]]]:
    """The mixture's name, differences to it, and the systems behind each name: means over seeds where there are any."""
    seeds = scores.get("seeds")
    if seeds:
        return seeds["against"], seeds["differences"], {name: thing["runs"] for name, thing in seeds["things"].items()}
    return scores["differences"]["against"], scores["differences"]["scores"], {name: [name] for name in scores["systems"]}


def _is_one_code(scores: dict[str, Any], own: str, runs: list[str]) -> bool:
    """Whether runs draw all captions with one pruned UNet that costs what the mixture costs, in as many steps."""
    mixture = scores["systems"][own]
    return all(
        len(found["unets"]) == 1
        and found["unets"][0]["expert"] is not None
        and found["steps"] == mixture["steps"]
        and math.isclose(found["macs_per_image"], mixture["macs_per_image"], rel_tol=_SAME_MACS)
        for found in (scores["systems"][name] for name in runs)
    )


def _gain(difference: dict[str, float | None], higher_is_better: bool) -> dict[str, float | None]:
    """The mixture's gain from a difference "other minus mixture"."""
    if not higher_is_better:
        return dict(difference)
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    return {"value": _minus(value), "low": _minus(high), "high": _minus(low)}


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
