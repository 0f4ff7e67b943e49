"""Several seeds of one thing: means over its runs, and paired differences between such means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from aptp_ray.evaluate.bootstrap import differences, estimate
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
    runs: dict[str, list[str]] = {}
    for system in systems:
        runs.setdefault(system.seed_of or system.name, []).append(system.name)
    home = next(system.seed_of or system.name for system in systems if system.name == against)
    means: dict[str, Found] = {}
    things: dict[str, Any] = {}
    for name, members in runs.items():
        shared = [score for score in found[members[0]] if all(score in found[member] for member in members)]
        means[name] = {
            score: (
                float(np.mean([found[member][score][0] for member in members])),
                np.mean([found[member][score][1] for member in members], axis=0),
            )
            for score in shared
        }
        things[name] = {
            "runs": members,
            "scores": {
                score: estimate(*means[name][score]).to_json() | {"values": [found[member][score][0] for member in members]}
                for score in shared
            },
        }
    apart = {
        score: differences({name: one[score] for name, one in means.items() if score in one}, home) for score in means[home]
    }
    return {"against": home, "things": things, "differences": apart}
