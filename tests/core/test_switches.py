"""Every departure from the reference implementation is a switch: what each changes, by oracles, and what the defaults are."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from aptp_ray import sections
from aptp_ray.core import code_router, gates, prune_objective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import PRUNE_LOSSES, weighted_sum
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.relaxation import binarize, gumbel, relax
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.transport import balanced_assignment
from tests.core.objectives import SCHEDULER, WEIGHTS, make_batch, make_objective, randn
from tests.core.tiny import inputs_for, tiny_sd21

# Switch of the configuration -> who takes it as a keyword of the core.
SWITCHES = {
    ("Router", "centre"): code_router.CodeRouter,
    ("Router", "duals"): code_router.CodeRouter,
    ("Router", "relative_epsilon"): prune_objective.PruneObjective,
    ("Prune", "gate_placement"): gates.GatedUNet,
    **{
        ("Prune", name): prune_objective.PruneObjective
        for name in (
            "assignment", "unet_masks", "resource_masks", "noise_per", "noisy_similarity", "normalise_blocks", "contrastive_form",
            "contrastive_diagonal",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("section", "name"), SWITCHES)
def test_the_configuration_and_the_core_agree_on_a_switch(section: str, name: str) -> None:
    field = getattr(sections, section).model_fields[name]
    taker: Any = SWITCHES[section, name]
    assert inspect.signature(taker.__init__).parameters[name].default == field.default
    hint = get_type_hints(taker.__init__)[name]
    assert hint is bool or get_args(hint) == get_args(field.annotation)
    assert field.description


def test_defaults_are_the_designs() -> None:
    router, prune = sections.Router(), sections.Prune()
    assert (router.tau, router.base, router.epsilon, router.relative_epsilon) == (0.4, 3.0, 0.3, True)
    assert (router.centre, router.duals, prune.start, prune.warmup_fraction) == (True, True, "importance", 0.1)
    assert (prune.gate_placement, prune.unet_masks, prune.resource_masks) == ("after_norm", "soft", "hard")
    assert prune.assignment == "transport"
    assert (prune.noise_per, prune.noisy_similarity, prune.normalise_blocks) == ("code", False, True)
    assert (prune.contrastive_form, prune.contrastive_diagonal, prune.contrastive_temperature) == ("softmax", False, 0.03)
    assert prune.min_snr_gamma == 5.0
    assert prune.weights.model_dump() == WEIGHTS and tuple(prune.weights.model_dump()) == PRUNE_LOSSES
    with pytest.raises(ValueError, match="needs prune.noise_per=code"):
        sections.Prune(noisy_similarity=True, noise_per="sample")


def by_hand(objective: PruneObjective, batch: dict[str, Any], switch: dict[str, Any]) -> dict[str, Any]:
    """A step's assignment, ratios and teacher match, put together from its description."""
    router, noise = objective.router, batch["gumbel_noise"]
    codes = router.codes
    noisy = noise if switch.get("noisy_similarity") else None
    e = router.embed(batch["z"])
    left, right = router.features(e) - router.mean_embedding, router.features(codes, noisy) - router.mean_codes
    similarity = torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=2)
    index = balanced_assignment(
        similarity, epsilon=switch.get("assignment_epsilon", 0.3), relative=switch.get("relative_epsilon", True)
    ).index
    if switch.get("assignment") == "nearest":
        index = similarity.argmax(dim=1)
    per_sample = switch.get("noise_per") == "sample"
    soft = relax(codes[index], router.space, noise=noise if per_sample else noise[index])
    hard = binarize(soft, router.space)
    ratios = objective.macs.ratio(soft if switch.get("resource_masks") == "soft" else hard)
    noised = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    inputs = (noised, batch["timesteps"], batch["text_states"])
    expected = objective.gated(*inputs).sample
    with objective.gated.use(hard if switch.get("unet_masks") == "hard" else soft):
        output = objective.gated(*inputs).sample
    return {
        "counts": index.bincount(minlength=router.num_codes).tolist(),
        "similarity_std": float(similarity.std(correction=0)),
        "distillation": float((output - expected).pow(2).mean()),
        "resource": abs(np.log(float(ratios.mean()) / 0.65)),
        "peak": 1 - float(ratios.max()),
    }


