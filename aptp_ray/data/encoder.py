"""The encoders of one pipeline: which they are, what they give, and the actor that runs them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from aptp_ray.artifacts import resolve_source
from aptp_ray.config import ConfigError
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.data.rows import OUTPUT_SCHEMA, PASSED_ON
from aptp_ray.data.schema import (
    CAPTION,
    EMBEDDING,
    IMAGE,
    LATENT_MEAN,
    LATENT_STD,
    REASON,
    TEXT_LENGTH,
    TEXT_STATES,
)
from aptp_ray.encoding import Encoding, fingerprint, pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MADE = (LATENT_MEAN, LATENT_STD, TEXT_STATES, TEXT_LENGTH, EMBEDDING)
# Tokenizers without a limit of their own report an astronomic one.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoders run, and how; all that an actor needs to load them.

    Attributes:
        pipeline_dir: a diffusers pipeline's folder or URI; its vae, text_encoder and tokenizer are used.
        prompt_encoder: what :func:`aptp_ray.artifacts.resolve_source` takes.
        max_tokens: tokens that captions are padded and cut to; None: the tokenizer's limit, as Stable Diffusion has it.
        precision: in which the VAE and the text encoder run; the prompt encoder always runs in float32.
        threads: torch threads on CPU.
        storage_options: for a ``pipeline_dir`` that is a URI.
    """

    pipeline_dir: str
    prompt_encoder: str
    max_tokens: int | None = None
    precision: str = "fp32"
    threads: int = 1
    storage_options: dict[str, Any] | None = None

    def folder(self) -> Path:
        """Returns the pipeline as a local folder."""
        return Path(resolve_source(self.pipeline_dir, self.storage_options))


