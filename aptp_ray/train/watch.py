"""What the codes are like while they learn, in the log, and a warning when the mixture collapses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from aptp_ray.config import Config
from aptp_ray.core.collapse import code_statistics, collapse_warning
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.tracking import Tracker

# Prompts of each expert in the table of prompts.
_LISTED = 8


class CodeWatch:
    """Called on rank 0 whenever a step of the prune stage is logged."""

    def __init__(
        self, config: Config, objective: PruneObjective, label: str, captions: Sequence[str], embeddings: Tensor
    ) -> None:
        """Notes what to look at.

        Args:
            config: the whole tree.
            objective: whose router learns.
            label: of the run.
            captions: held-out prompts, some of which are listed by the expert that they are routed to.
            embeddings: z of these prompts [n, dim].
        """
        self._config, self._objective, self._label = config, objective, label
        self._captions, self._embeddings = captions, embeddings
        # Pictures and warnings: some ten in a run.
        self._every = max(1, config.prune.loop.steps // 10)
        self._pictured = self._warned = -self._every

    def __call__(self, tracker: Tracker, step: int, stats: dict[str, Any]) -> None:
        """Logs the codes' figures; warns on standard error."""
        if "assignment_perplexity" not in stats:  # the warm-up has no codes yet
            return
        objective, router, macs = self._objective, self._objective.router, self._objective.macs
        found = code_statistics(router, macs)
        tracker.log({f"codes/{name}": value for name, value in found.metrics().items()}, step)
        if step - self._pictured >= self._every or step == self._config.prune.loop.steps:
            self._pictured = step
            tracker.log_bars("experts/macs_ratio", found.ratios.tolist(), step)
            tracker.log_bars("experts/share", objective.shares.tolist(), step)
            tracker.log_heatmap("codes/similarity", found.cosine, step)
            tracker.log_table("experts/prompts", ("expert", "similarity", "prompt"), self._prompts(), step)
        warning = collapse_warning(
            found,
            shares=objective.shares,
            routed_shares=objective.routed_shares,
            embedding_spread=stats["embedding_spread"],
            agreement=stats["agreement"],
            floor=macs.floor / macs.total,
            budget=objective.budget,
            duals=router.duals,
            transport=objective.assignment == "transport",
        )
        if warning is not None and step - self._warned >= self._every:
            self._warned = step
            for line in warning.splitlines():
                print(f"[{self._label}] warning, step {step}: {line}", file=sys.stderr, flush=True)

    def _prompts(self) -> list[list[Any]]:
        """The first prompts that go to each expert, with their cosine to its code."""
        routed = self._objective.router.assign(self._embeddings)
        rows = []
        for expert in range(self._objective.router.num_codes):
            chosen = (routed.expert == expert).nonzero().flatten().tolist()[:_LISTED]
            rows += [[expert, round(float(routed.similarity[index, expert]), 4), self._captions[index]] for index in chosen]
        return rows
