"""Balanced assignment of prompts to codes by entropic optimal transport (APTP, section 3.2; Cuturi 2013).

The plan spreads B prompts over K codes so that every code receives its share of the batch, whatever the similarities
look like. Its dual potentials are what remains useful after training: `argmax_k(similarity + epsilon * v_k)` reproduces
the plan's choice for one prompt at a time, without a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import ot
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """The result of one transport between B prompts and K codes.

    Attributes:
        index: [B] int64, the code of each prompt (its row's largest entry).
        plan: [B, K] float64, non-negative, sums to 1; rows sum to 1/B, columns to the target shares.
        potentials: [K] float64, the codes' dual variables `v`, dimensionless and centred to mean 0.
        epsilon: the absolute regularization used, in units of the similarity.
        converged: whether the columns met their shares within the tolerance.
        residual: largest relative violation of a column's share, `max_k |column_k / share_k - 1|`.
    """

    index: Tensor
    plan: Tensor
    potentials: Tensor
    epsilon: float
    converged: bool
    residual: float


def balanced_assignment(
    similarity: Tensor,
    *,
    epsilon: float = 0.3,
    relative: bool = True,
    shares: Tensor | None = None,
    max_iter: int = 5000,
    tol: float = 1e-3,
) -> Assignment:
    """Assigns every prompt to one code so that all codes get their share of the batch.

    Solves `max_P <P, similarity> + epsilon * entropy(P)` under uniform row sums and the given column sums. The duals
    are found at a decreasing series of regularizations, each warm-started from the last: Sinkhorn alone needs on the
    order of `range / epsilon` iterations, and small regularizations would not converge in a training step's time.

    Args:
        similarity: [B, K], larger is closer; carries no gradient through the assignment.
        epsilon: entropic regularization; multiplied by `std(similarity)` if `relative`. A fixed value makes the plan
            nearly uniform whenever similarities are close to one another, and its argmax noise.
        relative: whether `epsilon` is in units of the similarity's standard deviation.
        shares: [K] positive target shares, normalised here; uniform by default.
        max_iter: iterations at the final regularization.
        tol: relative violation of a column's share that counts as converged.

    Raises:
        ValueError: not a non-empty finite matrix, a non-positive `epsilon`, or shares that do not fit.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}; 0.3 (relative) is a good start")
    scores = _checked(similarity).numpy()
    target = _target_shares(shares, scores.shape[1])
    # Rows may be shifted freely without changing the plan; this keeps exponents small.
    scores = scores - scores.max(axis=1, keepdims=True)

    std = float(similarity.detach().double().std(correction=0))
    flat = std <= 1e-12 * max(1.0, float(similarity.detach().abs().max()))
    absolute = epsilon * (1.0 if flat else std) if relative else epsilon
    plan, log_v = _sinkhorn(scores, target, absolute, max_iter=max_iter, tol=tol)
    residual = float(np.abs(plan.sum(axis=0) / target - 1).max())
    potentials = log_v - log_v.mean()
    device = similarity.device
    # The same expression as serving uses (scores and duals), so that the two cannot disagree on rounding.
    index = prefer_lowest(torch.from_numpy(scores + absolute * potentials))
    return Assignment(
        index=index.to(device),
        plan=torch.from_numpy(plan).to(device),
        potentials=torch.from_numpy(potentials).to(device),
        epsilon=absolute,
        converged=residual <= tol,
        residual=residual,
    )


def nearest_assignment(similarity: Tensor) -> Assignment:
    """Assigns every prompt to its most similar code, the lowest index on ties, as if all shares were welcome.

    Args:
        similarity: [B, K], as for `balanced_assignment`.

    Returns:
        an assignment without prices: potentials and `epsilon` are 0; `residual` tells how far from uniform its shares are, and
        there was nothing to converge.

    Raises:
        ValueError: not a non-empty finite matrix.
    """
    scores = _checked(similarity)
    num_rows, num_codes = scores.shape
    index = prefer_lowest(scores)
    plan = torch.nn.functional.one_hot(index, num_codes).double() / num_rows
    return Assignment(
        index=index.to(similarity.device),
        plan=plan.to(similarity.device),
        potentials=torch.zeros(num_codes, dtype=torch.float64, device=similarity.device),
        epsilon=0.0,
        converged=True,
        residual=float((plan.sum(dim=0) * num_codes - 1).abs().max()),
    )


def prefer_lowest(scores: Tensor, tolerance: float = 1e-9) -> Tensor:
    """Row-wise argmax of [n, K] scores in which values within `tolerance` are a tie; the lowest index wins it.

    Torch's own argmax leaves ties open, and summation order makes equal codes differ in the last bits.
    """
    return (scores >= scores.amax(dim=1, keepdim=True) - tolerance).to(torch.uint8).argmax(dim=1)


