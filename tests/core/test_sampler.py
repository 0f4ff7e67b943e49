"""The sampler against the stock pipeline, and against itself in other company."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel

from aptp_ray.core.components import Components, TextEncoder, load_components, load_unet, make_scheduler
from aptp_ray.core.image_request import ImageRequest, noise_generator
from aptp_ray.core.sampler import Sampler

# In float32 a larger batch changes the order of sums, no more: a fortieth of one step of 8 bits.
TOLERANCE = 1e-4
WORDS = ["a", "red", "apple", "green", "fox", "runs", "blue", "sky", "flat", "icon"]


def _pipeline(text: str, scheduler: object) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokens = 12
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=tokens)
    if text == "bert":
        config = BertConfig(
            vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        config.use_attention_mask = True
        encoder: torch.nn.Module = BertModel(config)
    else:
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=tokens, eos_token_id=3, bos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return _pipeline("bert", DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1))


def _sampler(pipeline: StableDiffusionPipeline, max_batch_size: int = 8, scheduler: object = None) -> Sampler:
    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    return Sampler(pipeline.unet, pipeline.vae, text, scheduler or pipeline.scheduler, max_batch_size=max_batch_size)


def _run(sampler: Sampler, requests: list[ImageRequest]) -> list[torch.Tensor]:
    handles = [sampler.submit(request) for request in requests]
    while sampler.active or sampler.waiting:
        sampler.step()
    assert [handle.state for handle in handles] == ["done"] * len(handles)
    return [handle.image for handle in handles]  # type: ignore[misc]


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


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
    together = _run(_sampler(pipeline), MIXED[:company])
    for request, image in zip(MIXED[:company], together, strict=True):
        assert _apart(_run(_sampler(pipeline), [request])[0], image) < TOLERANCE
    # The oracle can tell images apart: other requests' images are far away.
    assert _apart(together[0], together[1]) > 0.05


SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler]


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, EulerAncestralDiscreteScheduler])
def test_joining_in_flight_changes_nothing(pipeline: StableDiffusionPipeline, scheduler: type) -> None:
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}  # Runge-Kutta starts need four steps
    own = scheduler.from_config(pipeline.scheduler.config, **options)
    alone = [_run(_sampler(pipeline, scheduler=own), [request])[0] for request in MIXED]
    sampler = _sampler(pipeline, max_batch_size=3, scheduler=own)
    handles = []
    most = 0
    for request in MIXED:  # one more joins after every step, and most wait for a place
        handles.append(sampler.submit(request))
        sampler.step()
        most = max(most, sampler.active)
    while sampler.active or sampler.waiting:
        sampler.step()
    assert most == 3
    for handle, image in zip(handles, alone, strict=True):
        assert _apart(handle.image, image) < TOLERANCE


@pytest.mark.parametrize("text", ["bert", "clip"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_the_stock_pipeline(text: str, guidance: float, prediction: str, scheduler: type) -> None:
    base = DDIMScheduler(prediction_type=prediction, clip_sample=False, beta_schedule="scaled_linear", steps_offset=1)
    pipe = _pipeline(text, scheduler.from_config(base.config))
    prompts, negatives = ["a red apple", "blue sky with an unknown word"], ["green", "flat icon"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = pipe(
        prompts, negative_prompt=negatives, num_inference_steps=5, guidance_scale=guidance, latents=latents, output_type="pt"
    ).images
    requests = [
        ImageRequest(p, num_inference_steps=5, guidance_scale=guidance, negative_prompt=n, latents=noise)
        for p, n, noise in zip(prompts, negatives, latents, strict=True)
    ]
    for image, wanted in zip(_run(_sampler(pipe), requests), expected, strict=True):
        assert _apart(image, wanted) < TOLERANCE


def test_a_seed_means_what_it_means_in_diffusers(pipeline: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    expected = pipeline(
        "a red apple", num_inference_steps=4, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images[0]
    image = _run(_sampler(pipeline), [ImageRequest("a red apple", seed=5, num_inference_steps=4)])[0]
    assert _apart(image, expected) < TOLERANCE
    draws = {tuple(torch.randn(2, generator=noise_generator(seed, n)).tolist()) for seed in (5, 6) for n in range(10)}
    assert len(draws) == 20


def test_cancel_frees_the_place_and_hurts_nobody(pipeline: StableDiffusionPipeline) -> None:
    sampler = _sampler(pipeline, max_batch_size=2)
    first, second, third, fourth = (sampler.submit(request) for request in MIXED[:4])
    sampler.step()
    assert (sampler.active, sampler.waiting) == (2, 2)
    sampler.cancel(first)
    sampler.cancel(fourth)
    assert (first.state, fourth.state) == ("cancelled", "cancelled")
    assert (sampler.active, sampler.waiting) == (1, 1)
    sampler.step()
    assert third.state == "active" and third.step == 1
    while sampler.active or sampler.waiting:
        sampler.step()
    assert first.image is None and fourth.image is None
    for handle, request in ((second, MIXED[1]), (third, MIXED[2])):
        assert _apart(handle.image, _run(_sampler(pipeline), [request])[0]) < TOLERANCE
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
    while sampler.active or sampler.waiting:
        sampler.step()
    assert bad_text.state == "failed" and "cannot read" in str(bad_text.error)
    assert bad_noise.state == "failed" and "not finite" in str(bad_noise.error)
    assert other_shape.state == "done" and other_shape.image.shape == (3, 32, 32)  # its own UNet call
    with pytest.raises(RuntimeError, match="cannot read"):
        bad_text.pil()
    assert _apart(good.image, _run(_sampler(pipeline), [MIXED[0]])[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2000}, "num_inference_steps"),  # more than the schedule was trained with
        ({"latents": torch.zeros(3, 8, 8)}, "latents have shape"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(pipeline: StableDiffusionPipeline, change: dict, message: str) -> None:
    sampler = _sampler(pipeline)
    with pytest.raises(ValueError, match=message):
        sampler.submit(ImageRequest("a", **change))
    assert sampler.waiting == 0


def test_unet_calls_are_shared_and_unguided_rows_are_single(pipeline: StableDiffusionPipeline) -> None:
    rows: list[tuple[int, int]] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda module, args: rows.append((args[0].shape[0], len(set(args[1].tolist()))))
    )
    try:
        _run(_sampler(pipeline), MIXED[:3])  # 6, 3 (unguided) and 9 steps
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
    assert larger.generate(["a"], [1], num_inference_steps=1)[0].size == (32, 32) == larger.image_size
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
    (tmp_path / "model_index.json").write_text('{"vae": ["os", "system"]}')
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match="only classes of diffusers"):
        load_components(tmp_path)
    with pytest.raises(ValueError, match="NoSuchScheduler"):
        make_scheduler("NoSuchScheduler", DDIMScheduler())
