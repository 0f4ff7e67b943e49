"""The encoders of one pipeline: which they are, what they give, and the actor that runs them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from aptp_ray.artifacts import resolve_source
from aptp_ray.config import ConfigError
from aptp_ray.core.components import class_name_of, load_text, load_vae, read_index, text_parts
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.data.encoded import encoded_schema
from aptp_ray.data.rows import (
    CHUNK_SCHEMA,
    PASSED_ON,
    REJECTED_ROWS,
    ROWS,
    Framing,
    binary_column,
    pack_rows,
    pixels_of,
    unpack_rows,
)
from aptp_ray.data.schema import (
    CAPTION,
    EMBEDDING,
    IMAGE,
    KEY,
    LATENT_MEAN,
    LATENT_STD,
    ORDINAL,
    REASON,
    TEXT_LENGTH,
    TEXT_STATES,
    TEXT_TOKENS,
)
from aptp_ray.encoding import Encoding, fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Root mean square of the difference to fp32 over that of the value. Measured on the demo's VAE and MiniLM, the larger of latents
# and text states: bf16 .011, fp16 .0016.
PRECISION_TOLERANCE = {"bf16": 2e-2, "fp16": 3e-3}


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoders run, and how; all that an actor needs to load them.

    Attributes:
        pipeline_dir: a diffusers pipeline's folder or URI; its VAE, text encoders and tokenizers are used.
        prompt_encoder: what :func:`aptp_ray.artifacts.resolve_source` takes.
        max_tokens: tokens that captions are padded and cut to; None: the tokenizer's limit, as Stable Diffusion has it.
        precision: in which the VAE and the text encoders run: "fp32", "bf16" (latents and states within 2 % of fp32, in the root
            mean square) or "fp16" (within 0.3 %); see PRECISION_TOLERANCE. The prompt encoder always runs in float32, and so does
            a VAE whose config says ``force_upcast`` (Stable Diffusion XL's).
        threads: torch threads on CPU.
        storage_options: for a ``pipeline_dir`` that is a URI.
        text: "states": the text encoder runs; "tokens": it does not, and token ids are stored.
    """

    pipeline_dir: str
    prompt_encoder: str
    max_tokens: int | None = None
    precision: str = "fp32"
    threads: int = 1
    storage_options: dict[str, Any] | None = None
    text: str = "states"

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ConfigError(f"precision {self.precision!r} is not one of {', '.join(DTYPES)}: set encode.precision")
        if self.text not in ("states", "tokens"):
            raise ConfigError(f"encode.text={self.text!r} is neither states nor tokens")

    def folder(self) -> Path:
        """Returns the pipeline as a local folder."""
        return Path(resolve_source(self.pipeline_dir, self.storage_options))


