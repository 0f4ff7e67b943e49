"""The prune stage's switches, each turned on the demo: what the hardened codes are worth before any fine-tuning, and after some.

Every variant starts from the shipped config, sees the same rows in the same order under the same draws, and is judged on the
same held-out rows with the same noise: the error against the teacher's output, relative to that output's mean square.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from aptp_ray.artifacts import RunDir, open_run
from aptp_ray.config import Config, load_config
from aptp_ray.core.collapse import largest_of_pairs, overlaps, perplexity
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import add_noise
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import run_unet
from aptp_ray.encoding import Encoding
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.feed import first_rows
from aptp_ray.train.finetune import shared_worker
from aptp_ray.train.launch import launch
from aptp_ray.train.prune import prune_worker
from aptp_ray.train.worker import fast_attention, noise_schedule
from cli import DEMO_CONFIG, ray_session
from rows import encode_rows, reader_of

# What the shipped config departs from, one at a time, as the reference has it; and all of it together.
REFERENCE = {
    "start from zeros": ["prune.start=zeros"],
    "similarity not centred": ["router.centre=false"],
    "absolute epsilon of .05": ["router.relative_epsilon=false", "router.epsilon=0.05"],
    "no duals in routing": ["router.duals=false"],
    "no commitment": ["prune.weights.commitment=0"],
    "contrast with diagonal, entry by entry": ["prune.contrastive_diagonal=true", "prune.contrastive_form=binary"],
    "masks before the norm": ["prune.gate_placement=before_norm"],
    "block errors as they are": ["prune.normalise_blocks=false", "prune.weights.block=0.02"],
    "soft MACs": ["prune.resource_masks=soft"],
    "noise for each sample": ["prune.noise_per=sample"],
}
OTHERS = {"no contrast": ["prune.weights.contrastive=0"], "hard masks in the UNet": ["prune.unet_masks=hard"]}
HELD_OUT, BATCH = 512, 64
_SIZES = ["data.source.train_images=4000", "data.source.validation_images=512", "tracking.mode=disabled"]
_SHARED = ["finetune.shared.steps=100", "finetune.shared.checkpoint_every_steps=100"]


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every variant; returns its figures by name, those of the shipped config first."""
    joined = [option for name, options in REFERENCE.items() if name != "noise for each sample" for option in options]
    variants = {"as shipped": [], "all as the reference": joined, **REFERENCE, **OTHERS}
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(DEMO_CONFIG, [f"run_dir={folder}/run", *_SIZES, *_SHARED])
        run = open_run(config)
        run.prepare(config)
        from aptp_ray.train.teacher import import_teacher

        import_teacher(config, run)
        with ray_session(config):
            for split in ("train", "validation"):
                encode_rows(config, run, split, ("encoded", split), run.address("teacher"))
            for number, (name, options) in enumerate(variants.items()):
                turned = load_config(DEMO_CONFIG, [f"run_dir={folder}/run", *_SIZES, *_SHARED, *options])
                figures[name] = variant(turned, run, f"{number:02d}")
                say(f"{name}: {figures[name]}")
    return {"switches": figures}


def variant(config: Config, run: RunDir, label: str) -> dict[str, float]:
    """Prunes and fine-tunes together; returns errors before and after, and how codes and routing came out."""
    from stages import finetune_extra, prune_run

    launched = prune_run(config, run)
    outcome = launch(prune_worker, config=config, run=run, name=f"prune-{label}", **launched)
    router = PromptRouter.from_pretrained(run.local("router"))
    error, routed = masked_error(config, run, router)
    shared = launch(
        shared_worker,
        config=config,
        run=run,
        name=f"shared-{label}",
        loop=config.finetune.shared,
        rows=launched["rows"],
        validation=launched["validation"],
        extra=finetune_extra(config, run, ("encoded", "train")),
    )
    return {
        "error": round(error, 5),
        "error_after_finetuning": round(shared["validation/distillation"], 5),
        "macs_ratio": outcome["macs_ratio"],
        "experts_in_use": round(perplexity(routed.bincount(minlength=router.num_codes)), 2),
        "largest_overlap": round(largest_of_pairs(overlaps(router.hard_codes)), 3),
    }


@torch.no_grad()
def masked_error(config: Config, run: RunDir, router: PromptRouter) -> tuple[float, torch.Tensor]:
    """Squared error of the teacher under its prompts' codes against itself, over its mean square; and who went where [n]."""
    torch.set_num_threads(2)
    folder, encoding = run.local("teacher"), Encoding.from_json(run.read_json("encoded", "encoding.json"))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    gated = GatedUNet(fast_attention(unet, torch.device("cpu")))
    schedule = noise_schedule(folder)
    reader = reader_of(config, run, "encoded", "validation", embedding=True)
    rows = decode_encoded(first_rows(reader, HELD_OUT), encoding)
    drawn = Draws(0, "switches", HELD_OUT, encoding, len(schedule.alphas_cumprod))(rows, 0, slice(0, HELD_OUT))
    routed = router.assign(torch.from_numpy(rows["embedding"])).expert
    wrong = square = 0.0
    for begin in range(0, HELD_OUT, BATCH):
        part = {name: value[begin : begin + BATCH] for name, value in drawn.items()}
        noised = add_noise(schedule.alphas_cumprod, part["latents"], part["noise"], part["timesteps"])
        inputs = (noised, part["timesteps"], part["text_states"], None)
        target = run_unet(gated, *inputs)
        with gated.use(router.hard_codes[routed[begin : begin + BATCH]].float()):
            output = run_unet(gated, *inputs)
        wrong += float((output - target).square().sum())
        square += float(target.square().sum())
    return wrong / square, routed
