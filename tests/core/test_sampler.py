"""The sampler against the stock pipeline, and against itself in other company."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from transformers import BertModel

from aptp_ray.core.components import Components, TextEncoder, load_components, load_unet, make_scheduler
from aptp_ray.core.image_request import ImageRequest, noise_generator
from aptp_ray.core.sampler import Sampler
from tests.core.small_pipeline import LEVELS, TOLERANCE, levels, run, same, sampler_of, small_pipeline


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return small_pipeline("bert", DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1))


MIXED = [
    ImageRequest("a red apple", seed=7, num_inference_steps=6),
    ImageRequest("green fox runs", seed=8, num_inference_steps=3, guidance_scale=1.0),
    ImageRequest("blue sky", seed=9, num_inference_steps=9, guidance_scale=7.5, negative_prompt="red"),
    ImageRequest("a red apple", seed=7, index=1, num_inference_steps=6),
    ImageRequest("flat icon", seed=2**63 - 1, num_inference_steps=1),
    ImageRequest("a fox", seed=0, num_inference_steps=5, guidance_scale=0.0),
    ImageRequest("sky", seed=11, num_inference_steps=4),
    ImageRequest("icon", seed=12, num_inference_steps=7),
]


@pytest.mark.parametrize("company", [2, 8])
def test_an_image_is_the_same_alone_and_in_a_batch(pipeline: StableDiffusionPipeline, company: int) -> None:
    together = run(sampler_of(pipeline), MIXED[:company])
    for request, image in zip(MIXED[:company], together, strict=True):
        assert same(run(sampler_of(pipeline), [request])[0], image)
    # The oracle can tell images apart: other requests' images are far away.
    assert levels(together[0], together[1]) > 12


SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler]
SCHEDULERS += [LMSDiscreteScheduler, UniPCMultistepScheduler]


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, EulerAncestralDiscreteScheduler])
def test_joining_in_flight_changes_nothing(pipeline: StableDiffusionPipeline, scheduler: type) -> None:
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}  # Runge-Kutta starts need four steps
    own = scheduler.from_config(pipeline.scheduler.config, **options)
    alone = [run(sampler_of(pipeline, scheduler=own), [request])[0] for request in MIXED]
    sampler = sampler_of(pipeline, max_batch_size=3, scheduler=own)
    handles = []
    most = 0
    for request in MIXED:  # one more joins after every step, and most wait for a place
        handles.append(sampler.submit(request))
        sampler.step()
        most = max(most, sampler.active)
    while sampler.busy:
        sampler.step()
    assert most == 3
    assert all(same(handle, image) for handle, image in zip(handles, alone, strict=True))


@pytest.mark.parametrize("text", ["bert", "clip"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_the_stock_pipeline(text: str, guidance: float, prediction: str, scheduler: type) -> None:
    base = DDIMScheduler(prediction_type=prediction, clip_sample=False, beta_schedule="scaled_linear", steps_offset=1)
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}  # as Stable Diffusion ships it
    pipe = small_pipeline(text, scheduler.from_config(base.config, **options))
    prompts, negatives = ["a red apple", "blue sky with an unknown word"], ["green", "flat icon"]
    noises = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def stock(output: str) -> Any:
        return pipe(
            prompts, negative_prompt=negatives, num_inference_steps=5, guidance_scale=guidance, latents=noises, output_type=output
        ).images

    requests = [
        ImageRequest(p, num_inference_steps=5, guidance_scale=guidance, negative_prompt=n, latents=noise)
        for p, n, noise in zip(prompts, negatives, noises, strict=True)
    ]
    for handle, latents, image in zip(run(sampler_of(pipe), requests), stock("latent"), stock("pil"), strict=True):
        # Some schedulers (Heun) end at latents of a size of 10 with these random weights.
        assert float((handle.latents - latents).abs().max()) < TOLERANCE * max(1.0, float(latents.abs().max()))
        assert levels(handle, image) <= LEVELS


def test_a_seed_means_what_it_means_in_diffusers(pipeline: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    expected = pipeline("a red apple", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
    image = run(sampler_of(pipeline), [ImageRequest("a red apple", seed=5, num_inference_steps=4)])[0]
    assert levels(image, expected) <= LEVELS
    draws = {tuple(torch.randn(2, generator=noise_generator(seed, n)).tolist()) for seed in (5, 6) for n in range(10)}
    assert len(draws) == 20


def test_cancel_frees_the_place_and_hurts_nobody(pipeline: StableDiffusionPipeline) -> None:
    sampler = sampler_of(pipeline, max_batch_size=2)
    first, second, third, fourth = (sampler.submit(request) for request in MIXED[:4])
    sampler.step()
    assert (sampler.active, sampler.waiting) == (2, 2)
    sampler.cancel(first)
    sampler.cancel(fourth)
    assert (first.state, fourth.state) == ("cancelled", "cancelled")
    assert (sampler.active, sampler.waiting) == (1, 1)
    sampler.step()
    assert third.state == "active" and third.step == 1
    while sampler.busy:
        sampler.step()
    assert first.pixels is None and fourth.pixels is None
    for handle, request in ((second, MIXED[1]), (third, MIXED[2])):
        assert same(handle, run(sampler_of(pipeline), [request])[0])
    sampler.cancel(second)
    assert second.state == "done"


def test_a_bad_request_fails_alone(pipeline: StableDiffusionPipeline) -> None:
    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)

    def picky(texts: Sequence[str]) -> torch.Tensor:
        if "poison" in texts:
            raise RuntimeError("cannot read this prompt")
        return text(texts)

    sampler = Sampler(pipeline.unet, pipeline.vae, picky, pipeline.scheduler)
    bad_text = sampler.submit(ImageRequest("poison", num_inference_steps=3))
    bad_noise = sampler.submit(ImageRequest("fox", num_inference_steps=3, latents=torch.full((4, 8, 8), float("nan"))))
    other_shape = sampler.submit(ImageRequest("fox", num_inference_steps=3, latents=torch.zeros(4, 16, 16)))
    good = sampler.submit(MIXED[0])
    while sampler.busy:
        sampler.step()
    assert bad_text.state == "failed" and "cannot read" in str(bad_text.error)
    assert bad_noise.state == "failed" and "not finite" in str(bad_noise.error)
    assert other_shape.state == "done" and other_shape.pixels.shape == (32, 32, 3)  # its own UNet call
    with pytest.raises(RuntimeError, match="cannot read"):
        bad_text.pil()
    assert same(good, run(sampler_of(pipeline), [MIXED[0]])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2000}, "num_inference_steps"),  # more than the schedule was trained with
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"previews": -1}, "previews is -1"),
        ({"latents": torch.zeros(3, 8, 8)}, "latents have shape"),
        ({"size": (16, 18)}, "16x18 cannot be drawn: width and height must be multiples of 4"),
        ({"size": (0, 16)}, "0x16"),
        ({"size": (64, 32)}, "at most 1024; this model's own size is 16x16"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(pipeline: StableDiffusionPipeline, change: dict, message: str) -> None:
    sampler = sampler_of(pipeline)
    with pytest.raises(ValueError, match=message):
        sampler.submit(ImageRequest("a", **change))
    assert sampler.waiting == 0


def test_unet_calls_are_shared_and_unguided_rows_are_single(pipeline: StableDiffusionPipeline) -> None:
    rows: list[tuple[int, int]] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args: rows.append((args[0].shape[0], len(set(args[1].tolist()))))
    )
    try:
        run(sampler_of(pipeline), MIXED[:3])  # 6, 3 (unguided) and 9 steps
    finally:
        hook.remove()
    assert [count for count, _ in rows] == [5] * 3 + [4] * 3 + [2] * 3
    assert rows[1][1] == 3  # three images, three timesteps, one call


def test_generate_and_loading_from_a_directory(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    components = load_components(tmp_path)
    assert isinstance(components, Components) and isinstance(components.text_encoder, BertModel)
    sampler = Sampler.from_components(load_unet(tmp_path / "unet"), components, scheduler="EulerDiscreteScheduler")
    images = sampler.generate(["a red apple", "blue sky"], [1, 2], num_inference_steps=3)
    assert [image.size for image in images] == [(16, 16)] * 2
    pipeline_euler = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipeline_euler.scheduler = EulerDiscreteScheduler.from_config(pipeline_euler.scheduler.config)
    pipeline_euler.set_progress_bar_config(disable=True)
    expected = pipeline_euler(
        ["a red apple", "blue sky"], num_inference_steps=3, guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)],
    ).images  # fmt: skip
    larger = Sampler.from_components(load_unet(tmp_path / "unet"), components, resolution=32)
    assert larger.generate(["a"], [1], num_inference_steps=1)[0].size == (32, 32) == larger.sizes.usual
    with pytest.raises(ValueError, match="resolution is 33"):
        Sampler.from_components(load_unet(tmp_path / "unet"), components, resolution=33)
    for image, wanted in zip(images, expected, strict=True):
        first, second = (np.asarray(i, dtype=np.float32) for i in (image, wanted))
        assert np.abs(first - second).max() <= 1  # of 255


def test_loading_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load_components(tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "Transformer2DModel"}')
    with pytest.raises(ValueError, match="Transformer2DModel"):
        load_unet(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text('{"vae": ["os", "system"]}')
    with pytest.raises(ValueError, match="text encoders are"):
        load_components(tmp_path)
    (tmp_path / "model_index.json").write_text('{"vae": ["os", "system"], "text_encoder": ["transformers", "CLIPTextModel"]}')
    with pytest.raises(ValueError, match="only classes of diffusers"):
        load_components(tmp_path)
    with pytest.raises(ValueError, match="NoSuchScheduler"):
        make_scheduler("NoSuchScheduler", DDIMScheduler())
