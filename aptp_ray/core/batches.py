"""The images that are being denoised: one batch a shape, and its next step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from aptp_ray.core.batch import Batch, Member
from aptp_ray.core.denoiser import Denoiser
from aptp_ray.core.image_request import Handle
from aptp_ray.core.side import Undecoded


class Batches:
    """Takes members in, denoises them by one step at a time, and lets go of those at their end and those that failed."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._batches: dict[tuple[Any, ...], Batch] = {}

    def __len__(self) -> int:
        """Images, of all shapes."""
        return sum(len(batch.members) for batch in self._batches.values())

    @property
    def places(self) -> int:
        """Places that the images take."""
        return sum(m.handle.places for batch in self._batches.values() for m in batch.members)

    def join(self, members: Iterable[Member]) -> None:
        """Takes images in before their first step."""
        joining: dict[tuple[Any, ...], list[Member]] = {}
        for member in members:
            member.handle.state, member.handle.admitted_at = "active", time.perf_counter()
            joining.setdefault((tuple(member.noise.shape), tuple(member.states.shape[1:])), []).append(member)
        for key, new in joining.items():
            batch = Batch.of(new, self._denoiser.device)
            self._batches[key] = self._batches[key].joined(batch) if key in self._batches else batch

    def remove(self, handle: Handle) -> None:
        """Drops an image, if it is here."""
        for key, batch in list(self._batches.items()):
            rows = [row for row, member in enumerate(batch.members) if member.handle is not handle]
            if len(rows) < len(batch.members):
                self._keep(key, batch.only(rows) if rows else None)

    def step(self) -> tuple[list[Undecoded], list[Handle]]:
        """Denoises every image by one step.

        Returns:
            What is to be decoded, images at their end ("decoding") and previews; and the images that failed, which have left.
        """
        self._denoiser.pace()
        shown: list[Undecoded] = []
        failed: list[Handle] = []
        for key, batch in list(self._batches.items()):
            kept, new = self._denoise(batch, failed)
            self._keep(key, kept)
            shown += new
        return shown, failed

    def _denoise(self, batch: Batch, ended: list[Handle]) -> tuple[Batch | None, list[Undecoded]]:
        """Takes one step with a batch; returns what is left of it, and what is to be decoded."""
        shown: list[Undecoded] = []
        kept: Batch | None = None
        for part, scaled, prediction in self._apart_on_error(batch, ended):
            failed = self._denoiser.advance(part, prediction)
            going = []
            for row, member in enumerate(part.members):
                handle = member.handle
                if row in failed:
                    handle.end("failed", failed[row])
                    ended.append(handle)
                elif member.at_end:
                    handle.state, handle.denoised_at = "decoding", time.perf_counter()
                    handle.latents = part.latents[row].clone()
                    shown.append(Undecoded(handle, handle.latents))
                else:
                    going.append(row)
                    if handle.step in member.previews_at:
                        clean = self._denoiser.clean(member, scaled[row], prediction[row])
                        shown.append(Undecoded(handle, clean, member.previews_at.index(handle.step)))
            if going:
                rest = part if len(going) == len(part.members) else part.only(going)
                kept = rest if kept is None else kept.joined(rest)
        ready = self._denoiser.mark() if shown else None
        return kept, [dataclasses.replace(item, ready=ready) for item in shown] if ready is not None else shown

    def _apart_on_error(self, batch: Batch, ended: list[Handle]) -> list[tuple[Batch, Tensor, Tensor]]:
        """Predicts for all images at once; if that raises, for each apart, so that only the culprit fails."""
        try:
            return [(batch, *self._denoiser.predict(batch))]
        except Exception as error:
            if len(batch.members) == 1:
                handle = batch.members[0].handle
                handle.end("failed", error)
                ended.append(handle)
                return []
        parts = [batch.only([row]) for row in range(len(batch.members))]
        return [predicted for part in parts for predicted in self._apart_on_error(part, ended)]

    def _keep(self, key: tuple[Any, ...], batch: Batch | None) -> None:
        if batch is None:
            del self._batches[key]
        else:
            self._batches[key] = batch
