"""The teacher stage: a small VAE and UNet trained from scratch, or a pretrained pipeline fine-tuned on the target data."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import Config, ConfigError
from aptp_ray.core.backbones import stock_class
from aptp_ray.core.components import denoiser_part, text_parts
from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.pretraining import VaeObjective, solve_encoder
from aptp_ray.core.randomness import key_seed, keyed_generator
from aptp_ray.core.running import compile_unet
from aptp_ray.data import schema
from aptp_ray.encoding import Encoding
from aptp_ray.train.draws import Draws, decode_encoded
from aptp_ray.train.feed import RowReader, Rows, first_rows
from aptp_ray.train.loop import Parts
from aptp_ray.train.worker import Worker, fast_attention, load_teacher_model, noise_schedule, text_states_of, tuned

# -- the VAE -----------------------------------------------------------------------------------------------------------------


def vae_worker(settings: dict[str, Any]) -> None:
    """Solves for the VAE's encoder, trains its decoder on crops, and writes ``teacher_vae``.

    Args:
        settings: see ``launch``; its rows have IMAGE, the pixels of squares.
    """
    worker = Worker.start(settings)
    spec = worker.config.teacher.vae
    assert spec is not None
    loop = spec.loop
    torch.manual_seed(key_seed(loop.seed, "vae", "init"))  # diffusers' modules draw their start from global state
    vae = tuned(AutoencoderKL(**spec.model), loop)
    whole = first_images(worker.rows, spec.encoder_images)
    solve_encoder(vae, whole, whitening=spec.whitening)
    side = spec.crop // 2 ** (len(vae.config["block_out_channels"]) - 1)
    latent_shape = (loop.global_batch_size, vae.config["latent_channels"], side, side)

    def inputs(rows: Rows, step: int, mine: slice) -> dict[str, Any]:
        images = to_signed(rows[schema.IMAGE])
        generator = keyed_generator(loop.seed, "crop", step)
        room = images.shape[-1] - spec.crop
        corners = torch.randint(0, room + 1, (loop.global_batch_size, 2), generator=generator)[mine]
        crops = [image[:, y : y + spec.crop, x : x + spec.crop] for image, (y, x) in zip(images, corners.tolist(), strict=True)]
        noise = torch.randn(latent_shape, generator=generator)[mine]
        # Not channels_last, which a stack of permuted images would be: it is slower on a CPU.
        return {"images": torch.stack(crops).contiguous(memory_format=torch.contiguous_format), "noise": noise}

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        vae.eval()
        with worker.run.writing("teacher_vae") as folder:
            vae.save_pretrained(folder)
        return {"psnr_db": reconstruction_psnr(vae, whole[:512])}

    objective = VaeObjective(vae, gradient_weight=spec.gradient_weight)
    parts = Parts(
        module=objective,
        groups=[{"params": [p for p in vae.parameters() if p.requires_grad], **loop.optimizer.rates()}],
        inputs=inputs,
        decode=lambda rows: rows,
        save=save,
    )
    worker.train(parts, loop)


def first_images(reader: RowReader, count: int) -> Tensor:
    """Returns the first training images, [n, 3, height, width] in [-1, 1]."""
    return to_signed(first_rows(reader, count)[schema.IMAGE])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Returns the mean PSNR in dB of decoding what was encoded."""
    device = next(vae.parameters()).device
    decoded = [vae.decode(vae.encode(part.to(device)).latent_dist.mean).sample.cpu() for part in images.split(64)]
    error = (torch.cat(decoded).clamp(-1, 1) - images).square().mean((1, 2, 3))
    return round((10 * torch.log10(4.0 / error.clamp_min(1e-9))).mean().item(), 2)


