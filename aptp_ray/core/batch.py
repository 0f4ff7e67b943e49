"""Images that share UNet calls, each at its own step."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aptp_ray.core.image_request import Handle
from aptp_ray.core.step_plan import StepPlan


@dataclass(eq=False)
class Member:
    """An image with all that its steps need.

    Attributes:
        handle: whose it is.
        noise: [channels, height, width] float32, the first sample.
        states: [1 or 2, tokens, width]: what the UNet attends to; the unconditional one, if there is guidance, comes second.
        timesteps: one a UNet call.
        plan: the scheduler's steps; None: it is not linear, and the image has ``scheduler`` for itself.
        scheduler: a diffusers scheduler at the image's step.
        generator: of whatever the scheduler draws.
        previews_at: the steps after which the image is shown, in order.
    """

    handle: Handle
    noise: Tensor
    states: Tensor
    timesteps: tuple[float, ...]
    plan: StepPlan | None
    scheduler: Any
    generator: torch.Generator
    previews_at: tuple[int, ...] = ()

    @property
    def guided(self) -> bool:
        return self.states.shape[0] == 2

    @property
    def at_end(self) -> bool:
        """Whether all steps are taken."""
        return self.handle.step >= len(self.timesteps)


@dataclass
class Batch:
    """Images of one shape that share UNet calls, each at its own step.

    Attributes:
        members: in the order of the rows.
        latents: [n, channels, height, width] float32: rounding to the UNet's precision would add up over the steps.
        past: earlier latents and UNet outputs, both like ``latents``, the latest first; as many as the scheduler looks back.
    """

    members: list[Member]
    latents: Tensor
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, members: list[Member], device: torch.device) -> Batch:
        """Images before their first step."""
        if device.type == "cuda":
            for member in members:  # made on another stream, whose allocator must not take them back while they are read here
                member.states.record_stream(torch.cuda.current_stream(device))
        return cls(members, torch.stack([member.noise for member in members]).to(device))

    def joined(self, other: Batch) -> Batch:
        """Returns both batches in one."""
        missing = (torch.zeros_like(self.latents),) * 2, (torch.zeros_like(other.latents),) * 2
        past = []
        for lag in range(max(len(self.past), len(other.past))):
            mine = self.past[lag] if lag < len(self.past) else missing[0]
            theirs = other.past[lag] if lag < len(other.past) else missing[1]
            past.append((torch.cat([mine[0], theirs[0]]), torch.cat([mine[1], theirs[1]])))
        return Batch(self.members + other.members, torch.cat([self.latents, other.latents]), past)

    def only(self, rows: list[int]) -> Batch:
        """Returns a batch of some of the images."""
        index = torch.tensor(rows, device=self.latents.device)
        past = [(x.index_select(0, index), out.index_select(0, index)) for x, out in self.past]
        return Batch([self.members[row] for row in rows], self.latents.index_select(0, index), past)

    @cached_property
    def guided(self) -> list[int]:
        """Rows with guidance."""
        return [row for row, member in enumerate(self.members) if member.guided]

    @cached_property
    def guided_index(self) -> Tensor | None:
        """Rows with guidance; None: all of them."""
        return None if len(self.guided) == len(self.members) else torch.tensor(self.guided, device=self.latents.device)

    @cached_property
    def guidance(self) -> Tensor:
        """[guided rows, 1, 1, 1]."""
        scales = [self.members[row].handle.request.guidance_scale for row in self.guided]
        return torch.tensor(scales, device=self.latents.device).view(-1, 1, 1, 1)

    @cached_property
    def states(self) -> Tensor:
        """[n + guided rows, tokens, width]: the conditional states of all, then the unconditional ones."""
        return torch.stack([m.states[0] for m in self.members] + [self.members[row].states[1] for row in self.guided])
