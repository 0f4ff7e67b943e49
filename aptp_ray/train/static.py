"""The prune stage without learning: one code for all prompts, by a rule. What a learned mixture has to beat at equal cost."""

from __future__ import annotations

from typing import Any

import ray
import torch
from torch import Tensor

from aptp_ray.config import Config
from aptp_ray.core.ablation import AblationPath
from aptp_ray.core.baselines import bk_sdm_blocks, norm_pruning, random_pruning
from aptp_ray.core.budget import HardCodes
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.encoding import Encoding
from aptp_ray.train.ablation import measured_path
from aptp_ray.train.draws import decode_encoded
from aptp_ray.train.launch import record_outcome
from aptp_ray.train.prune import new_router, prompt_embeddings, write_router
from aptp_ray.train.worker import Worker, fast_attention, load_with_costs, noise_schedule, text_states_of


def static_worker(settings: dict[str, Any]) -> None:
    """Finds one code by ``prune.codes`` and writes ``router`` and ``routing.json``, as ``prune_worker`` does.

    Args:
        settings: as of ``prune_worker``.
    """
    worker = Worker.start(settings)
    encoding = Encoding.from_json(settings["encoding"])
    teacher_dir, device = worker.run.local("teacher"), worker.place.device
    unet, macs = load_with_costs(teacher_dir, encoding, worker.config.router.depth)
    gated = GatedUNet(fast_attention(unet, device).to(device), macs.space)
    path = None
    if worker.config.prune.codes == "ablation_greedy":
        samples = decode_encoded(ray.get(settings["samples"]), encoding, text_states_of(encoding, teacher_dir, device))
        spec = worker.config.prune
        sizes = [size for size in spec.importances_at if size > spec.budget]
        path = measured_path(worker, gated, macs, samples, noise_schedule(teacher_dir).alphas_cumprod, sizes)
    if worker.place.rank > 0:
        return
    code = static_code(worker.config, gated, macs, path)
    router = new_router(worker.config, macs.space, macs, None, encoding.embedding_dim)
    prompts = prompt_embeddings(ray.get(settings["prompts"]))
    epsilon, relative = worker.config.router.epsilon, worker.config.router.relative_epsilon
    router.fit_potentials(prompts, epsilon=epsilon, relative=relative)
    ratio = macs.ratio(code[None].double())
    hard = HardCodes(codes=code[None], ratios=ratio, macs_ratio=float(ratio[0]), offset=0.0, flips=0)
    router.set_hard_codes(hard.codes)
    write_router(worker.run, worker.config, router, macs, hard, torch.ones(1))
    budget, ratio_of_one = worker.config.prune.budget, round(hard.macs_ratio, 5)
    record_outcome(worker.run, worker.name, {"codes": worker.config.prune.codes, "budget": budget, "macs_ratio": ratio_of_one})


def static_code(config: Config, gated: GatedUNet, macs: MacsModel, path: AblationPath | None) -> Tensor:
    """Returns the code bool [dim] that ``prune.codes`` names.

    Args:
        config: the whole tree.
        gated: the teacher.
        macs: the MACs of its codes.
        path: codes by measured importance; for ablation_greedy alone.

    Raises:
        ValueError: if the budget cannot be met.
    """
    rule, budget, alignment = config.prune.codes, config.prune.budget, config.router.alignment
    if rule == "ablation_greedy":
        assert path is not None
        return path.code(budget)
    if rule == "norm":
        return norm_pruning(macs.space, macs, budget, unet=gated.unet, alignment=alignment)
    if rule == "random":
        generator = keyed_generator(config.prune.loop.seed, "random code")
        return random_pruning(macs.space, macs, budget, generator=generator, alignment=alignment)
    return bk_sdm_blocks(macs.space)
