"""Fine-tuning: one UNet under all experts' masks first, then each expert, cut out, on its own prompts."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from aptp_ray.config import RatedLoop
from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.macs import count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.router import PromptRouter
from aptp_ray.encoding import Encoding
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.loop import Parts
from aptp_ray.train.worker import Worker, fast_attention, noise_schedule, text_states_of

SHARED = ("train", "finetune-shared", "unet")


def shared_worker(settings: dict[str, Any]) -> None:
    """Trains one UNet on all prompts, every sample under the masks of its own expert."""
    worker = Worker.start(settings)
    loop = worker.config.finetune.shared
    assert loop is not None
    router = PromptRouter.from_pretrained(worker.run.local("router")).requires_grad_(False)
    teacher = load_teacher(worker)
    student = GatedUNet(fast_attention(deepcopy(teacher), worker.place.device))
    codes = router.hard_codes.clone()

    def routed(rows: dict[str, Any]) -> dict[str, Any]:
        return {"codes": codes[router.assign(torch.from_numpy(rows["embedding"])).expert]}

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        with worker.run.writing(*SHARED) as folder:
            student.unet.save_pretrained(folder)
        return {}

    worker.train(finetune_parts(worker, student, teacher, loop, settings, "shared", routed, save), loop)


def expert_worker(settings: dict[str, Any]) -> None:
    """Cuts one expert out of the UNet that was trained together and trains it on its own prompts."""
    worker = Worker.start(settings)
    loop, expert = worker.config.finetune.apart, settings["expert"]
    router = PromptRouter.from_pretrained(worker.run.local("router"))
    code = router.hard_codes[expert]
    teacher = load_teacher(worker)
    shared = worker.run.exists(*SHARED)
    whole = UNet2DConditionModel.from_pretrained(worker.run.local(*SHARED)) if shared else deepcopy(teacher)
    student = prune_unet(whole, code)
    fast_attention(student, worker.place.device)
    encoding = Encoding.from_json(settings["encoding"])
    routing = worker.run.read_json("routing.json")

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        counted = count_macs(student, latent_size=encoding.latent_shape[1:], num_tokens=encoding.text_shape[0])
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
        }
        with worker.run.writing("experts", str(expert)) as folder:
            student.save_pretrained(folder)
            worker.run.write_json(facts, "train", worker.name, "expert.json")
            (folder / "expert.json").write_bytes(worker.run.read_bytes("train", worker.name, "expert.json"))
        return facts

    worker.train(finetune_parts(worker, student, teacher, loop, settings, f"expert-{expert}", lambda rows: {}, save), loop)


def load_teacher(worker: Worker) -> UNet2DConditionModel:
    """Returns the teacher's UNet, in evaluation mode."""
    unet = UNet2DConditionModel.from_pretrained(worker.run.local("teacher"), subfolder="unet")
    return fast_attention(unet, worker.place.device).eval()


def finetune_parts(
    worker: Worker,
    student: nn.Module,
    teacher: UNet2DConditionModel,
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
    return Parts(
        module=objective,
        groups=[{"params": list(student.parameters()), **loop.optimizer.rates()}],
        inputs=lambda rows, step, mine: draws(rows, step, mine) | routed(rows),
        decode=lambda rows: decode_encoded(rows, encoding, text_states),
        save=save,
        weights=spec.weights.model_dump(),
        # The teacher's forward, and the student's with a backward pass to inputs and weights.
        macs_per_sample=sum(
            passes * count_macs(unet, encoding.latent_shape[1:], encoding.text_shape[0])
            for passes, unet in ((1, teacher), (3, student.unet if isinstance(student, GatedUNet) else student))
        ),
    )