class Encoder:
    """Encodes a table of cropped rows; the callable class of a Ray Data actor pool."""

    def __init__(self, spec: EncoderSpec) -> None:
        # Ray sets OMP_NUM_THREADS from an actor's num_cpus, which says how actors are packed, not how they compute.
        torch.set_num_threads(spec.threads)
        _hush()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, folder = DTYPES[spec.precision], spec.folder()
        self._vae = _component(folder, "vae").from_pretrained(folder / "vae", torch_dtype=dtype)
        self._text_encoder = _component(folder, "text_encoder").from_pretrained(folder / "text_encoder", dtype=dtype)
        self._tokenizer = _component(folder, "tokenizer").from_pretrained(folder / "tokenizer")
        for model in (self._vae, self._text_encoder):
            model.to(self._device).eval().requires_grad_(False)
        self._tokens = _num_tokens(self._tokenizer, spec.max_tokens)
        source = resolve_source(spec.prompt_encoder, spec.storage_options)
        self._prompt_encoder = PromptEncoder.from_pretrained(source, device=self._device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encodes cropped rows.

        Args:
            rows: ``PASSED_ON``, REASON and IMAGE as raw bytes (null where the row is rejected).

        Returns:
            As many rows of ``OUTPUT_SCHEMA``, in order; those with a reason hold no tensors.
        """
        reasons = rows.column(REASON).to_pylist()
        kept = [index for index, reason in enumerate(reasons) if not reason]
        made: dict[str, list[Any]] = {}
        if kept:
            accepted = rows.take(kept)
            made |= self._images(accepted.column(IMAGE).to_pylist())
            made |= self._captions(accepted.column(CAPTION).to_pylist())
        for index, problem in zip(kept, made.get(REASON, []), strict=True):
            reasons[index] = problem
        columns = {name: rows.column(name) for name in PASSED_ON} | {REASON: pa.array(reasons, pa.string())}
        for name in _MADE:
            spread: list[Any] = [None] * len(reasons)
            for index, value in zip(kept, made.get(name, []), strict=True):
                spread[index] = value
            columns[name] = pa.array(spread, OUTPUT_SCHEMA.field(name).type)
        return pa.table(columns).select(OUTPUT_SCHEMA.names).cast(OUTPUT_SCHEMA)

    @torch.no_grad()
    def _images(self, images: list[bytes]) -> dict[str, list[Any]]:
        side = round((len(images[0]) / 3) ** 0.5)
        pixels = np.frombuffer(b"".join(images), dtype=np.uint8).reshape(len(images), side, side, 3)
        sample = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # [batch, 3, side, side]
        posterior = self._vae.encode(sample.to(self._device, self._vae.dtype)).latent_dist
        # What the UNet sees: diffusers' pipelines decode latents / scaling_factor + shift_factor.
        scale, shift = self._vae.config.scaling_factor, self._vae.config.get("shift_factor") or 0.0
        mean = _half((posterior.mean.float() - shift) * scale)  # [batch, channels, height, width]
        std = _half(posterior.std.float() * scale)
        finite = np.isfinite(mean).all(axis=(1, 2, 3)) & np.isfinite(std).all(axis=(1, 2, 3))
        problem = "latents are not finite: try data.precision=fp32"
        return {LATENT_MEAN: pack(mean), LATENT_STD: pack(std), REASON: ["" if good else problem for good in finite]}

    @torch.no_grad()
    def _captions(self, captions: list[str]) -> dict[str, list[Any]]:
        unique = list(dict.fromkeys(captions))  # data sets repeat captions; each is encoded once a batch
        place = {caption: index for index, caption in enumerate(unique)}
        tokens = self._tokenizer(
            unique, padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        # As StableDiffusionPipeline.encode_prompt: padding is masked only where the text encoder's config says so.
        masked = getattr(self._text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        states = pack(_half(self._text_encoder(tokens.input_ids, attention_mask=mask)[0]))  # n x [tokens, width]
        lengths = tokens.attention_mask.sum(dim=1).tolist()
        embeddings = self._prompt_encoder.encode(unique).numpy()  # [n, dim]
        rows = [place[caption] for caption in captions]
        return {
            TEXT_STATES: [states[row] for row in rows],
            TEXT_LENGTH: [lengths[row] for row in rows],
            EMBEDDING: [embeddings[row] for row in rows],
        }


def describe(spec: EncoderSpec, resolution: int) -> Encoding:
    """Finds the shapes and fingerprints of what the encoders will give, without encoding anything.

    Raises:
        ConfigError: if the prompt encoder is not there.
        FileNotFoundError: if the pipeline is not there.
        ValueError: if ``resolution`` is not a multiple of the VAE's factor, or the pipeline is of another kind.
    """
    _hush()
    folder = spec.folder()
    for name in ("vae/config.json", "text_encoder/config.json", "tokenizer"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no {name}; check teacher.source")
    vae = json.loads((folder / "vae/config.json").read_text())
    text = json.loads((folder / "text_encoder/config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if resolution % factor:
        raise ValueError(f"data.resolution={resolution} is not a multiple of {factor}, the VAE's factor")
    tokenizer = _component(folder, "tokenizer").from_pretrained(folder / "tokenizer")
    try:
        prompt_encoder = PromptEncoder.from_pretrained(resolve_source(spec.prompt_encoder, spec.storage_options))
    except FileNotFoundError as error:
        raise ConfigError(f"router.prompt_encoder={spec.prompt_encoder!r}: {error}") from error
    return Encoding(
        latent_shape=(vae["latent_channels"], resolution // factor, resolution // factor),
        text_shape=(_num_tokens(tokenizer, spec.max_tokens), text.get("hidden_size") or text["d_model"]),
        embedding_dim=prompt_encoder.dim,
        resolution=resolution,
        fingerprints={
            "vae": fingerprint(folder / "vae"),
            "text_encoder": fingerprint(folder / "text_encoder"),
            "tokenizer": fingerprint(folder / "tokenizer"),
            "prompt_encoder": prompt_encoder.fingerprint,
        },
    )


def _hush() -> None:
    """Turns off the bars of loading weights where nobody watches them."""
    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _component(folder: Path, name: str) -> Any:
    """Returns the class that the pipeline's index names for a component, from the two libraries that may have it."""
    file = folder / "model_index.json"
    if file.exists():
        index = json.loads(file.read_text())
    else:  # a pipeline whose UNet is still to be trained
        text_encoder = json.loads((folder / "text_encoder/config.json").read_text())["architectures"][0]
        index = {
            "vae": ("diffusers", "AutoencoderKL"),
            "text_encoder": ("transformers", text_encoder),
            "tokenizer": ("transformers", "AutoTokenizer"),
        }
    if (index.get("text_encoder_2") or (None,))[0]:
        raise ValueError(f"{folder} has two text encoders; pipelines with one (Stable Diffusion 1.x, 2.x) can be encoded")
    library, class_name = index.get(name) or (None, None)
    if class_name is None or library not in ("diffusers", "transformers"):
        raise ValueError(f"{file} names no {name} of diffusers or transformers (it says {library!r})")
    return getattr(import_module(library), class_name)


def _num_tokens(tokenizer: Any, max_tokens: int | None) -> int:
    tokens = max_tokens or tokenizer.model_max_length
    if tokens > _NO_LIMIT:
        raise ValueError("the tokenizer has no model_max_length: set teacher.max_tokens")
    return int(tokens)


def _half(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float16).cpu().numpy()
