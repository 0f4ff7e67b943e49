"""PixArt's transformer through the code that UNets go through: importance, training steps, MACs, sampler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import BertTokenizer, T5Config, T5EncoderModel

from aptp_ray.core.backbones import AsUNet
from aptp_ray.core.batch_profile import profile_unet
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.hardening import start_logits
from aptp_ray.core.importance import ImportanceBatch, measure_importance
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import run_unet
from aptp_ray.core.sampler import Sampler
from tests.core.objectives import ALPHAS, WEIGHTS, gradients, make_batch, randn
from tests.core.small_pipeline import LEVELS, WORDS
from tests.core.tiny import randomize, tiny_pixart

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture(scope="module")
def teacher() -> tuple[GatedUNet, MacsModel]:
    gated = GatedUNet(tiny_pixart())
    return gated, MacsModel.measure(gated.unet, (8, 8), 5, gated.space)


def _objective(gated: GatedUNet, macs: MacsModel) -> PruneObjective:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gated.space.dim, generator=generator) - 2.5
    router = PromptRouter(gated.space, z_dim=12, num_codes=3, generator=generator, start_logits=start)
    router.initialise_codes(randn(48, 12, seed=5), generator=generator)
    with torch.no_grad():
        router.codes += 0.3 * torch.randn(router.codes.shape, generator=generator)
    return PruneObjective(router, gated, macs, alphas_cumprod=ALPHAS, prediction_type="epsilon", budget=0.65)


@pytest.mark.parametrize("phase", ["warmup", "codes"])
def test_the_prune_step_moves_predictor_and_codes(teacher: tuple[GatedUNet, MacsModel], phase: str) -> None:
    objective = _objective(*teacher).train()
    batch = make_batch(objective, phase=phase)
    batch |= {"text_states": randn(4, 5, 12, seed=3), "text_mask": MASK}
    losses, stats = objective(**batch)
    assert all(bool(value.isfinite()) for value in losses.values()) and 0.1 < stats["macs_ratio"] < 1
    total = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
    predictor, codes = gradients(objective, total)
    assert predictor > 0 and (codes > 0) == (phase == "codes")
    # The task itself reaches them through the transformer.
    task = gradients(objective, losses["distillation"] + losses["block"])
    assert task[0 if phase == "warmup" else 1] > 0


def test_padding_is_not_read(teacher: tuple[GatedUNet, MacsModel]) -> None:
    """By mask while training, by zero states while sampling: the same."""
    model = teacher[0].unet
    sample, times, states = randn(4, 4, 8, 8, seed=1), torch.tensor([1, 40, 500, 990]), randn(4, 5, 12, seed=3)
    with torch.no_grad():
        masked = run_unet(model, sample, times, states, MASK)
        changed = run_unet(model, sample, times, torch.where(MASK[..., None], states, 7.0), MASK)
        by_zeros = AsUNet(model)(sample, times, encoder_hidden_states=states * MASK[..., None]).sample
        assert masked.shape == sample.shape  # the predicted variance is left out
        assert not torch.allclose(run_unet(model, sample, times, states, None), masked, rtol=1e-3)
    torch.testing.assert_close(changed, masked)
    torch.testing.assert_close(by_zeros, masked)


def test_importance_and_start(teacher: tuple[GatedUNet, MacsModel]) -> None:
    gated, macs = teacher
    batch = ImportanceBatch(randn(2, 4, 8, 8, seed=1), torch.tensor([50, 700]), randn(2, 5, 12, seed=2), MASK[:2])
    importance = measure_importance(gated, [batch], macs=macs)
    assert bool((importance.score > 0).all())
    # A whole layer matters more than any head or chunk of it.
    depth, covering = importance.score[gated.space.num_width :], gated.space.depth_of_entry
    inside = importance.score[: gated.space.num_width]
    assert all(float(depth[i]) > float(inside[covering == i].median()) for i in range(5))
    logits = start_logits(importance.per_mac, macs, gated.space, budget=0.65, generator=torch.Generator().manual_seed(0))
    assert logits.shape == (gated.space.dim,) and bool(logits.isfinite().all())


def test_an_expert_is_fine_tuned_against_its_teacher(teacher: tuple[GatedUNet, MacsModel]) -> None:
    gated, macs = teacher
    expert = prune_unet(tiny_pixart(), gated.space.random_code(0.5, torch.Generator().manual_seed(1))).train()
    expert.enable_gradient_checkpointing()
    objective = FinetuneObjective(expert, tiny_pixart(), alphas_cumprod=ALPHAS, prediction_type="epsilon").train()
    optimizer = torch.optim.AdamW(expert.parameters(), lr=3e-3)
    batch = {
        "latents": randn(4, 4, 8, 8, seed=1), "noise": randn(4, 4, 8, 8, seed=2),
        "timesteps": torch.tensor([10, 300, 500, 990]), "text_states": randn(4, 5, 12, seed=3), "text_mask": MASK,
    }  # fmt: skip
    values = []
    for _ in range(12):
        losses, _ = objective(**batch)
        values.append(float(losses["distillation"].detach()))
        optimizer.zero_grad()
        (losses["distillation"] + losses["block"]).backward()
        optimizer.step()
    assert values[-1] < 0.7 * values[0]
    assert count_macs(expert, (8, 8), 5) < macs.total


@pytest.fixture(scope="module")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock PixArt pipeline, with an expert beside it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
        text = T5EncoderModel(
            T5Config(vocab_size=len(vocab), d_model=12, d_kv=6, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32, scaling_factor=0.5,
        )  # fmt: skip
        model = PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=24,
            sample_size=16, caption_channels=12, use_additional_conditions=False,
        )  # fmt: skip
    randomize(model, 0)
    folder = tmp_path_factory.mktemp("pixart")
    PixArtAlphaPipeline(
        tokenizer=BertTokenizer(vocab=vocab, model_max_length=12), text_encoder=text.eval(), vae=vae.eval(),
        transformer=model.eval(), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    ).save_pretrained(folder / "teacher")  # fmt: skip
    gated = GatedUNet(model)
    code = gated.space.random_code(0.5, torch.Generator().manual_seed(1))
    code[-2] = False
    prune_unet(model, code).save_pretrained(folder / "expert")
    return folder


@pytest.mark.parametrize("part", ["teacher/transformer", "expert"])
def test_the_engine_draws_what_the_pipeline_draws(pipeline_dir: Path, part: str) -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(pipeline_dir / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    model = load_unet(pipeline_dir / part)
    pipeline.transformer = model.unet
    sampler = Sampler.from_components(model, load_components(pipeline_dir / "teacher"), max_batch_size=3)
    assert sampler.sizes.latent_shape == (4, 16, 16) and sampler.sizes.multiple == 4
    prompts, seeds = ["A red apple", "green fox runs", "blue sky flat icon a"], [3, 4, 5]
    drawn = sampler.generate(prompts, seeds, num_inference_steps=4, guidance_scale=4.5)
    for prompt, seed, image in zip(prompts, seeds, drawn, strict=True):
        from aptp_ray.core.image_request import noise_generator

        latents = torch.randn((1, 4, 16, 16), generator=noise_generator(seed, 0))
        expected = pipeline(
            prompt, num_inference_steps=4, guidance_scale=4.5, latents=latents, max_sequence_length=12, clean_caption=False,
            height=32, width=32, use_resolution_binning=False, output_type="np",
        ).images[0]  # fmt: skip
        assert int(np.abs(np.asarray(image, dtype=int) - np.round(255 * expected)).max()) <= LEVELS


def test_the_batch_profile_knows_its_inputs(pipeline_dir: Path) -> None:
    profile = profile_unet(load_unet(pipeline_dir / "expert"), latent_shape=(4, 16, 16), num_tokens=12, limit=2, seconds=0.1)
    assert profile.sizes == (1, 2)
