"""The prune stage: predictor and codes learn under the MACs budget, then each code becomes binary."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import Config, ConfigError
from aptp_ray.core.baselines import bk_sdm_blocks
from aptp_ray.core.budget import HardCodes
from aptp_ray.core.collapse import largest_of_pairs, overlaps
from aptp_ray.core.components import denoiser_config
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.hardening import harden_codes, start_logits
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.core.relaxation import binarize, gumbel
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import compile_unet
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.data import schema
from aptp_ray.encoding import Encoding
from aptp_ray.train.ablation import measured_path
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.feed import Rows
from aptp_ray.train.loop import Parts
from aptp_ray.train.sizes import measured_codes, same_code
from aptp_ray.train.watch import CodeWatch
from aptp_ray.train.worker import Worker, fast_attention, load_with_costs, noise_schedule, text_states_of, tuned

# Prompts of each split that the job hands in: on the training split's, codes part and the transport's duals are fitted; the
# validation split's weigh the hardened codes.
ROUTING_PROMPTS = 8192
# Held-out prompts of which some are listed in the log by the expert that they go to.
LISTED = 512


def prune_worker(settings: dict[str, Any]) -> None:
    """Measures importance, trains the router, hardens the codes, and writes ``router`` and ``routing.json``.

    Args:
        settings: see ``launch``; and ``encoding``, and references to raw columns: ``samples`` (``training_columns`` of
            the rows for importance), ``needs`` (the same and z, where ``prune.hardening`` asks for it), ``prompts`` (z) and
            ``validation_prompts`` (z and captions). The job reads these once for all workers.
    """
    worker = Worker.start(settings)
    config, spec, loop = worker.config, worker.config.prune, worker.config.prune.loop
    encoding = Encoding.from_json(settings["encoding"])
    teacher_dir = worker.run.local("teacher")

    # -- teacher, its prunable sites and their MACs -----------------------------------------------------------------------------
    unet, macs = load_with_costs(teacher_dir, encoding, config.router.depth)
    unet = tuned(fast_attention(unet, worker.place.device).to(worker.place.device), loop)
    gated = GatedUNet(unet, macs.space, gate_placement=spec.gate_placement)
    schedule = noise_schedule(teacher_dir)
    draws = Draws(loop.seed, "prune", loop.global_batch_size, encoding, len(schedule.alphas_cumprod))

    # -- where codes start ---------------------------------------------------------------------------------------------
    text_states = text_states_of(encoding, teacher_dir, worker.place.device)
    path = None
    if spec.start == "importance" or spec.hardening != "masks":
        samples = decode_encoded(ray.get(settings["samples"]), encoding, text_states)
        again = spec.importances_at if spec.hardening != "masks" else []
        path = measured_path(worker, gated, macs, samples, schedule.alphas_cumprod, again)
    score = path.importances[0].score if path is not None and spec.start == "importance" else None
    router = new_router(config, gated.space, macs, score, encoding.embedding_dim)
    embeddings = prompt_embeddings(ray.get(settings["prompts"]))
    objective = PruneObjective(
        router,
        gated,
        macs,
        alphas_cumprod=schedule.alphas_cumprod,
        prediction_type=schedule.prediction_type,
        budget=spec.budget,
        gamma=spec.min_snr_gamma,
        assignment=spec.assignment,
        assignment_epsilon=config.router.epsilon,
        relative_epsilon=config.router.relative_epsilon,
        temperature=spec.contrastive_temperature,
        contrastive_form=spec.contrastive_form,
        contrastive_diagonal=spec.contrastive_diagonal,
        unet_masks=spec.unet_masks,
        resource_masks=spec.resource_masks,
        noise_per=spec.noise_per,
        noisy_similarity=spec.noisy_similarity,
        normalise_blocks=spec.normalise_blocks,
        chunks=loop.accumulation,
    )
    if loop.compile:
        compile_unet(gated.unet)
    warmup = round(loop.steps * spec.warmup_fraction)
    held_out = ray.get(settings["validation_prompts"])
    watch = CodeWatch(
        config, objective, worker.name, list(held_out[schema.CAPTION][:LISTED]), prompt_embeddings(held_out)[:LISTED]
    )

    def inputs(rows: dict[str, Any], step: int, mine: slice) -> dict[str, Any]:
        if step == warmup:  # codes part here; a run resumed later has them in its checkpoint
            router.initialise_codes(embeddings, generator=keyed_generator(loop.seed, "codes"))
        return drawn(rows, step, mine, step < warmup)

    def drawn(rows: dict[str, Any], step: int, mine: slice, in_warmup: bool) -> dict[str, Any]:
        generator = keyed_generator(loop.seed, "gumbel", step)
        per_sample = in_warmup or spec.noise_per == "sample"
        noise = gumbel((loop.global_batch_size if per_sample else router.num_codes, gated.space.dim), generator)
        return draws(rows, step, mine) | {
            "text_mask": None,
            "z": torch.from_numpy(rows["embedding"]),
            "gumbel_noise": noise[mine] if per_sample else noise,
            "phase": "warmup" if in_warmup else "codes",
        }

    def save_router(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        transport = router.fit_potentials(
            embeddings, epsilon=config.router.epsilon, relative=config.router.relative_epsilon
        )
        shares = routed_shares(router, prompt_embeddings(held_out))
        if path is not None and spec.hardening == "needs":
            needs = decode_encoded(ray.get(settings["needs"]), encoding, text_states)
            hard = measured_codes(worker, router, gated, path, rows=needs, shares=shares, alphas=schedule.alphas_cumprod)
        elif path is not None and spec.hardening == "shared":
            hard = same_code(router, path, spec.budget)
        else:
            hard = harden(config, router, macs, shares)
        write_router(worker.run, config, router, macs, hard, shares)
        return {
            "macs_ratio": round(hard.macs_ratio, 5),
            "budget": spec.budget,
            "transport_converged": bool(transport.converged),
            "largest_overlap": round(largest_of_pairs(overlaps(hard.codes)), 4),
            "experts": [
                {"macs_ratio": round(float(ratio), 4), "share": round(float(share), 4)}
                for ratio, share in zip(hard.ratios, shares, strict=True)
            ],
        }

    parts = Parts(
        module=objective,
        groups=[
            {"params": list(router.predictor.parameters()), "lr": spec.predictor_lr, "weight_decay": 0.0},
            {"params": [router.codes], "lr": spec.code_lr, "weight_decay": 0.0},
        ],
        inputs=inputs,
        validation_inputs=lambda rows, index, mine, done: drawn(rows, -1 - index, mine, done <= warmup),
        by_row=False,  # prompts are compared with one another; the objective cuts what can be cut
        decode=lambda rows: decode_encoded(rows, encoding, text_states),
        save=save_router,
        weights=spec.weights.model_dump(),
        look=watch,
        # Teacher and masked forward, and a backward pass to the masks alone; a masked channel is computed all the same.
        macs_per_sample=3 * macs.total,
    )
    worker.train(parts, loop)


def check_budget(config: Config) -> None:
    """Refuses a budget that no code can meet, and a rule for codes that does not fit the teacher, from its config alone.

    Raises:
        ConfigError: with the range that is within reach, or what the rule is for.
    """
    teacher = config.teacher
    if teacher.unet is not None and teacher.unet.model is not None:
        shape = teacher.unet.model
        kind: Any = UNet2DConditionModel
    else:
        source = resolve_source(teacher.source or "", config.storage_options)
        try:
            kind, shape = denoiser_config(source, revision=teacher.revision)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"teacher.source={teacher.source!r} holds no unet that can be pruned ({str(error).splitlines()[0]}): name a "
                "diffusers pipeline directory, a hub id that exists, or an fsspec URI"
            ) from error
    with torch.device("meta"):
        unet = kind.from_config(shape)
    side = unet.config["sample_size"]
    space = ArchitectureSpace.of(unet, depth=config.router.depth)
    if config.prune.codes == "block_removal":
        try:
            bk_sdm_blocks(space)
        except ValueError as error:
            raise ConfigError(f"prune.codes=block_removal: {error}") from error
    macs = MacsModel.measure(unet, latent_size=(side, side), num_tokens=teacher.max_tokens, space=space)
    smallest = binarize(torch.zeros(1, space.dim), space, config.router.alignment)
    floor = float(macs.ratio(smallest.double())[0])
    if config.prune.budget < floor:
        raise ConfigError(
            f"prune.budget={config.prune.budget} is below the floor {floor:.3f}: what cannot be pruned, and one step of every "
            f"site at router.alignment={config.router.alignment}; raise the budget or lower the alignment"
        )


def new_router(
    config: Config, space: ArchitectureSpace, macs: MacsModel, score: Tensor | None, embedding_dim: int
) -> PromptRouter:
    """Returns a router whose codes start at the budget, what is worth its MACs most open; without a score, at zeros."""
    start = None if score is None else start_logits(
        score,
        macs,
        space,
        budget=config.prune.budget,
        generator=keyed_generator(config.prune.loop.seed, "start"),
        tau=config.router.tau,
        base=config.router.base,
        ordered_depth=config.router.depth_order == "protected",
    )
    router = PromptRouter(
        space,
        z_dim=embedding_dim,
        num_codes=config.router.experts,
        generator=keyed_generator(config.prune.loop.seed, "router"),
        hidden_dim=config.router.hidden,
        start_logits=start,
        tau=config.router.tau,
        base=config.router.base,
        ordered_depth=config.router.depth_order == "protected",
        centre=config.router.centre,
        duals=config.router.duals,
        macs=macs.to_dict(),
    )
    source = config.router.prompt_encoder
    encoder = PromptEncoder.from_pretrained(resolve_source(source, config.storage_options))
    encoder.source = source  # as the config names it: a path of this machine means nothing on another
    return router.attach(encoder)


def routed_shares(router: PromptRouter, validation: Tensor) -> Tensor:
    """Returns the shares [K] that routing gives on validation prompts."""
    experts = router.assign(validation).expert
    return experts.bincount(minlength=router.num_codes).double() / len(experts)


def harden(config: Config, router: PromptRouter, macs: MacsModel, shares: Tensor) -> HardCodes:
    """Makes the codes binary by their own masks within the budget, weighted by the shares."""
    hard = harden_codes(
        router.codes,
        router.space,
        macs,
        budget=config.prune.budget,
        shares=shares,
        alignment=config.router.alignment,
        base=config.router.base,
        ordered_depth=router.ordered_depth,
    )
    router.set_hard_codes(hard.codes)
    return hard


def write_router(run: RunDir, config: Config, router: PromptRouter, macs: MacsModel, hard: HardCodes, shares: Tensor) -> None:
    """Writes ``router`` and then ``routing.json``."""
    with run.writing("router") as folder:
        router.save_pretrained(folder)
    experts = [
        {
            "id": index,
            "macs": macs.exact(code),
            "macs_ratio": round(float(ratio), 6),
            "share": round(float(share), 6),
        }
        for index, (code, ratio, share) in enumerate(zip(hard.codes, hard.ratios, shares, strict=True))
    ]
    figures = {"budget": config.prune.budget, "macs_ratio": hard.macs_ratio, "teacher_macs": macs.total, "experts": experts}
    run.write_json(figures, "routing.json")


def prompt_embeddings(rows: Rows) -> Tensor:
    """Returns z of prompts, float32 [n, dim]."""
    return torch.from_numpy(np.stack(list(rows[schema.EMBEDDING])).astype(np.float32))
