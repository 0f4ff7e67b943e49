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
        run}}}}; ``differences``: {score: {name: estimate}}. Intervals are those over captions, of the mean of the runs. What
        the mixture's own experts draw, captions dealt at random say, differs from that run alone and not from the mean over its
        seeds: else the seeds' differences would pass for the routing's.
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
    first = next(system for system in systems if system.name == home)
    own = {system.name for system in systems if _by_its_experts(system, first)}
    apart = {
        score: differences({name: one[score] for name, one in means.items() if score in one and name not in own}, home)
        | differences({name: found[name][score] for name in (home, *sorted(own)) if score in found[name]}, home)
        for score in means[home]
    }
    return {"against": home, "things": things, "differences": apart}


def pairs(systems: Sequence[System], found: dict[str, Found]) -> dict[str, Any]:
    """Compares systems with those that their ``against`` names, means over seeds on both sides.

    What the other's own experts draw is compared with that run alone, as in :func:`over_seeds`.

    Args:
        systems: of which some say ``against``.
        found: by name of system, on the same captions and draws.

    Returns:
        {name: {"against", "runs": how many on either side, "scores": {score: estimate of the paired difference, this one minus
        the other}}}.
    """
    runs, means = _runs(systems), _means(systems, found)
    named = {system.name: system for system in systems}
    compared: dict[str, Any] = {}
    for one in systems:
        if one.against is None:
            continue
        same_run = _by_its_experts(one, named[one.against])
        other = found[one.against] if same_run else means[one.against]
        compared[one.name] = {
            "against": one.against,
            "runs": [len(runs[one.name]), 1 if same_run else len(runs[one.against])],
            "scores": {
                score: difference(mean, other[score]).to_json() for score, mean in means[one.name].items() if score in other
            },
        }
    return compared


def _by_its_experts(one: System, other: System) -> bool:
    """Whether a control is drawn by the other's experts, of the very same run."""
    return one.kind in ("random_routing", "one_expert") and one.run_dir == other.run_dir


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