@pytest.mark.parametrize(
    ("switch", "moves"),
    [
        ({"unet_masks": "hard"}, {"denoising", "distillation", "block"}),
        ({"resource_masks": "soft"}, {"resource", "spread", "peak"}),
        ({"noise_per": "sample"}, {"denoising", "distillation", "block", "resource", "spread", "peak"}),
        ({"noisy_similarity": True}, None),
        ({"contrastive_form": "binary"}, {"contrastive"}),
        ({"contrastive_diagonal": True}, {"contrastive"}),
        ({"normalise_blocks": False}, {"block"}),
        ({"gamma": None}, {"denoising"}),
        ({"assignment_epsilon": 0.05, "relative_epsilon": False}, None),
        ({"assignment": "nearest"}, None),
    ],
    ids=lambda switch: next(iter(switch)) if isinstance(switch, dict) else "",
)
def test_a_switch_of_the_step_changes_what_it_says(switch: dict[str, Any], moves: set[str] | None) -> None:
    base, other = make_objective().eval(), make_objective(**switch).eval()
    batch = make_batch(base, rows=6)
    changed_batch = batch | {"gumbel_noise": make_batch(other, rows=6)["gumbel_noise"]}
    (losses, _), (changed, stats) = base(**batch), other(**changed_batch)
    if moves is not None:
        assert moves == {n for n in PRUNE_LOSSES if not torch.allclose(losses[n], changed[n], rtol=1e-5, atol=1e-7)}
    with torch.no_grad():
        expected = by_hand(other, changed_batch, switch)
    assert stats["assignment_counts"] == expected["counts"]
    assert stats["similarity_std"] == pytest.approx(expected["similarity_std"], rel=1e-4)
    for name in ("distillation", "resource", "peak"):
        assert changed[name].item() == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
    if "relative_epsilon" in switch:
        assert stats["assignment_epsilon"] == 0.05
    weighted_sum(changed, WEIGHTS).backward()
    assert other.router.codes.grad is not None and float(other.router.codes.grad.abs().max()) > 0


def test_noisy_similarity_depends_on_the_steps_noise() -> None:
    for noisy in (False, True):
        objective = make_objective(noisy_similarity=noisy).eval()
        batch = make_batch(objective, rows=6)
        spreads = [objective(**batch)[1]["similarity_std"]]
        batch["gumbel_noise"] = gumbel(batch["gumbel_noise"].shape, torch.Generator().manual_seed(9))
        spreads.append(objective(**batch)[1]["similarity_std"])
        assert (spreads[0] != spreads[1]) == noisy


def test_nearest_assignment_trains_the_most_similar_code_and_no_other() -> None:
    """One code that every prompt is near to gets them all, and alone a gradient from the task; the transport shares them out."""
    counts, moved = {}, {}
    for rule in ("transport", "nearest"):
        objective = make_objective(assignment=rule).train()
        router, batch = objective.router, make_batch(objective, rows=6)
        router.centre = False
        with torch.no_grad():
            router.codes[1] = router.embed(batch["z"]).mean(dim=0)
            router.codes[[0, 2]] = router.codes[1] + 2 * randn(2, router.space.dim, seed=8)
        losses, stats = objective(**batch)
        losses["distillation"].backward()
        counts[rule] = stats["assignment_counts"]
        moved[rule] = (router.codes.grad.abs().amax(dim=1) > 0).tolist()
        # Nearest leaves no prices behind: serving's duals come from the last fit alone.
        assert bool(router.potentials.isfinite().all()) and bool(router.potentials.any()) == (rule == "transport")
        assert stats["agreement"] == 1.0 or rule == "transport"
    assert counts["nearest"] == [0, 6, 0] and min(counts["transport"]) >= 1
    assert moved == {"transport": [True, True, True], "nearest": [False, True, False]}


def test_uncentred_similarities_all_look_alike() -> None:
    objective = make_objective()
    router, z = objective.router, randn(32, 12, seed=4)
    centred = router.assign(z).similarity
    router.centre = False
    plain = router.assign(z).similarity
    with torch.no_grad():
        e, codes = router.features(router.embed(z)).double(), router.features(router.codes).double()
    expected = torch.nn.functional.cosine_similarity(e[:, None], codes[None], dim=2)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=0)
    assert float(plain.min()) > 0.9 and float(plain.std()) < 0.1 * float(centred.std())


