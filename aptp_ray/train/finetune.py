"""Fine-tuning: one UNet under all experts' masks first, then each expert, cut out, on its own prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import numpy as np
import ray.train
import torch
from torch import Tensor, nn

from aptp_ray.config import Loop, RatedLoop
from aptp_ray.core.components import load_backbone
from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.macs import count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import compile_unet
from aptp_ray.data import schema
from aptp_ray.encoding import Encoding
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.loop import Parts, held_out, make_feed
from aptp_ray.train.worker import (
    Worker,
    exact_products,
    fast_attention,
    load_teacher_model,
    noise_schedule,
    text_states_of,
    tuned,
)

SHARED = ("train", "finetune-shared", "unet")

# Relative, of float32 sums in another order: outputs agree to 5e-7, hence losses, squared errors that are a hundredth of the
# outputs' squares and more, to 1e-5. One matrix that was not inherited moves them by 2e-4 and more.
ROUNDING = 1e-4

# Validation prompts among which those are found that an expert draws for the log.
HELD_OUT = 512


def shared_worker(settings: dict[str, Any]) -> None:
    """Trains one UNet on all prompts, every sample under the masks of its own expert."""
    worker = Worker.start(settings)
    loop = worker.config.finetune.shared
    assert loop is not None
    router = PromptRouter.from_pretrained(worker.run.local("router")).requires_grad_(False)
    teacher = load_teacher(worker, loop)
    student = GatedUNet(tuned(fast_attention(deepcopy(teacher), worker.place.device), loop), router.space)
    codes = router.hard_codes.clone()

    def routed(rows: dict[str, Any]) -> dict[str, Any]:
        return {"codes": codes[router.assign(torch.from_numpy(rows["embedding"])).expert]}

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        with worker.run.writing(*SHARED) as folder:
            student.unet.save_pretrained(folder)
        return {}

    def artists() -> Iterator[tuple[Any, list[int]]]:
        for expert in experts.unique().tolist():
            yield prune_unet(student.unet, codes[expert], router.space), (experts == expert).nonzero().flatten().tolist()

    parts = finetune_parts(worker, student, teacher, loop, settings, "shared", routed, save)
    prompts, embeddings = held_out_prompts(settings)
    prompts = prompts[: worker.config.tracking.samples]
    experts = router.assign(embeddings[: len(prompts)]).expert
    parts.draw = worker.grid(prompts, artists, teacher)
    worker.train(parts, loop)


def expert_worker(settings: dict[str, Any]) -> None:
    """Cuts one expert out of the UNet that was trained together and trains it on its own prompts."""
    worker = Worker.start(settings)
    loop, expert = settings.get("loop", worker.config.finetune.apart), settings["expert"]
    router = PromptRouter.from_pretrained(worker.run.local("router"))
    code = router.hard_codes[expert]
    teacher = load_teacher(worker, loop)
    shared = worker.run.exists(*SHARED)
    whole = load_backbone(worker.run.local(*SHARED)) if shared else deepcopy(teacher)
    fast_attention(whole, worker.place.device)
    student = tuned(prune_unet(whole, code, router.space), loop)
    encoding = Encoding.from_json(settings["encoding"])
    routing = worker.run.read_json("routing.json")

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        counted = count_macs(student, latent_size=encoding.latent_shape[1:], num_tokens=encoding.num_tokens)
        promised = routing["experts"][expert]["macs"]
        if counted != promised:
            raise RuntimeError(f"expert {expert} has {counted} MACs, its code promised {promised}: the router was replaced")
        facts = {
            **routing["experts"][expert],
            "counted_macs": counted,
            "teacher_macs": routing["teacher_macs"],
            "parameters": sum(p.numel() for p in student.parameters()),
            "rows": worker.rows.num_rows,
            "steps": loop.steps,
            "train_seconds": figures["train_seconds"],
            "inherited": worker.run.read_json(*kept),
            **{name: value for name, value in figures.items() if name.startswith("validation/")},
        }
        with worker.run.writing("experts", str(expert)) as folder:
            student.save_pretrained(folder)
            worker.run.write_json(facts, "train", worker.name, "expert.json")
            (folder / "expert.json").write_bytes(worker.run.read_bytes("train", worker.name, "expert.json"))
        return facts

    prompts, embeddings = held_out_prompts(settings)
    own = (router.assign(embeddings).expert == expert).nonzero().flatten()[: worker.config.tracking.samples].tolist()
    purpose, kept = f"expert-{expert}", ("train", worker.name, "inherited.json")
    parts = finetune_parts(worker, student, teacher, loop, settings, purpose, lambda rows: {}, save)
    parts.draw = worker.grid([prompts[index] for index in own], lambda: [(student, range(len(own)))], teacher)
    if ray.train.get_checkpoint() is None:
        rows = worker.rows if worker.validation is None else worker.validation
        feed = make_feed(rows, loop, worker.place, parts)
        inputs = next(held_out(parts, feed, 1, 0, worker.place))
        objective = cast(FinetuneObjective, parts.module).to(worker.place.device)
        masked = GatedUNet(whole.to(worker.place.device), router.space)
        losses = inherited_losses(objective, masked, code, inputs, worker.name)
        if worker.place.rank == 0:
            worker.run.write_json(losses, *kept)
            shown = "; ".join(f"{loss} {value:.6g} = {losses['masked'][loss]:.6g}" for loss, value in losses["expert"].items())
            print(f"[{worker.name}] before the first step, expert = masked model: {shown}", file=sys.stderr, flush=True)
    del whole
    worker.train(parts, loop)


def held_out_prompts(settings: dict[str, Any]) -> tuple[list[str], Tensor]:
    """Returns captions of the validation split, and their z [n, dim]."""
    rows = settings["held_out"]
    return list(rows[schema.CAPTION]), torch.from_numpy(np.stack(list(rows[schema.EMBEDDING])).astype(np.float32))


def inherited_losses(
    objective: FinetuneObjective, masked: GatedUNet, code: Tensor, inputs: dict[str, Any], name: str
) -> dict[str, dict[str, float]]:
    """Proves that an expert starts from the weights that it was cut out of: before its first step, it is the masked model.

    Args:
        objective: the expert's.
        masked: what it was cut out of.
        code: bool [dim], its masks.
        inputs: of the objective.
        name: of the run.

    Returns:
        the losses of ``expert`` and ``masked``, over this rank's rows of one global batch.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    reference = FinetuneObjective(
        masked,
        objective.teacher,
        alphas_cumprod=objective.alphas_cumprod,
        prediction_type=objective.prediction_type,
        gamma=objective.gamma,
        normalise_blocks=objective.normalise_blocks,
    )
    codes = code.to(objective.alphas_cumprod.device).expand(len(inputs["latents"]), -1)
    with torch.no_grad(), exact_products():
        found = {"expert": objective.eval()(**inputs)[0], "masked": reference.eval()(**inputs, codes=codes)[0]}
    objective.train()
    reference.release()
    losses = {model: {name: float(value) for name, value in values.items()} for model, values in found.items()}
    for loss, value in losses["expert"].items():
        if not math.isclose(value, losses["masked"][loss], rel_tol=ROUNDING, abs_tol=1e-6):
            raise RuntimeError(
                f"[{name}] the expert does not start from the weights of the model that it is cut out of: its {loss} loss "
                f"is {value:.6g}, the masked model's {losses['masked'][loss]:.6g}. Was {'/'.join(SHARED)} or the router replaced "
                "meanwhile? Run the finetune stage again with overwrite"
            )
    return losses