def cluster_prompts(
    z: Tensor, num_clusters: int, *, generator: torch.Generator, rounds: int = 20, epsilon: float = 0.1
) -> Tensor:
    """Clusters prompt embeddings into groups of (nearly) equal size: k-means whose assignment step is a transport.

    Args:
        z: [n, z_dim] prompt embeddings.
        num_clusters: number of groups, at most n.
        generator: the source of the first centres (k-means++ on the cosine distance).
        rounds: most rounds of assignment and averaging; stops early when nothing moves.
        epsilon: relative regularization of each round's transport.

    Returns:
        [n] int64 cluster of each prompt; no cluster is empty.

    Raises:
        ValueError: fewer prompts than clusters, or too few distinct prompts.
    """
    if z.ndim != 2 or len(z) < num_clusters or num_clusters < 1:
        raise ValueError(f"cannot form {num_clusters} clusters of prompt embeddings shaped {list(z.shape)}")
    points = z.detach().to("cpu", torch.float64)
    # Sentence embeddings share a large common part, which would make all cosines alike.
    points = torch.nn.functional.normalize(points - points.mean(dim=0), dim=1, eps=1e-9)  # [n, z_dim]
    centres = _first_centres(points, num_clusters, generator)
    index = torch.full((len(points),), -1)
    for _ in range(rounds):
        previous, index = index, balanced_assignment(points @ centres.T, epsilon=epsilon).index
        counts = torch.bincount(index, minlength=num_clusters)
        if (counts == 0).any():
            raise ValueError(
                f"{int((counts == 0).sum())} of {num_clusters} clusters of {len(z)} prompts are empty; "
                "there are too few distinct prompts for so many codes: lower the number of codes or add prompts"
            )
        if torch.equal(previous, index):
            break
        sums = torch.zeros_like(centres).index_add_(0, index, points)
        centres = torch.nn.functional.normalize(sums, dim=1, eps=1e-9)
    return index.to(z.device)


def gather_rows(x: Tensor) -> Tensor:
    """Stacks the ranks' rows in rank order: [b, ...] -> [B, ...], B the sum of all b; the identity without a process group.

    The backward pass sums the gradients that all ranks computed for a row and hands them to the row's owner. Losses
    that every rank computes on the joined batch therefore get, under DistributedDataParallel's *mean* over ranks,
    exactly the gradient that one process would compute on that batch. Ranks may hold different numbers of rows; a rank's
    total loss then counts `b * world / B` times (means over its own rows, too, become those over all rows).
    """
    if not _in_group():
        return x
    return _GatherRows.apply(x, rows_of_ranks(x))  # type: ignore[no-any-return]


def rows_of_ranks(x: Tensor) -> list[int]:
    """How many rows each rank holds, in rank order."""
    if not _in_group():
        return [len(x)]
    mine = torch.tensor([len(x)], device=x.device)
    counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    return [int(count) for count in counts]


def own_rows(x: Tensor) -> slice:
    """Where this rank's rows lie in what `gather_rows` makes of `x`."""
    if not _in_group():
        return slice(0, len(x))
    begin = sum(rows_of_ranks(x)[: dist.get_rank()])
    return slice(begin, begin + len(x))


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        rank, most = dist.get_rank(), max(sizes)
        # An all_gather of unequal tensors would hang or return garbage, depending on the backend: all send as many rows.
        sent = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]).contiguous()
        parts = [torch.empty_like(sent) for _ in sizes]
        dist.all_gather(parts, sent)
        ctx.start, ctx.rows = sum(sizes[:rank]), sizes[rank]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.start : ctx.start + ctx.rows], None


def _checked(similarity: Tensor) -> Tensor:
    """The similarities [B, K] on the CPU in float64."""
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarity must be [prompts, codes] with at least one of each, got {list(similarity.shape)}")
    scores = similarity.detach().to("cpu", torch.float64)
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).any(dim=1).sum())
        raise ValueError(f"similarity holds NaN or infinity in {bad} of {len(scores)} rows; did the logits diverge?")
    return scores


def _target_shares(shares: Tensor | None, num_codes: int) -> np.ndarray:
    if shares is None:
        return np.full(num_codes, 1.0 / num_codes)
    target = shares.detach().to("cpu", torch.float64).numpy()
    if target.shape != (num_codes,) or not np.isfinite(target).all() or (target <= 0).any():
        raise ValueError(f"shares must be {num_codes} positive numbers, got {target.tolist()}")
    return target / target.sum()


def _sinkhorn(
    scores: np.ndarray, target: np.ndarray, epsilon: float, *, max_iter: int, tol: float
) -> tuple[np.ndarray, np.ndarray]:
    """The plan [B, K] and the codes' log scalings [K] at `epsilon`, by POT in the log domain."""
    # POT's torch backend: on matrices as small as these, SciPy's logsumexp takes ten times as long (measured).
    cost, shares = torch.from_numpy(-scores), torch.from_numpy(target)
    rows = torch.full((len(scores),), 1.0 / len(scores), dtype=torch.float64)
    # POT stops on the Euclidean norm of the absolute violation, which bounds every column's.
    threshold = 0.5 * tol * float(target.min())
    span = float(scores.max() - scores.min())
    levels = [epsilon]
    while levels[0] < 0.25 * span:
        levels.insert(0, 4 * levels[0])
    log_u, log_v = torch.zeros_like(rows), torch.zeros_like(shares)
    plan, previous = torch.outer(rows, shares), levels[0]
    for level in levels:
        scale = previous / level  # epsilon * log_v, a price, is what carries over from one level to the next
        plan, log = ot.bregman.sinkhorn_log(
            rows, shares, cost, level, numItermax=max_iter, stopThr=threshold, log=True, warn=False,
            warmstart=(log_u * scale, log_v * scale),
        )  # fmt: skip
        log_u, log_v, previous = log["log_u"], log["log_v"], level
    return plan.numpy(), log_v.numpy()


def _first_centres(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding: each next centre is drawn with probability proportional to its distance to the nearest."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < num_clusters:
        distance = (1 - points @ points[chosen].T).amin(dim=1).clamp_min(0)
        distance[chosen] = 0
        if float(distance.sum()) <= 1e-9 * math.sqrt(len(points)):
            raise ValueError(
                f"only {len(chosen)} distinct prompts for {num_clusters} clusters; lower the number of codes"
            )
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return points[chosen]