def to_signed(images: np.ndarray) -> Tensor:
    """Pixels of squares, uint8 [n, side * side * 3] -> float32 [n, 3, side, side] in [-1, 1]."""
    side = math.isqrt(images.shape[1] // 3)
    if images.shape[1] != 3 * side * side:
        raise ValueError(f"images of {images.shape[1]} bytes are no squares of three channels")
    pixels = torch.from_numpy(images.reshape(len(images), side, side, 3).astype(np.float32))
    return pixels.permute(0, 3, 1, 2).contiguous().div_(127.5).sub_(1.0)


# -- the pipeline around it ------------------------------------------------------------------------------------------------------


def assemble(config: Config, run: RunDir) -> str:
    """Writes ``teacher_parts``: a pipeline with the trained VAE, the frozen text encoder, and a UNet that knows nothing yet.

    Returns:
        its local folder.
    """
    spec = config.teacher.unet
    if spec is None or spec.model is None or config.teacher.text_encoder is None:
        raise ConfigError("training a teacher from scratch needs teacher.unet.model and teacher.text_encoder")
    vae = AutoencoderKL.from_pretrained(run.local("teacher_vae"))
    torch.manual_seed(key_seed(spec.loop.seed, "unet", "init"))
    unet = UNet2DConditionModel(**spec.model)
    pipeline = build_pipeline(config, vae=vae, unet=unet, scheduler=DDIMScheduler(**spec.scheduler))
    with run.writing("teacher_parts") as folder:
        pipeline.save_pretrained(folder)
    return run.local("teacher_parts")


def build_pipeline(config: Config, *, vae: Any, unet: Any, scheduler: Any) -> StableDiffusionPipeline:
    """Puts a Stable Diffusion pipeline together around ``teacher.text_encoder``."""
    source = resolve_source(config.teacher.text_encoder or "", config.storage_options)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = config.teacher.max_tokens
    text_encoder = AutoModel.from_pretrained(source)
    # The pipeline hands the attention mask to the text encoder only where its config says so (diffusers, encode_prompt).
    text_encoder.config.use_attention_mask = True
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def import_teacher(config: Config, run: RunDir) -> dict[str, Any]:
    """Writes ``teacher`` from ``teacher.source``, in float32.

    Raises:
        ConfigError: if the source cannot be loaded.
    """
    teacher = config.teacher
    assert teacher.source is not None
    source = resolve_source(teacher.source, config.storage_options)
    try:
        if teacher.text_encoder is not None:
            which: dict[str, Any] = {"revision": teacher.revision, "variant": teacher.variant, "torch_dtype": torch.float32}
            pipeline = build_pipeline(
                config,
                vae=AutoencoderKL.from_pretrained(source, subfolder="vae", **which),
                unet=UNet2DConditionModel.from_pretrained(source, subfolder="unet", **which),
                scheduler=DDIMScheduler.from_pretrained(source, subfolder="scheduler", revision=teacher.revision),
            )
        else:
            pipeline = load_pipeline(source, revision=teacher.revision, variant=teacher.variant)
        denoiser = getattr(pipeline, denoiser_part(pipeline.config))
        stock_class(denoiser)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"teacher.source={teacher.source!r} cannot be loaded as a diffusers pipeline ({str(error).splitlines()[0]}): name "
            "a directory, a hub id that exists (with its revision), or an fsspec URI"
        ) from error
    with run.writing("teacher") as folder:
        pipeline.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in denoiser.parameters())}


def load_pipeline(source: str, *, revision: str | None = None, variant: str | None = None, **parts: Any) -> Any:
    """Loads a whole pipeline in float32, without the checker that hides images.

    Args:
        source: folder or hub id.
        revision: of the hub's repository.
        variant: of its files.
        parts: in place of the source's own.

    Raises:
        OSError: if there is none.
        ValueError: if it has other text encoders than can be used.
    """
    index = DiffusionPipeline.load_config(source, revision=revision)
    text_parts(index)
    if "safety_checker" in index:
        parts = {"safety_checker": None, **parts}
    pipeline = DiffusionPipeline.from_pretrained(
        source, revision=revision, variant=variant, torch_dtype=torch.float32, **parts
    )
    # PixArt's tokenizer reads more than its transformer was trained on: the pipeline's call says how much that was.
    limit = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if limit is not None:
        pipeline.tokenizer.model_max_length = min(pipeline.tokenizer.model_max_length, int(limit.default))
    return pipeline


# -- the UNet ------------------------------------------------------------------------------------------------------------------


def unet_worker(settings: dict[str, Any]) -> None:
    """Trains the UNet on encoded rows and writes ``teacher``."""
    worker = Worker.start(settings)
    spec = worker.config.teacher.unet
    assert spec is not None
    loop, folder = spec.loop, settings["pipeline_dir"]
    encoding = Encoding.from_json(settings["encoding"])
    unet = tuned(fast_attention(load_teacher_model(folder), worker.place.device), loop)
    schedule = noise_schedule(folder)
    text_states = text_states_of(encoding, folder, worker.place.device)
    draws = Draws(
        loop.seed,
        "teacher",
        loop.global_batch_size,
        encoding,
        len(schedule.alphas_cumprod),
        spec.caption_dropout,
        torch.tensor(settings["empty_states"]),
    )

    def save(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
        pipeline = load_pipeline(folder, **{denoiser_part(DiffusionPipeline.load_config(folder)): unet})
        with worker.run.writing("teacher") as target:
            pipeline.save_pretrained(target)
        return {"parameters": sum(p.numel() for p in unet.parameters())}

    # Without a teacher of its own and without weights by SNR, fine-tuning's objective is plain denoising.
    objective = FinetuneObjective(
        unet, None, alphas_cumprod=schedule.alphas_cumprod, prediction_type=schedule.prediction_type, gamma=None
    )
    if loop.compile:
        compile_unet(unet)
    parts = Parts(
        module=objective,
        groups=[{"params": list(unet.parameters()), **loop.optimizer.rates()}],
        inputs=draws,
        decode=lambda rows: decode_encoded(rows, encoding, text_states),
        save=save,
    )
    worker.train(parts, loop)
