"""The prune stage's switches, each turned on the demo: what the hardened codes are worth before any fine-tuning, and after some.

Every variant starts from the shipped config with the contrastive loss at its default weight, sees the same rows in the same
order under the same draws, and is judged on the same held-out rows with the same noise: the error against the teacher's output,
relative to that output's mean square. The budget is lower than the demo's, at which the teacher hardly misses what is pruned.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import ray
import torch
from diffusers import UNet2DConditionModel
from ray.exceptions import RayTaskError

from aptp_ray.artifacts import RunDir, load_run, open_run
from aptp_ray.config import Config, ConfigError, OpenMoji, load_config
from aptp_ray.core.collapse import largest_of_pairs, overlaps, perplexity
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import add_noise
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import run_unet
from aptp_ray.data.encoded import read_first
from aptp_ray.data.schema import METADATA
from aptp_ray.encoding import Encoding
from aptp_ray.evaluate.measures import normalized_mutual_information
from aptp_ray.evaluate.tried import TRIED
from aptp_ray.reuse import take_over
from aptp_ray.sections import PruneWeights
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.feed import first_rows
from aptp_ray.train.finetune import shared_worker
from aptp_ray.train.launch import launch
from aptp_ray.train.prune import prune_worker
from aptp_ray.train.side_by_side import side_by_side
from aptp_ray.train.static import static_worker
from aptp_ray.train.worker import fast_attention, noise_schedule
from cli import DEMO_CONFIG, ray_session, run_stage
from rows import reader_of
from stages import STAGE_FUNCTIONS

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
# What the method itself is made of, each part taken out.
ABLATIONS = {
    "no distillation": [
        f"{stage}.weights.{loss}=0" for stage in ("prune", "finetune") for loss in ("distillation", "block")
    ],
    "no transport": ["prune.assignment=nearest", "router.duals=false"],
}
# What the demo's values were chosen among: with a second seed, because they lie close. The shipped config is the first.
_HARD = "prune.unet_masks=hard"
CHOICES = {
    "no contrast": ["prune.weights.contrastive=0"],
    "a quarter of the contrast": ["prune.weights.contrastive=0.25"],
    "hard masks in the UNet": [_HARD],
    "hard masks, a quarter of the contrast": [_HARD, "prune.weights.contrastive=0.25"],
    "hard masks, no contrast": [_HARD, "prune.weights.contrastive=0"],
}
# Is a mixture better than one code, at equal cost and after as many samples? From the shipped config, with no contrast.
_SHIPPED, _ONE = ["prune.weights.contrastive=0"], ["router.experts=1"]
_GREEDY = [*_ONE, "prune.codes=ablation_greedy"]
_LESS = "prune.budget=0.4"
MIXTURES = {
    "one code": [*_SHIPPED, *_ONE],
    "one code, second seed": [*_SHIPPED, *_ONE, "prune.loop.seed=1"],
    "one code by ablation": _GREEDY,
    "two codes": [*_SHIPPED, "router.experts=2"],
    "eight codes": [*_SHIPPED, "router.experts=8"],
    "four codes at 0.4": [*_SHIPPED, _LESS],
    "one code at 0.4": [*_SHIPPED, *_ONE, _LESS],
    "one code by ablation at 0.4": [*_GREEDY, _LESS],
}
START = "all departures, and contrast"
HELD_OUT, BATCH = 512, 64
VALIDATION = ("encoded", "validation")
_SIZES = {"train_images": 4000, "validation_images": HELD_OUT}
_CONTRAST = f"prune.weights.contrastive={PruneWeights().contrastive}"
_STEPS = [
    "prune.budget=0.5",
    _CONTRAST,
    "prune.loop.steps=120",
    "finetune.shared.steps=40",
    "finetune.shared.checkpoint_every_steps=40",
]
# Variants run side by side, one a core: that keeps all cores at work, and twenty runs in half the time.
_ALONE = ["compute.workers=1", "compute.threads_per_worker=1", "tracking.mode=disabled"]


def all_variants() -> dict[str, list[str]]:
    """The changes of every variant by its name, the start first."""
    joined = [option for name, options in REFERENCE.items() if name != "noise for each sample" for option in options]
    variants = {START: [], "all as the reference": joined, **REFERENCE, **ABLATIONS, **CHOICES}
    again = {f"{name}, second seed": [*variants[name], "prune.loop.seed=1"] for name in (START, *CHOICES)}
    return variants | again | MIXTURES


def chosen(only: str | None, variants: dict[str, list[str]]) -> dict[str, list[str]]:
    """The variants named in a list with commas (names hold commas themselves), after the start that they are measured against.

    Raises:
        ConfigError: if a name is unknown.
    """
    if only is None:
        return variants
    parts, names = [part.strip() for part in only.split(",")], {START}
    while parts:
        # The longest first: "no contrast, second seed" is one name, and so is its beginning.
        length = next((n for n in range(len(parts), 0, -1) if ", ".join(parts[:n]) in variants), 0)
        if not length:
            raise ConfigError(f"--only: no variant is called {parts[0]!r}; there are: {'; '.join(variants)}")
        names.add(", ".join(parts[:length]))
        parts = parts[length:]
    return {name: changes for name, changes in variants.items() if name in names}


def sizes_like(home: RunDir | None) -> list[str]:
    """How much data the variants see: as much as a demo run has, if that is enough, so that its rows can be taken over."""
    sizes = dict(_SIZES)
    if home is not None:
        source = home.config().data.source
        if isinstance(source, OpenMoji) and source.validation_images >= HELD_OUT:
            sizes = {name: getattr(source, name) for name in sizes}
    return [f"data.source.{name}={count}" for name, count in sizes.items()]


def measure(say: Callable[[str], None], run_dir: str | None = None, only: str | None = None) -> dict[str, Any]:
    """Runs variants; returns their figures by name, those of the start first.

    Args:
        say: what is told meanwhile.
        run_dir: a run whose teacher and encoded rows are taken, as far as this config makes the same, and which gets
            ``evaluation/tried.json``; None: all is made here.
        only: names of variants, with commas between; None: all.

    Raises:
        ConfigError: if a name is unknown.
        RunDirError: if ``run_dir`` is no run directory.
    """
    variants = chosen(only, all_variants())
    home = load_run(run_dir)[0] if run_dir else None
    sizes = sizes_like(home)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = [*sizes, *_STEPS, *_ALONE]
        config = load_config(DEMO_CONFIG, [f"run_dir={folder}/encoded", *common])
        run = open_run(config)
        run.prepare(config)
        taken = take_over(config, run, home) if home is not None and home.exists("manifest.json") else []
        if home is not None:
            say(f"of {home}, taken over: {', '.join(taken) or 'nothing, its config made something else'}")
        with ray_session(config):
            for stage in ("teacher", "encode"):
                run_stage(stage, STAGE_FUNCTIONS[stage], config, run)
            calls = [
                (name, {"changes": [f"run_dir={folder}/{number:02d}", *common, *options], "encoded": run.uri})
                for number, (name, options) in enumerate(variants.items())
            ]
            for name, task in side_by_side(variant, calls, os.cpu_count() or 1):
                try:
                    figures[name] = ray.get(task)
                except RayTaskError as error:  # what does not work is a result, too
                    if name == START:
                        raise
                    figures[name] = {"failed": (str(error.cause).strip().splitlines() or ["no message"])[0]}
                say(f"{name}: {figures[name]}")
    if home is not None:
        home.write_json(as_tried(variants, figures, [*sizes, *_STEPS]), *TRIED)
    return {"switches": {name: figures[name] for name in variants}}


def as_tried(variants: dict[str, list[str]], figures: dict[str, Any], common: list[str]) -> list[dict[str, Any]]:
    """What ``evaluation/tried.json`` holds, in the variants' order; the start's changes are those that all have in common."""
    found = []
    for name, changes in variants.items():
        failed = figures[name].get("failed")
        entry: dict[str, Any] = {"name": name, "changes": common if name == START else changes}
        found.append(entry | ({"figures": figures[name]} if failed is None else {"figures": {}, "failed": failed}))
    return found


def variant(changes: list[str], encoded: str) -> dict[str, float]:
    """Prunes and fine-tunes together; returns errors before and after, and how codes and routing came out.

    Args:
        changes: of the shipped config.
        encoded: a run with the same teacher and rows.
    """
    from stages import finetune_extra, prune_run

    config = load_config(DEMO_CONFIG, changes)
    run = open_run(config)
    run.prepare(config)
    take_over(config, run, RunDir(encoded))
    launched = prune_run(config, run)
    worker = prune_worker if config.prune.codes == "learned" else static_worker
    launch(worker, config=config, run=run, name="prune", **launched)
    router = PromptRouter.from_pretrained(run.local("router"))
    error, routed = masked_error(config, run, router)
    styles = [json.loads(row)["style"] for row in read_first(run, *VALIDATION, columns=[METADATA], rows=HELD_OUT)[METADATA]]
    assert config.finetune.shared is not None
    shared = launch(
        shared_worker,
        config=config,
        run=run,
        name="shared",
        loop=config.finetune.shared,
        rows=launched["rows"],
        validation=launched["validation"],
        extra=finetune_extra(config, run, ("encoded", "train")),
    )
    return {
        "error": round(error, 5),
        "error_after_finetuning": round(shared["validation/distillation"], 5),
        "macs_ratio": round(run.read_json("routing.json")["macs_ratio"], 5),
        "style_information": round(normalized_mutual_information(styles, routed.tolist()), 3),
        "experts_in_use": round(perplexity(routed.bincount(minlength=router.num_codes)), 2),
        "largest_overlap": round(largest_of_pairs(overlaps(router.hard_codes)), 3),
    }


@torch.no_grad()
def masked_error(config: Config, run: RunDir, router: PromptRouter) -> tuple[float, torch.Tensor]:
    """Squared error of the teacher under its prompts' codes against itself, over its mean square; and who went where [n]."""
    torch.set_num_threads(1)
    folder, encoding = run.local("teacher"), Encoding.from_json(run.read_json("encoded", "encoding.json"))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    gated = GatedUNet(fast_attention(unet, torch.device("cpu")))
    schedule = noise_schedule(folder)
    reader = reader_of(config, run, *VALIDATION, embedding=True)
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
