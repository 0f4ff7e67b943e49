from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aptp_ray.core.collapse import (
    CodeStatistics,
    code_statistics,
    collapse_warning,
    embedding_spread,
    largest_of_pairs,
    mean_of_pairs,
    overlaps,
    perplexity,
)
from aptp_ray.core.hardening import harden_codes
from tests.core.objectives import make_batch, make_objective

UNIFORM = torch.full((4,), 0.25)


def statistics(overlap: float = 0.94, ratios: tuple[float, ...] = (0.6, 0.62, 0.68, 0.7)) -> CodeStatistics:
    matrix = torch.full((len(ratios), len(ratios)), 0.9, dtype=torch.float64).fill_diagonal_(1.0)
    if len(ratios) > 1:
        matrix[1, 0] = matrix[0, 1] = overlap
    return CodeStatistics(matrix - 1.0, matrix, torch.tensor(ratios, dtype=torch.float64))


def warn(codes: CodeStatistics | None = None, **changes: Any) -> str | None:
    healthy: dict[str, Any] = {
        "shares": UNIFORM, "routed_shares": UNIFORM, "embedding_spread": 0.05, "agreement": 0.85, "floor": 0.2, "budget": 0.65,
    }  # fmt: skip
    return collapse_warning(codes or statistics(), **healthy | changes)


def test_perplexity_counts_the_codes_in_use() -> None:
    assert perplexity(UNIFORM) == pytest.approx(4.0)
    assert perplexity(torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(1.0)
    assert perplexity(torch.tensor([1, 1, 0, 0])) == pytest.approx(2.0)
    p = np.array([0.5, 0.3, 0.2])
    assert perplexity(torch.from_numpy(p)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    for bad in (torch.zeros(3), torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="shares"):
            perplexity(bad)


def test_pairs_and_overlaps() -> None:
    codes = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]]).bool()
    matrix = overlaps(codes)
    assert matrix.tolist() == [[1.0, 0.75, 0.0], [0.75, 1.0, 0.25], [0.0, 0.25, 1.0]]
    assert largest_of_pairs(matrix) == 0.75 and mean_of_pairs(matrix) == pytest.approx(1 / 3)
    assert largest_of_pairs(matrix[:1, :1]) == mean_of_pairs(matrix[:1, :1]) == 0.0


def test_a_healthy_state_gives_no_warning() -> None:
    assert warn() is None
    # Unequal shares and sizes are what tailoring to prompts may look like.
    assert warn(statistics(ratios=(0.4, 0.5, 0.8, 0.9)), shares=torch.tensor([0.4, 0.3, 0.2, 0.1])) is None
    assert warn(statistics(ratios=(0.65,)), shares=torch.ones(1), routed_shares=torch.ones(1)) is None
    # What was asked for is no collapse.
    assert warn(statistics(ratios=(1.0, 1.0, 1.0, 1.0)), budget=1.0) is None


@pytest.mark.parametrize(
    ("planted", "says", "knobs"),
    [
        ({"codes": statistics(overlap=0.995)}, "codes 0 and 1 have become one", ["prune.code_lr", "router.experts"]),
        ({"shares": torch.tensor([0.9, 0.1, 0.0, 0.0])}, "transport uses 1.4 of 4", ["router.epsilon"]),
        ({"shares": torch.tensor([1.0, 0.0, 0.0, 0.0]), "transport": False}, "train 1.0 of 4", ["prune.assignment=transport"]),
        ({"routed_shares": torch.tensor([0.0, 1.0, 0.0, 0.0])}, "routing would use 1.0 of 4", ["prune.weights.commitment"]),
        ({"routed_shares": torch.tensor([0.0, 1.0, 0.0, 0.0]), "duals": False}, "routing would use", ["router.duals=true"]),
        ({"agreement": 0.2}, "agrees with the transport for 20%", ["prune.weights.commitment", "router.epsilon"]),
        ({"embedding_spread": 1e-5}, "all prompts look alike", ["prune.weights.contrastive", "prune.predictor_lr"]),
        ({"codes": statistics(ratios=(0.21, 0.7, 0.8, 0.8))}, "code 0 has nothing left", ["prune.weights.spread"]),
        ({"codes": statistics(ratios=(0.5, 0.5, 0.99, 0.5))}, "code 2 is the whole teacher", ["prune.weights.peak"]),
    ],
)
def test_a_planted_collapse_is_named_with_its_knob(planted: dict[str, Any], says: str, knobs: list[str]) -> None:
    text = warn(**planted)
    assert text is not None and says in text and "\n" not in text
    assert all(knob in text for knob in knobs), text