def load_teacher(worker: Worker, loop: Loop) -> Any:
    """Returns the teacher's model, in evaluation mode."""
    unet = load_teacher_model(worker.run.local("teacher"))
    if loop.channels_last:
        unet.to(memory_format=torch.channels_last)
    return fast_attention(unet, worker.place.device).eval()


def finetune_parts(
    worker: Worker,
    student: nn.Module,
    teacher: Any,
    loop: RatedLoop,
    settings: dict[str, Any],
    purpose: str,
    routed: Any,
    save: Any,
) -> Parts:
    """Puts together what both phases share: teacher match, keyed draws, caption dropout."""
    spec = worker.config.finetune
    encoding = Encoding.from_json(settings["encoding"])
    schedule = noise_schedule(worker.run.local("teacher"))
    text_states = text_states_of(encoding, worker.run.local("teacher"), worker.place.device)
    draws = Draws(
        loop.seed,
        purpose,
        loop.global_batch_size,
        encoding,
        len(schedule.alphas_cumprod),
        spec.caption_dropout,
        torch.tensor(settings["empty_states"]),
    )
    objective = FinetuneObjective(
        student,
        teacher,
        alphas_cumprod=schedule.alphas_cumprod,
        prediction_type=schedule.prediction_type,
        gamma=spec.min_snr_gamma,
    )
    if loop.compile:
        compile_unet(student.unet if isinstance(student, GatedUNet) else student)
    return Parts(
        module=objective,
        groups=[{"params": list(student.parameters()), **loop.optimizer.rates()}],
        inputs=lambda rows, step, mine: draws(rows, step, mine) | routed(rows),
        decode=lambda rows: decode_encoded(rows, encoding, text_states),
        save=save,
        weights=spec.weights.model_dump(),
        # The teacher's forward, and the student's with a backward pass to inputs and weights.
        macs_per_sample=sum(
            passes * count_macs(unet, encoding.latent_shape[1:], encoding.num_tokens)
            for passes, unet in ((1, teacher), (3, student.unet if isinstance(student, GatedUNet) else student))
        ),
    )
