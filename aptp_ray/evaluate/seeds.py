"""Several seeds of one thing: means over its runs, and paired differences between such means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aptp_ray.evaluate.bootstrap import difference, differences, estimate
from aptp_ray.evaluate_sections import System

# {score: (value, [replicates])} of one system.
Found = dict[str, tuple[float, np.ndarray]]


def over_seeds(systems: Sequence[System], found: dict[str, Found], against: str) -> dict[str, Any]:
    """Averages the runs of each thing; what was run once stands for itself.

    Args:
        systems: ``seed_of`` says which are runs of one thing.
        found: by name of system, on the same captions and draws.
        against: the system whose thing the others are compared with.

    Returns:
        ``against``; ``things``: {name: {"runs": names of systems, "scores": {score: {"value", "low", "high", "values": of each
        run}}}}; ``differences``: {score: {name: estimate}}. Intervals are those over captions, of the mean of the runs.
    """
    runs, means = _runs(systems), _means(systems, found)
    home = next(system.seed_of or system.name for system in systems if system.name == against)
    things = {
        name: {
            "runs": members,
            "scores": {
                score: estimate(*mean).to_json() | {"values": [found[member][score][0] for member in members]}
                for score, mean in means[name].items()
            },
        }
        for name, members in runs.items()
    }
    apart = {
        score: differences({name: one[score] for name, one in means.items() if score in one}, home) for score in means[home]
    }
    return {"against": home, "things": things, "differences": apart}


def pairs(systems: Sequence[System], found: dict[str, Found]) -> dict[str, Any]:
    """Compares systems with those that their ``against`` names, means over seeds on both sides.

    Args:
        systems: of which some say ``against``.
        found: by name of system, on the same captions and draws.

    Returns:
        {name: {"against", "runs": how many on either side, "scores": {score: estimate of the paired difference, this one minus
        the other}}}.
    """
    runs, means = _runs(systems), _means(systems, found)
    return {
        one.name: {
            "against": one.against,
            "runs": [len(runs[one.name]), len(runs[one.against])],
            "scores": {
                score: difference(mean, means[one.against][score]).to_json()
                for score, mean in means[one.name].items()
                if score in means[one.against]
            },
        }
        for one in systems
        if one.against is not None
    }


def _runs(systems: Sequence[System]) -> dict[str, list[str]]:
    """{thing: names of its runs}."""
    runs: dict[str, list[str]] = {}
    for system in systems:
        runs.setdefault(system.seed_of or system.name, []).append(system.name)
    return runs


def _means(systems: Sequence[System], found: dict[str, Found]) -> dict[str, Found]:
    """{thing: what its runs found in the mean, of scores that all of them have}."""
    return {
        name: {
            score: (
                float(np.mean([found[member][score][0] for member in members])),
                np.mean([found[member][score][1] for member in members], axis=0),
            )
            for score in found[members[0]]
            if all(score in found[member] for member in members)
        }
        for name, members in _runs(systems).items()
    }
