from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aptp_ray.core.ablation import ablate
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import Importance, ImportanceBatch, measure_importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.sizes import match_error
from tests.core.tiny import inputs_for, tiny_sd21

PLAIN = tiny_sd21()
GATED = GatedUNet(tiny_sd21())
SPACE = GATED.space
MACS = MacsModel.measure(PLAIN, (8, 8), 5, SPACE)


def batch(rows: int = 2, seed: int = 0) -> ImportanceBatch:
    inputs = inputs_for(PLAIN, batch=rows, seed=seed, size=8)
    return ImportanceBatch(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])


def half_open() -> Tensor:
    """A code without one block, and with half of the entries of every width site."""
    code = SPACE.full_code()
    for site in SPACE.width_sites:
        code[site.start + max(1, site.width // 2) : site.start + site.width] = False
    code[SPACE.num_width] = False
    return code


def test_under_a_code_the_rise_is_that_of_a_unet_pruned_further() -> None:
    code, rows = half_open(), batch()
    found = measure_importance(GATED, [rows], macs=MACS, code=code, chunk=61)
    inputs = {"sample": rows.sample, "timestep": rows.timesteps, "encoder_hidden_states": rows.text_states}

    @torch.no_grad()
    def error(of: Tensor) -> float:
        return float((prune_unet(PLAIN, of)(**inputs).sample - PLAIN(**inputs).sample).pow(2).mean())

    live = SPACE.effective(code.double()) > 0
    kinds = {site.kind: site for site in SPACE.sites if live[site.slice].any() and (site.kind == "depth" or site.width > 2)}
    assert len(kinds) == 4
    for site in kinds.values():
        further = code.clone()
        further[site.start] = False
        assert float(found.score[site.start]) == pytest.approx(error(further) - error(code), rel=1e-3, abs=1e-9)
        assert int(found.entry_macs[site.start]) == MACS.exact(code) - MACS.exact(further)
    # What is closed, or lies in the closed block, is not judged.
    assert torch.equal(found.score.isneginf(), ~live) and not live[code].all()
    assert (found.entry_macs[~live] == 0).all()


def test_a_code_is_part_of_the_measured_one_above_it_and_of_its_size() -> None:
    path = ablate(MACS, lambda code, before: measure_importance(GATED, [batch(1, before)], macs=MACS, code=code), [0.6, 0.8])
    sizes = (0.9, 0.8, 0.7, 0.6, 0.5)
    codes = [path.code(size) for size in sizes]
    for size, code in zip(sizes, codes, strict=True):
        assert MACS.exact(code) / MACS.total == pytest.approx(size, rel=5e-3)
        for site in SPACE.width_sites:
            assert int(code[site.slice].sum()) * site.channels % 8 == 0
    _, first, between, second, last = codes
    for small, large in ((between, first), (second, first), (last, second)):  # of the measured one next above it
        assert not (SPACE.effective(small.int()) > SPACE.effective(large.int())).any()  # in a closed block, anything may be open


def test_measured_again_entries_that_stand_in_for_one_another_are_not_both_lost() -> None:
    """Of every site, a first and a second half that do the same: either alone costs nothing, both together everything."""
    halves = [(site.start, site.start + site.width // 2, site.start + site.width) for site in SPACE.width_sites if site.width > 1]

    def measure(code: Tensor | None, before: int) -> Importance:
        score = torch.full((SPACE.dim,), 1.0, dtype=torch.float64)
        for start, middle, end in halves:
            for own, other in ((slice(start, middle), slice(middle, end)), (slice(middle, end), slice(start, middle))):
                gone = code is not None and not code[other].all()
                score[own] = 10.0 if gone else 0.1
        entry_macs = MACS.entry_macs(code).double()
        score *= entry_macs
        return Importance(score if code is None else score.masked_fill(~code, -torch.inf), entry_macs)

    def lost(code: Tensor) -> int:
        return sum(not code[start:middle].all() and not code[middle:end].all() for start, middle, end in halves)

    once, again = ablate(MACS, measure, [], alignment=1), ablate(MACS, measure, [0.9, 0.8, 0.7], alignment=1)
    assert lost(again.code(0.6)) < lost(once.code(0.6))


def test_the_way_ends_before_a_size_that_is_out_of_reach() -> None:
    calls = list[int]()

    def measure(code: Tensor | None, before: int) -> Importance:
        calls.append(before)
        return Importance(torch.ones(SPACE.dim, dtype=torch.float64), MACS.entry_macs(code).double())

    path = ablate(MACS, measure, [0.01, 0.9])
    assert len(path.codes) == 2 and calls == [0, 1]
    with pytest.raises(ValueError, match="out of reach"):
        path.code(0.01)
    assert match_error(GATED, path.code(1.0), batch()) == pytest.approx(0, abs=1e-9)
