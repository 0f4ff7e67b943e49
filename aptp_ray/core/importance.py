"""What closing each entry costs in quality: where codes start, and what the static baseline prunes by.

The cost of an entry is the rise of the teacher-match error when it alone closes. Codes act per sample, so one forward
pass closes a different entry in every row, and 1620 entries of Stable Diffusion 2.1 on 8 samples are 12,960 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.hardening import average_rank
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.running import run_unet


@dataclass(frozen=True)
class ImportanceBatch:
    """Inputs of the teacher on which entries are closed.

    Attributes:
        sample: [n, channels, height, width] noised latents.
        timesteps: [n] int64.
        text_states: [n, tokens, text_dim].
        text_mask: bool [n, tokens] of real tokens, or None.
        labels: n names of the kind of each prompt (a style, a source), or None; importances then also come by kind.
    """

    sample: Tensor
    timesteps: Tensor
    text_states: Tensor
    text_mask: Tensor | None = None
    labels: Sequence[str] | None = None


@dataclass(frozen=True)
class Importance:
    """Measured importances of all entries.

    Attributes:
        score: float64 [dim], mean squared error between the outputs with and without the entry.
        entry_macs: float64 [dim], the MACs that closing the entry saves.
        per_group: the same score over the samples of one label only.
        num_samples: samples that `score` is a mean over.
    """

    score: Tensor
    entry_macs: Tensor
    per_group: dict[str, Tensor] = field(default_factory=dict)
    num_samples: int = 0

    @property
    def per_mac(self) -> Tensor:
        """float64 [dim], error for each MAC saved: what is smallest should close first."""
        return self.score / self.entry_macs.clamp_min(1)

    def agreement(self) -> dict[tuple[str, str], float]:
        """Spearman correlation of the scores of every two labels: near 1, all kinds need the same entries."""
        names = sorted(self.per_group)
        return {
            (a, b): spearman(self.per_group[a], self.per_group[b]) for i, a in enumerate(names) for b in names[i + 1 :]
        }


@torch.no_grad()
def measure_importance(
    gated: GatedUNet,
    batches: Iterable[ImportanceBatch],
    *,
    macs: MacsModel,
    code: Tensor | None = None,
    chunk: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Closes every entry once on every sample and measures what it does to the output.

    Given a code, what it leaves open is closed on top of what it has closed: entries stand in for one another, so that what
    was worth little beside all others can be worth a lot once those are gone. Scores are then what the error *rises* by (it may
    fall), and what is closed already, or lies in a closed block, scores minus infinity.

    Args:
        gated: the teacher; put in evaluation mode for the time being.
        batches: samples, drawn by the caller. Each costs a row for every open entry and one or two more.
        macs: the MACs of this teacher's codes.
        code: bool [dim] of what is still open; None: everything.
        chunk: rows to a forward pass.
        progress: called with (rows done, rows of this batch) after each forward pass.

    Raises:
        ValueError: no samples, labels that do not fit, or an output that is not finite.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    dim = gated.space.dim
    code = gated.space.full_code() if code is None else code.cpu().bool()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    total, num_samples = torch.zeros(dim, dtype=torch.float64), 0
    training = gated.training
    gated.eval()
    try:
        for batch in batches:
            rises = _rises(gated, batch, code, chunk, progress)  # [n, dim]
            total += rises.sum(dim=0)
            num_samples += len(rises)
            # Without labels there is nothing to group by.
            for label, rise in zip(_labels(batch), rises, strict=False):
                sums[label] = sums.get(label, torch.zeros_like(rise)) + rise
                counts[label] = counts.get(label, 0) + 1
    finally:
        gated.train(training)
    if num_samples == 0:
        raise ValueError("no samples to measure importance on; the batches are empty")
    groups = {label: sums[label] / counts[label] for label in sums}
    return Importance(total / num_samples, macs.entry_macs(code).double().cpu(), groups, num_samples)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank.

    Raises:
        ValueError: fewer than two values, or unequal lengths.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"need two vectors of one length >= 2, got {list(a.shape)} and {list(b.shape)}")
    left, right = average_rank(a), average_rank(b)
    left, right = left - left.mean(), right - right.mean()
    scale = float(left.norm() * right.norm())
    return float(left @ right) / scale if scale > 0 else 0.0


def _rises(
    gated: GatedUNet, batch: ImportanceBatch, code: Tensor, chunk: int, progress: Callable[[int, int], None] | None
) -> Tensor:
    """float64 [n, dim]: how much each sample's squared error rises when an entry closes; minus infinity where nothing is open."""
    num_samples, everything = len(batch.sample), torch.arange(len(batch.sample))
    teacher = _forward(gated, batch, everything).float()
    if not teacher.isfinite().all():
        raise ValueError("the teacher's output holds NaN or infinity; check the latents' scale and the precision")

    def errors(codes: Tensor, sample: Tensor) -> Tensor:
        with gated.use(codes.to(batch.sample.device)):
            output = _forward(gated, batch, sample).float()
        return (output - teacher[sample.to(teacher.device)]).pow(2).flatten(1).mean(dim=1).double().cpu()

    before = torch.zeros(num_samples, dtype=torch.float64)
    if not code.all():
        before = torch.cat([errors(code.expand(len(rows), -1), rows) for rows in everything.split(chunk)])
    entries = gated.space.effective(code.int()).nonzero().flatten()
    rises = torch.zeros(num_samples * len(entries), dtype=torch.float64)
    for flat in torch.arange(len(rises)).split(chunk):
        sample, entry = flat // len(entries), entries[flat % len(entries)]
        codes = code.repeat(len(flat), 1)
        codes[torch.arange(len(flat)), entry] = False
        rises[flat] = errors(codes, sample) - before[sample]
        if progress is not None:
            progress(int(flat[-1]) + 1, len(rises))
    if not rises.isfinite().all():
        raise ValueError("closing an entry gave NaN or infinity; measure in float32 or bfloat16")
    found = torch.full((num_samples, len(code)), -torch.inf, dtype=torch.float64)
    found[:, entries] = rises.reshape(num_samples, len(entries))
    return found


def _forward(gated: GatedUNet, batch: ImportanceBatch, rows: Tensor) -> Tensor:
    rows = rows.to(batch.sample.device)
    mask = None if batch.text_mask is None else batch.text_mask[rows]
    return run_unet(gated, batch.sample[rows], batch.timesteps[rows], batch.text_states[rows], mask)


def _labels(batch: ImportanceBatch) -> Sequence[str]:
    if batch.labels is None:
        return []
    if len(batch.labels) != len(batch.sample):
        raise ValueError(f"{len(batch.labels)} labels for {len(batch.sample)} samples")
    return batch.labels
