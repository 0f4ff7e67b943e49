"""When the expert that a prompt needs is too busy, which other one may draw it: a pure function of what is known of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What the router knows of one expert.

    Attributes:
        images: under way and waiting, over all of its replicas.
        places: images that its replicas denoise at once, together.
        step_ms: of one denoising step at the batch size of late; 0: not known yet.
        room: images that its queue still takes.
    """

    images: int
    places: int
    step_ms: float
    room: int

    def latency_ms(self, images: int, steps: int) -> float:
        """Estimates how long a job takes from now: until it has its places, and the drawing.

        The batch turns over once in about ``steps`` denoising steps, so those ahead of the job go in rounds of ``places``.
        """
        if self.places < 1:  # no replica yet, and nothing to judge it by
            return 0.0
        last = self.images + images  # the job's last image stands here in the queue
        return math.ceil(last / self.places) * steps * self.step_ms


def place(
    preferred: int,
    *,
    images: int,
    steps: int,
    budget_ms: float,
    scores: Sequence[float],
    macs_ratios: Sequence[float],
    loads: Sequence[Load],
) -> int:
    """Returns the expert that draws a job: the preferred one, unless its queue breaks the latency budget.

    Then it is the nearest code (highest score) among the cheaper ones that keep the budget and have room. If there is none, the
    preferred expert keeps the job: a late image of the right expert is better than a late one of another.

    Args:
        preferred: the router's choice.
        images: of the job.
        steps: denoising steps of each.
        budget_ms: from now to the image.
        scores: [K] similarity plus price of each code, for this prompt.
        macs_ratios: [K].
        loads: [K].
    """
    if loads[preferred].latency_ms(images, steps) <= budget_ms:
        return preferred
    able = [
        expert
        for expert in range(len(loads))
        if macs_ratios[expert] < macs_ratios[preferred]
        and loads[expert].room >= images
        and loads[expert].places > 0
        and loads[expert].latency_ms(images, steps) <= budget_ms
    ]
    # The lowest number on ties, as the router does it.
    return max(able, key=lambda expert: (scores[expert], -expert), default=preferred)
