"""What an autoscaler may add to the cluster at hand.

Ray has a place for this (the cluster config of its control store), but its own autoscalers leave it empty: only managed ones
report there. So two more places are looked at: the file with which ``ray up`` starts the autoscaler on the head, where submitted
jobs run, and the start command that KubeRay gives to its pods.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

Kind = tuple[dict[str, float], int]

_MANY = 1_000  # nodes, where there is no bound
_RAY_UP = "~/ray_bootstrap_config.yaml"  # as the head_start_ray_commands of clusters/*.yaml name it


def kinds_to_come() -> list[Kind] | None:
    """Returns the kinds of nodes that may be added, each with its resources and how many there may be.

    Needs a connection to the cluster.

    Returns:
        no kinds where none can be added; None where an autoscaler runs that does not say which.
    """
    from ray._private.state import state  # there is no public way to ask

    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        return [
            # "No bound" is a count of -1.
            (dict(group.resources), group.max_count if group.max_count >= 0 else _MANY)
            for group in reported.node_group_configs
            if group.max_count
        ]
    file = Path(_RAY_UP).expanduser()
    if file.is_file():
        return kinds_of_ray_up(file)
    command = os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
    # On a head that an autoscaler looks after, KubeRay runs no monitor; what a worker's command says is of no help.
    if command and ("--no-monitor" in command or "--head" not in command):
        return None
    return []


def kinds_of_ray_up(file: Path) -> list[Kind]:
    """Reads an autoscaler file; what its nodes have is known where ``resources`` say so, as in ours."""
    import yaml

    tree: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    most = int(tree.get("max_workers", 0))
    found = []
    for name, node in tree.get("available_node_types", {}).items():
        count = min(most, int(node.get("max_workers", most)))
        if name != tree.get("head_node_type") and count:
            found.append(({key: float(amount) for key, amount in node.get("resources", {}).items()}, count))
    return found