def test_every_knob_is_a_field_of_the_configuration() -> None:
    from aptp_ray.config import Config

    everything = collapse_warning(
        statistics(overlap=1.0, ratios=(0.2, 0.999)), shares=torch.tensor([1.0, 0.0]), routed_shares=torch.tensor([1.0, 0.0]),
        embedding_spread=0.0, agreement=0.0, floor=0.2, budget=0.65,
    )  # fmt: skip
    routed = warn(routed_shares=torch.tensor([1.0, 0.0, 0.0, 0.0]), duals=False)
    disagreeing = warn(agreement=0.0)
    assert everything is not None and routed is not None and disagreeing is not None
    assert len(everything.splitlines()) == 5
    words = {word.strip(",.:;()").split("=")[0] for word in f"{everything} {routed} {disagreeing}".split()}
    knobs = {word for word in words if word.startswith(("prune.", "router."))}
    assert len(knobs) >= 8
    for knob in knobs:
        section: Any = Config
        for name in knob.split("."):
            section = section.model_fields[name].annotation


def test_statistics_of_a_routers_codes() -> None:
    objective = make_objective(codes=4)
    router, macs = objective.router, objective.macs
    found = code_statistics(router, macs)
    with torch.no_grad():
        features = (router.features(router.codes) - router.mean_codes).double()
    expected = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=2)
    torch.testing.assert_close(found.cosine, expected, atol=1e-5, rtol=0)
    # Hardening at the budget that the codes have anyway moves nothing.
    hard = harden_codes(router.codes, router.space, macs, budget=float(found.ratios.mean()), alignment=1, tolerance=1e-6)
    torch.testing.assert_close(found.ratios, hard.ratios)
    torch.testing.assert_close(found.overlap, overlaps(hard.codes))
    metrics = found.metrics()
    assert metrics["code_overlap_max"] == largest_of_pairs(found.overlap) < 1
    assert metrics["code_ratio_min"] == float(found.ratios.min()) < metrics["code_ratio_max"]
    with torch.no_grad():
        router.codes[2] = router.codes[1]
    merged = code_statistics(router, macs)
    assert merged.metrics()["code_overlap_max"] == 1.0 and float(merged.cosine[1, 2]) == pytest.approx(1.0)
    assert "codes 1 and 2 have become one" in str(warn(merged))


def test_embedding_spread() -> None:
    features = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    assert embedding_spread(features) == 0.0
    assert embedding_spread(torch.tensor([[2.0, 4.0], [4.0, 4.0]])) == pytest.approx(1 / 5)


def test_the_step_keeps_running_shares_and_says_how_many_codes_are_in_use() -> None:
    objective = make_objective().train()
    counts: list[Tensor] = []
    for step in range(3):
        _, stats = objective(**make_batch(objective, rows=6, seed=step))
        counts.append(torch.tensor(stats["assignment_counts"]).double() / 6)
    running = counts[0]
    for share in counts[1:]:
        running = 0.9 * running + 0.1 * share
    torch.testing.assert_close(objective.shares, running)
    assert stats["assignment_perplexity"] == pytest.approx(perplexity(running))
    assert 1 <= stats["routed_perplexity"] <= 3 and stats["embedding_spread"] > 1e-3
    state = objective.shares.clone()
    _, stats = objective.eval()(**make_batch(objective, rows=6, seed=9))
    assert torch.equal(objective.shares, state)
    assert stats["assignment_perplexity"] == pytest.approx(perplexity(torch.tensor(stats["assignment_counts"])))


def test_a_predictor_that_knows_one_prompt_only_is_noticed() -> None:
    objective = make_objective()
    with torch.no_grad():
        objective.router.predictor[3].weight.mul_(1e-6)
    _, stats = objective.eval()(**make_batch(objective, rows=6))
    text = warn(embedding_spread=stats["embedding_spread"])
    assert text is not None and "look alike" in text
