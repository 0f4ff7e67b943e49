"""Prompt embedding z -> architecture embedding e -> nearest architecture code, all in tensors (APTP, section 3).

What the prune stage trains. `router.py` adds what serving needs around it: captions and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aptp_ray.core.relaxation import relax
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.core.transport import Assignment, balanced_assignment, cluster_prompts, prefer_lowest

_CHUNK = 4096  # rows of [n, dim] float64 masks held at once


@dataclass(frozen=True)
class Routing:
    """Where prompts go.

    Attributes:
        expert: [n] int64.
        similarity: [n, K] float64, the cosines before the dual potentials are added.
    """

    expert: Tensor
    similarity: Tensor


class CodeRouter(nn.Module):
    """Architecture predictor and codes: embeds prompt embeddings, compares them with the codes, and picks one.

    Parameters that learn are `predictor` and `codes` [K, dim] (logits). Buffers: `hard_codes` [K, dim] bool with
    `hardened`; `potentials` [K] and `epsilon` of the transport that balances serving; `mean_embedding` and `mean_codes`
    [dim], the running means that centre the two sides of the similarity.
    """

    codes: nn.Parameter
    hard_codes: Tensor
    hardened: Tensor
    potentials: Tensor
    epsilon: Tensor
    mean_embedding: Tensor
    mean_codes: Tensor
    mean_steps: Tensor
    _entry_weight: Tensor

    def __init__(
        self,
        space: ArchitectureSpace,
        *,
        z_dim: int,
        num_codes: int,
        generator: torch.Generator,
        hidden_dim: int | None = None,
        start_logits: Tensor | None = None,
        predictor_gain: float = 0.1,
        tau: float = 0.4,
        base: float = 3.0,
        ordered_depth: bool = True,
        centre: bool = True,
        duals: bool = True,
        mean_momentum: float = 0.9,
        macs: dict[str, Any] | None = None,
    ) -> None:
        """Builds a router with freshly drawn weights.

        Args:
            space: the teacher's prunable sites.
            z_dim: length of a prompt embedding.
            num_codes: K, the number of experts.
            generator: CPU generator of the initial weights.
            hidden_dim: width of the predictor's hidden layer; `z_dim` by default.
            start_logits: [dim] that e starts near for every prompt (see `hardening.start_logits`); zeros, the paper's
                start, by default.
            predictor_gain: standard deviation of e around `start_logits` over prompts at the start.
            tau: temperature of the relaxation.
            base: offset of the relaxation.
            ordered_depth: whether blocks close in a fixed order, as in the paper, or any of them first.
            centre: whether each side of the similarity is centred by its running mean. Without it all embeddings look
                alike, since the masks of any two of them share most entries.
            duals: whether `assign` adds the transport's dual potentials to the similarity; False takes the nearest code
                alone, as the reference does, whatever shares that gives.
            mean_momentum: share of the old running mean that an update keeps.
            macs: `MacsModel.to_dict()`, stored beside the weights.
        """
        super().__init__()
        if num_codes < 1:
            raise ValueError(f"num_codes must be at least 1, got {num_codes}")
        self.space, self.macs = space, macs
        self.z_dim, self.hidden_dim, self.num_codes = z_dim, hidden_dim or z_dim, num_codes
        self.tau, self.base, self.centre, self.mean_momentum = tau, base, centre, mean_momentum
        self.duals, self.ordered_depth = duals, ordered_depth
        start = torch.zeros(space.dim) if start_logits is None else start_logits.detach().float().cpu()
        if start.shape != (space.dim,):
            raise ValueError(f"start_logits must be [{space.dim}] as the space has entries, got {list(start.shape)}")
        self.predictor = _make_predictor(z_dim, self.hidden_dim, start, predictor_gain, generator)
        self.codes = nn.Parameter(start.repeat(num_codes, 1))
        self.register_buffer("hard_codes", torch.ones(num_codes, space.dim, dtype=torch.bool))
        self.register_buffer("hardened", torch.tensor(False))
        self.register_buffer("potentials", torch.zeros(num_codes, dtype=torch.float64))
        self.register_buffer("epsilon", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean_embedding", torch.zeros(space.dim))
        self.register_buffer("mean_codes", torch.zeros(space.dim))
        self.register_buffer("mean_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_entry_weight", _entry_weights(space), persistent=False)

    # -- embedding, similarity, assignment --------------------------------------------------------------------------

    def embed(self, z: Tensor) -> Tensor:
        """Architecture embeddings e [n, dim] (logits) of prompt embeddings z [n, z_dim]."""
        return self.predictor(z)

    def features(self, logits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Uncentred vectors whose cosine compares architectures.

        Masks without noise (APTP, section 3.2, compares noisy ones); a closed block takes its widths with it; a site
        of n entries counts as much as a site of one.

        Args:
            logits: [..., dim] of embeddings or codes.
            noise: [..., dim] Gumbel draws, for the noisy comparison.

        Returns:
            [..., dim], in the precision of `logits`.
        """
        return self.space.effective(self.soft_masks(logits, noise)) * self._entry_weight.to(logits.dtype)

    def soft_masks(self, logits: Tensor, noise: Tensor | float | None = None) -> Tensor:
        """Soft masks [..., dim] of logits [..., dim], as this router's relaxation makes them."""
        return relax(logits, self.space, noise=noise, tau=self.tau, base=self.base, ordered_depth=self.ordered_depth)

    def centred(self, features: Tensor, mean: Tensor) -> Tensor:
        """Features [..., dim] less a running mean [dim] (`mean_embedding` or `mean_codes`), made unit vectors."""
        if self.centre:
            features = features - mean.to(features.dtype)
        # Squares of nearly equal masks underflow no float32 at this size, and a single code's zero vector stays zero.
        return nn.functional.normalize(features, dim=-1, eps=1e-8)

    def similarity(self, e: Tensor, *, codes: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Cosines [n, K] of embeddings e [n, dim] and codes (`self.codes` by default), as floating as `e`.

        Args:
            e: architecture embeddings.
            codes: [K, dim] logits in place of the router's own.
            noise: [K, dim] Gumbel draws for the codes' side, as the reference has them.
        """
        codes = (self.codes if codes is None else codes).to(e.dtype)
        left = self.centred(self.features(e), self.mean_embedding)
        return left @ self.centred(self.features(codes, noise), self.mean_codes).T

    @torch.no_grad()
    def update_means(self, e: Tensor) -> None:
        """Moves the running means toward the joined batch's embeddings e [B, dim] and the codes as they are."""
        keep = self.mean_momentum if int(self.mean_steps) else 0.0
        for mean, logits in ((self.mean_embedding, e), (self.mean_codes, self.codes)):
            mean.lerp_(self.features(logits.float()).mean(dim=0), 1 - keep)
        self.mean_steps += 1

    @torch.no_grad()
    def assign(self, z: Tensor) -> Routing:
        """Routes prompt embeddings: `argmax_k(similarity + epsilon * v_k)`, the lowest index on ties.

        With `duals=False`, `argmax_k(similarity)`.

        In float64 from the predictor on, and row by row: a prompt's result depends on no other row.

        Args:
            z: [n, z_dim].

        Raises:
            ValueError: a wrong shape, or NaN.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"z must be [n, {self.z_dim}], got {list(z.shape)}; is it another encoder's?")
        parts = [self._similarity64(rows) for rows in z.to(self.codes.device).split(_CHUNK)]
        similarity = torch.cat(parts) if parts else torch.zeros(0, self.num_codes, dtype=torch.float64)
        if not similarity.isfinite().all():
            raise ValueError("similarity holds NaN or infinity: the prompt embeddings or the router's weights do")
        if not len(similarity):
            return Routing(torch.zeros(0, dtype=torch.int64, device=similarity.device), similarity)
        return Routing(prefer_lowest(similarity + self.prices()), similarity)

    def _similarity64(self, z: Tensor) -> Tensor:
        weights = {name: value.double() for name, value in self.predictor.named_parameters()}
        return self.similarity(functional_call(self.predictor, weights, (z.double(),)))

    def prices(self) -> Tensor:
        """What routing adds to the similarities, float64 [K] and in their units; zeros with `duals=False`."""
        return self.epsilon * self.potentials * float(self.duals)

    # -- fitting on the training prompts -----------------------------------------------------------------------------

    @torch.no_grad()
    def initialise_codes(self, z: Tensor, *, generator: torch.Generator, rounds: int = 20) -> Tensor:
        """Parts the codes after the warm-up: each becomes the mean e of one of K clusters of training prompts.

        Args:
            z: [n, z_dim] embeddings of training prompts, n >= K.
            generator: seeds the clustering.
            rounds: most rounds of the clustering.

        Returns:
            [n] int64, the cluster of each prompt. The running means start anew from these prompts.
        """
        index = cluster_prompts(z, self.num_codes, generator=generator, rounds=rounds).to(self.codes.device)
        e = torch.cat([self.embed(rows) for rows in z.to(self.codes).split(_CHUNK)])  # [n, dim]
        sums = torch.zeros_like(self.codes).index_add_(0, index, e)
        self.codes.copy_(sums / index.bincount(minlength=self.num_codes).unsqueeze(1))
        self.mean_steps.zero_()
        self.update_means(e)
        return index

    @torch.no_grad()
    def fit_potentials(
        self, z: Tensor, *, epsilon: float = 0.3, relative: bool = True, shares: Tensor | None = None
    ) -> Assignment:
        """One transport between training prompts z [n, z_dim] and the codes; stores its duals for serving.

        Args:
            z: training prompts' embeddings.
            epsilon: regularization, as in `balanced_assignment`.
            relative: likewise.
            shares: [K] of the traffic that each expert is to get; uniform by default.
        """
        assignment = balanced_assignment(self.assign(z).similarity, epsilon=epsilon, relative=relative, shares=shares)
        self.potentials.copy_(assignment.potentials)
        self.epsilon.fill_(assignment.epsilon)
        return assignment

    @torch.no_grad()
    def track_potentials(self, assignment: Assignment, momentum: float = 0.9) -> None:
        """Keeps running duals of the training steps' transports: balanced routing before `fit_potentials`."""
        keep = momentum if float(self.epsilon) > 0 else 0.0
        new = assignment.epsilon * assignment.potentials.to(self.potentials)
        prices = keep * self.epsilon * self.potentials + (1 - keep) * new
        self.epsilon.fill_(keep * float(self.epsilon) + (1 - keep) * assignment.epsilon)
        self.potentials.copy_(prices / self.epsilon)

    @torch.no_grad()
    def set_hard_codes(self, codes: Tensor) -> None:
        """Stores the experts' binary codes, bool [K, dim]."""
        if codes.shape != self.hard_codes.shape or codes.dtype != torch.bool:
            expected = list(self.hard_codes.shape)
            raise ValueError(f"hard codes must be bool {expected}, got {codes.dtype} {list(codes.shape)}")
        self.hard_codes.copy_(codes)
        self.hardened.fill_(True)


def _make_predictor(
    z_dim: int, hidden_dim: int, start: Tensor, gain: float, generator: torch.Generator
) -> nn.Sequential:
    """z -> hidden -> e (APTP, section 3.1); the last bias is the start, the last weights spread e around it."""
    first = nn.utils.skip_init(nn.Linear, z_dim, hidden_dim)
    last = nn.utils.skip_init(nn.Linear, hidden_dim, len(start))
    # The norm makes a step independent of the embedding's scale (unit vectors have entries of 1 / sqrt(z_dim)).
    norm = nn.LayerNorm(hidden_dim)
    with torch.no_grad():
        first.weight.normal_(std=1.0, generator=generator)
        first.bias.zero_()
        # GELU of a standard normal has a mean square of about .43.
        last.weight.normal_(std=gain / (0.43 * hidden_dim) ** 0.5, generator=generator)
        last.bias.copy_(start)
    return nn.Sequential(first, norm, nn.GELU(), last)


def _entry_weights(space: ArchitectureSpace) -> Tensor:
    """sqrt(1 / width) of each entry's site, [dim] float32: every site weighs the same in the dot product."""
    widths = torch.tensor([site.width for site in space.sites], dtype=torch.float64)
    return widths.rsqrt().repeat_interleave(widths.long()).float()
