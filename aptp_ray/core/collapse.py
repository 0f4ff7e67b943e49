"""Do the codes stay K different codes in use? Figures to log while they learn, and a warning that names the knob.

A mixture can collapse in three places: prompts all look alike to the predictor, codes become the same, or the assignment
uses only a few of them. Each has figures of its own, since centred cosines alone hide the first two: what is left of equal
vectors without their mean is noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aptp_ray.core.code_router import CodeRouter
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.relaxation import GUMBEL_MEDIAN, binarize

# Embeddings nearer to their mean than this part of its length differ by less than 1e-6 of a cosine.
LEAST_EMBEDDING_SPREAD = 1e-3
# Two codes that agree in more entries than this are one; a demo's finished codes agree in .93 to .94 of theirs.
LARGEST_OVERLAP = 0.99
# Of what K codes in use allow beyond a single one: 1 + .5 * (4 - 1) = 2.5 for four codes.
LEAST_PERPLEXITY = 0.5
LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class CodeStatistics:
    """What K codes are like, by their noise-free masks.

    Attributes:
        cosine: [K, K] float64 of their centred features, as the similarity sees them.
        overlap: [K, K] float64, the share of entries in which their hard masks agree.
        ratios: [K] float64, MACs of their hard masks over the teacher's.
    """

    cosine: Tensor
    overlap: Tensor
    ratios: Tensor

    def metrics(self) -> dict[str, float]:
        """Scalars by name, for a log: largest and mean cosine and overlap of two codes, smallest and largest ratio."""
        return {
            "code_cosine_max": largest_of_pairs(self.cosine),
            "code_cosine_mean": mean_of_pairs(self.cosine),
            "code_overlap_max": largest_of_pairs(self.overlap),
            "code_overlap_mean": mean_of_pairs(self.overlap),
            "code_ratio_min": float(self.ratios.min()),
            "code_ratio_max": float(self.ratios.max()),
        }


@torch.no_grad()
def code_statistics(router: CodeRouter, macs: MacsModel) -> CodeStatistics:
    """Compares a router's codes with one another, as they are: before hardening fits them to the budget.

    Hard masks are those at the Gumbel's median, which half of the noisy masks exceed.
    """
    features = router.centred(router.features(router.codes.double()), router.mean_codes)  # [K, dim]
    median = router.soft_masks(router.codes.double(), GUMBEL_MEDIAN)
    hard = binarize(median, router.space)
    return CodeStatistics((features @ features.T).cpu(), overlaps(hard), macs.ratio(hard).cpu())


def overlaps(codes: Tensor) -> Tensor:
    """Share of entries in which each two of K hard codes [K, dim] agree: float64 [K, K]."""
    return (codes[:, None] == codes[None]).double().mean(dim=-1).cpu()


def perplexity(shares: Tensor) -> float:
    """How many codes are in use: `exp(entropy)` of shares [K], between 1 and K.

    Raises:
        ValueError: negative shares, or none above zero.
    """
    p = shares.detach().double().cpu()
    if not (p >= 0).all() or not p.sum() > 0:
        raise ValueError(f"shares must be non-negative with a positive sum, got {p.tolist()}")
    p = p / p.sum()
    return float(torch.special.entr(p).sum().exp())


def embedding_spread(features: Tensor) -> float:
    """Root mean square distance of features [B, dim] from their mean, over the length of the mean.

    Args:
        features: uncentred (`CodeRouter.features`) of a batch's embeddings.
    """
    mean = features.mean(dim=0)
    return float((features - mean).pow(2).sum(dim=1).mean().sqrt() / mean.norm().clamp_min(1e-12))


def largest_of_pairs(matrix: Tensor) -> float:
    """The largest entry [K, K] off the diagonal; 0 for a single code."""
    return max((float(value) for value in _pairs(matrix)), default=0.0)


def mean_of_pairs(matrix: Tensor) -> float:
    """The mean entry [K, K] off the diagonal; 0 for a single code."""
    pairs = _pairs(matrix)
    return float(pairs.mean()) if len(pairs) else 0.0


def collapse_warning(
    codes: CodeStatistics,
    *,
    shares: Tensor,
    routed_shares: Tensor,
    embedding_spread: float,
    agreement: float,
    floor: float,
    budget: float,
    duals: bool = True,
    transport: bool = True,
) -> str | None:
    """Says what has collapsed, and which knob of the configuration to turn.

    Args:
        codes: of `code_statistics`.
        shares: [K] running shares that the assignment gave.
        routed_shares: [K] running shares that deterministic routing would have given.
        embedding_spread: of the last batch.
        agreement: share of prompts that deterministic routing sends where the assignment does.
        floor: the MACs ratio of the smallest possible code.
        budget: of the mean ratio.
        duals: whether routing uses the transport's duals.
        transport: whether the assignment is the transport's; else each prompt trains its nearest code.

    Returns:
        One line for each thing that collapsed, or None. A single code cannot collapse.
    """
    num_codes = len(codes.ratios)
    if num_codes < 2:
        return None
    found = []
    if embedding_spread < LEAST_EMBEDDING_SPREAD:
        found.append(
            f"all prompts look alike to the architecture predictor (spread {embedding_spread:.1e}): raise "
            "prune.weights.contrastive or prune.predictor_lr, or lower prune.weights.commitment"
        )
    if (largest := largest_of_pairs(codes.overlap)) > LARGEST_OVERLAP:
        a, b = _largest_pair(codes.overlap)
        found.append(
            f"codes {a} and {b} have become one ({largest:.1%} of their entries agree): lower prune.code_lr, raise "
            "prune.warmup_fraction so that they part further, or lower router.experts"
        )
    least = 1 + LEAST_PERPLEXITY * (num_codes - 1)
    if (used := perplexity(shares)) < least and not transport:
        found.append(f"prompts train {used:.1f} of {num_codes} codes, their nearest ones: set prune.assignment=transport")
    elif used < least:
        found.append(
            f"the transport uses {used:.1f} of {num_codes} codes: lower router.epsilon (at a large one the plan is nearly "
            "uniform, and a prompt's largest entry is chance), or raise prune.loop.global_batch_size"
        )
    elif (used := perplexity(routed_shares)) < least:
        knob = "raise prune.weights.commitment" if duals else "set router.duals=true"
        found.append(f"routing would use {used:.1f} of {num_codes} codes, though the transport uses them all: {knob}")
    elif agreement < LEAST_AGREEMENT:
        found.append(
            f"routing agrees with the transport for {agreement:.0%} of the prompts: raise prune.weights.commitment, which "
            "holds embeddings and their codes together, or lower router.epsilon"
        )
    found += _extreme_sizes(codes.ratios, floor, budget)
    return "\n".join(found) or None


def _extreme_sizes(ratios: Tensor, floor: float, budget: float) -> list[str]:
    """Codes that have lost nearly all that can be pruned, or nothing."""
    found = []
    smallest, largest = float(ratios.min()), float(ratios.max())
    if smallest < floor + 0.05 * (budget - floor):
        found.append(
            f"code {int(ratios.argmin())} has nothing left to prune (MACs ratio {smallest:.3f}, the floor is {floor:.3f}): "
            "lower prune.weights.spread and prune.weights.peak, or raise prune.weights.distillation"
        )
    if largest > 1 - 0.05 * (1 - budget):
        found.append(
            f"code {int(ratios.argmax())} is the whole teacher (MACs ratio {largest:.3f}), and the others pay for it: lower "
            "prune.weights.peak and prune.weights.spread"
        )
    # At a budget of 1, or at the floor, that is what was asked for.
    return found if floor < budget < 1 else []


def _pairs(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    return matrix[rows, columns]


def _largest_pair(matrix: Tensor) -> tuple[int, int]:
    rows, columns = torch.triu_indices(len(matrix), len(matrix), offset=1)
    best = int(matrix[rows, columns].argmax())
    return int(rows[best]), int(columns[best])
