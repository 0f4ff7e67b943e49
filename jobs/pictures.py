"""Draws a teacher's grids: python jobs/pictures.py PIPELINE_DIR OUTPUT_DIR [--steps N] [--guidance G]

teacher.png: the demo's showcase, seen and held-out combinations; seeds.png: eight seeds of four prompts.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.sampler import Sampler
from aptp_ray.demo.prompts import SHOWCASE
from aptp_ray.evaluate.grid import grid_of
from cli import finish

SEEDS_OF = ("a cat", "a line drawing of a rocket", "two purple fish", "a red bird on a yellow background")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("pipeline", help="directory in diffusers' layout, e.g. runs/openmoji/teacher")
    arguments.add_argument("output", help="directory for the pictures")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--guidance", type=float, default=3.0)
    options = arguments.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    unet = load_unet(Path(options.pipeline) / "unet")
    sampler = Sampler.from_components(unet, load_components(options.pipeline), max_batch_size=8)
    settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)

    images = sampler.generate([prompt.text for prompt in SHOWCASE], list(range(len(SHOWCASE))), **settings)
    notes = [f"held out: {prompt.held_out}" if prompt.held_out else "seen" for prompt in SHOWCASE]
    grid_of(images, [prompt.text for prompt in SHOWCASE], 8, notes=notes).save(output / "teacher.png")

    prompts = [prompt for prompt in SEEDS_OF for _ in range(8)]
    images = sampler.generate(prompts, [seed for _ in SEEDS_OF for seed in range(8)], **settings)
    captions = [f"{prompt}, seed {index % 8}" for index, prompt in enumerate(prompts)]
    grid_of(images, captions, 8).save(output / "seeds.png")
    finish({"stage": "pictures", "teacher": str(output / "teacher.png"), "seeds": str(output / "seeds.png")})


if __name__ == "__main__":
    main()