class Encoder:
    """Encodes tables of cropped rows.

    Attributes:
        schema: of what it gives, without REASON.
    """

    def __init__(self, spec: EncoderSpec, *, light: bool = False) -> None:
        """Loads the models, onto a GPU where this process has one.

        Args:
            spec: which ones.
            light: the prompt encoder alone, for rows without tensors.
        """
        # Ray sets OMP_NUM_THREADS from an actor's num_cpus, which says how actors are packed, not how they compute.
        torch.set_num_threads(spec.threads)
        _hush()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._light = light
        self.schema = encoded_schema(spec.text, "online" if light else "offline")
        self._prompt_encoder = PromptEncoder.from_pretrained(
            resolve_source(spec.prompt_encoder, spec.storage_options), device=self._device
        )
        if light:
            return
        dtype, folder = DTYPES[spec.precision], spec.folder()
        self._vae = load_vae(folder, dtype=dtype, device=self._device)
        self._states = spec.text == "states"
        self._text = load_text(folder, models=self._states, max_tokens=spec.max_tokens, dtype=dtype, device=self._device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encodes cropped rows.

        Args:
            rows: ``rows.CROPPED_SCHEMA`` (light: IMAGE may be missing); see ``rows.cropped_table``.

        Returns:
            As many rows of :attr:`schema`, in order, and REASON, which is not empty where a row cannot be used after all.
        """
        columns: dict[str, Any] = {name: rows.column(name) for name in PASSED_ON}
        columns[REASON] = pa.array([""] * rows.num_rows, pa.string())
        if rows.num_rows:
            columns |= self._captions(rows.column(CAPTION).to_pylist())
            columns |= {} if self._light else self._images(pixels_of(rows.column(IMAGE)))
        schema = self.schema.append(pa.field(REASON, pa.string()))
        empty = {field.name: pa.array([], field.type) for field in schema if field.name not in columns}
        return pa.table(columns | empty).select(schema.names).cast(schema)

    @torch.inference_mode()
    def _images(self, pixels: np.ndarray) -> dict[str, pa.Array]:
        sample = torch.from_numpy(pixels.copy()).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self._vae.encode(sample.contiguous().to(self._vae.dtype)).latent_dist  # of [batch, 3, side, side]
        # What the UNet sees: diffusers' pipelines decode latents / scaling_factor + shift_factor.
        scale, shift = self._vae.config.scaling_factor, self._vae.config.get("shift_factor") or 0.0
        mean = _half((posterior.mean.float() - shift) * scale)  # [batch, channels, height, width]
        std = _half(posterior.std.float() * scale)
        finite = np.isfinite(mean).all(axis=(1, 2, 3)) & np.isfinite(std).all(axis=(1, 2, 3))
        return {
            LATENT_MEAN: binary_column(mean),
            LATENT_STD: binary_column(std),
            REASON: pa.array(np.where(finite, "", "latents are not finite: try encode.precision=fp32"), pa.string()),
        }

    @torch.inference_mode()
    def _captions(self, captions: list[str]) -> dict[str, pa.Array]:
        unique = list(dict.fromkeys(captions))  # data sets repeat captions; each is encoded once a batch
        number = {caption: index for index, caption in enumerate(unique)}
        place = np.array([number[caption] for caption in captions])
        z = self._prompt_encoder.encode(unique).numpy()[place]  # [n, dim]
        offsets = np.arange(len(z) + 1, dtype=np.int32) * z.shape[1]
        columns = {EMBEDDING: pa.ListArray.from_arrays(pa.array(offsets), pa.array(z.ravel()))}
        if self._light:
            return columns
        ids, mask = self._text.tokenize(unique)
        columns[TEXT_LENGTH] = pa.array(mask.sum(dim=1).numpy()[place], pa.int32())
        if not self._states:
            return columns | {TEXT_TOKENS: binary_column(ids.numpy().astype("<i4")[place])}
        return columns | {TEXT_STATES: binary_column(_half(self._text.states(ids, mask))[place])}  # n x [tokens, width]


class ChunkEncoder:
    """Encodes the chunks of the encode stream; the callable class of a Ray Data actor pool."""

    def __init__(self, spec: EncoderSpec, batch_size: int, light: bool) -> None:
        self._encoder, self._batch_size = Encoder(spec, light=light), batch_size

    def __call__(self, chunks: pa.Table) -> pa.Table:
        """Replaces the cropped rows of ``rows.CHUNK_SCHEMA`` by encoded ones; rows that fail here join the rejected."""
        rejected, packed = [], []
        for index, head in enumerate(chunks.drop_columns([ROWS]).to_pylist()):
            rows = unpack_rows(chunks, index)
            starts = range(0, max(1, rows.num_rows), self._batch_size)
            made = pa.concat_tables([self._encoder(rows.slice(start, self._batch_size)) for start in starts])
            pairs = zip(made.column(KEY).to_pylist(), made.column(REASON).to_pylist(), strict=True)
            failed = {key: reason for key, reason in pairs if reason}
            if failed:  # all views of the row go: a row is used or rejected, never half
                made = made.filter(pc.invert(pc.is_in(made.column(KEY), pa.array(list(failed), pa.string()))))
            items = json.loads(head[REJECTED_ROWS]) + [[head[ORDINAL], key, reason] for key, reason in failed.items()]
            rejected.append(json.dumps(items))
            packed.append(pack_rows(made.select(self._encoder.schema.names)))
        values = {REJECTED_ROWS: pa.array(rejected, pa.string()), ROWS: pa.array(packed, pa.binary())}
        return pa.table({name: values.get(name, chunks.column(name)) for name in CHUNK_SCHEMA.names})


def describe(spec: EncoderSpec, framing: Framing, mode: str = "offline") -> Encoding:
    """Finds the shapes and fingerprints of what the encoders will give, without encoding anything.

    Raises:
        ConfigError: if the prompt encoder is not there.
        FileNotFoundError: if the pipeline is not there.
        ValueError: if the resolution is not a multiple of the VAE's factor, or the pipeline is of another kind.
    """
    _hush()
    folder, resolution = spec.folder(), framing.resolution
    for name in ("vae/config.json", "text_encoder/config.json", "tokenizer"):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no {name}; check teacher.source")
    vae = json.loads((folder / "vae/config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if resolution % factor:
        raise ValueError(f"data.resolution={resolution} is not a multiple of {factor}, the VAE's factor")
    text = load_text(folder, models=False, max_tokens=spec.max_tokens)
    try:
        prompt_encoder = PromptEncoder.from_pretrained(resolve_source(spec.prompt_encoder, spec.storage_options))
    except FileNotFoundError as error:
        raise ConfigError(f"router.prompt_encoder={spec.prompt_encoder!r}: {error}") from error
    index = read_index(folder)
    parts = ("vae", *text_parts(index))
    return Encoding(
        latent_shape=(vae["latent_channels"], resolution // factor, resolution // factor),
        text_shape=text.shape,
        embedding_dim=prompt_encoder.dim,
        resolution=resolution,
        fingerprints={
            **{name: fingerprint(folder / name) for name in parts},
            "prompt_encoder": prompt_encoder.fingerprint,
        },
        text=spec.text,
        mode=mode,
        precision=spec.precision,
        framing=framing.to_json(),
        sources={
            "pipeline": spec.pipeline_dir,
            "prompt_encoder": spec.prompt_encoder,
            **{name: class_name_of(index, name) for name in parts},
        },
    )


def _hush() -> None:
    """Turns off the bars of loading weights where nobody watches them."""
    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _half(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.float16).cpu().numpy()