def test_without_duals_a_prompt_goes_to_the_nearest_code(tmp_path: Path) -> None:
    z = randn(64, 12, seed=6)
    with_duals, without = make_objective().router, make_objective().router
    without.duals = False
    for router in (with_duals, without):
        router.fit_potentials(z)
    routing = without.assign(z)
    assert torch.equal(routing.expert, routing.similarity.argmax(dim=1))
    assert without.prices().tolist() == [0.0] * 3 != with_duals.prices().tolist()
    shares = [router.assign(z).expert.bincount(minlength=3) / 64 for router in (without, with_duals)]
    assert float((shares[0] - 1 / 3).abs().max()) > float((shares[1] - 1 / 3).abs().max())
    assert isinstance(without, PromptRouter)
    without.save_pretrained(tmp_path)
    loaded = PromptRouter.from_pretrained(tmp_path)
    assert not loaded.duals and torch.equal(loaded.assign(z).expert, routing.expert)
    # A router from before there was the switch has duals.
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"duals": false,', ""))
    assert PromptRouter.from_pretrained(tmp_path).duals


def test_a_start_from_zeros_is_the_whole_teacher_with_saturated_gates() -> None:
    objective = make_objective()
    space, macs = objective.router.space, objective.macs
    router = PromptRouter(space, z_dim=12, num_codes=2, generator=torch.Generator().manual_seed(0))
    assert not router.codes.any() and float(router.embed(randn(8, 12)).detach().abs().mean()) < 0.2
    soft = relax(router.codes.detach(), space, noise=gumbel((2, space.dim), torch.Generator().manual_seed(1)))
    assert float(macs.ratio(binarize(soft, space)).min()) > 0.9  # far above any budget worth having
    slopes = (soft * (1 - soft))[:, : space.num_width]
    assert float((slopes < 1e-3).double().mean()) > 0.5


def _gradients_by_kind(placement: Any) -> dict[str, float]:
    gated = GatedUNet(tiny_sd21(), gate_placement=placement)
    inputs = inputs_for(gated.unet)
    codes = torch.full((2, gated.space.dim), 0.9, requires_grad=True)
    with torch.no_grad():
        target = gated(**inputs).sample
    with gated.use(codes):
        (gated(**inputs).sample - target).square().mean().backward()
    gradient = codes.grad
    assert gradient is not None
    kinds = {site.kind for site in gated.space.sites}
    return {
        kind: float(torch.cat([gradient[:, s.slice].flatten() for s in gated.space.sites if s.kind == kind]).abs().mean())
        for kind in kinds
    }


def test_a_norm_undoes_a_gate_before_it() -> None:
    after, before = _gradients_by_kind("after_norm"), _gradients_by_kind("before_norm")
    assert before["resnet"] < 0.01 * after["resnet"]
    assert before["attention"] == pytest.approx(after["attention"], rel=0.5)


def test_gates_before_the_norm_scale_its_input_and_are_not_what_pruning_leaves() -> None:
    unet = tiny_sd21()
    gated = GatedUNet(unet, gate_placement="before_norm")
    plain = GatedUNet(tiny_sd21())
    inputs = inputs_for(unet, batch=1)
    site = next(s for s in gated.space.sites if s.kind == "resnet" and s.name.startswith("mid_block.resnets.0"))
    seen: list[Tensor] = []
    norm = unet.get_submodule(site.name).norm2
    code = torch.ones(1, gated.space.dim)
    code[0, site.start + 1] = 0.25
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        gated(**inputs)
        with gated.use(code):
            gated(**inputs)
        full, masked = seen
        full[:, site.channels : 2 * site.channels] *= 0.25
        torch.testing.assert_close(masked, full, rtol=1e-5, atol=1e-6)

        hard = gated.space.full_code()
        hard[site.start + 1] = False
        pruned = prune_unet(tiny_sd21(), hard)(**inputs).sample
        errors = {}
        for name, model in (("before", gated), ("after", plain)):
            with model.use(hard):
                errors[name] = float((model(**inputs).sample - pruned).abs().max() / pruned.abs().max())
    assert errors["after"] < 1e-5 and errors["before"] > 100 * errors["after"], errors
    with pytest.raises(ValueError, match="gate_placement 'inside'"):
        GatedUNet(tiny_sd21(), gate_placement="inside")  # type: ignore[arg-type]


def test_unknown_choices_are_refused() -> None:
    for name in ("assignment", "unet_masks", "resource_masks", "noise_per"):
        with pytest.raises(ValueError, match=f"unknown {name} 'other'"):
            make_objective(**{name: "other"})
