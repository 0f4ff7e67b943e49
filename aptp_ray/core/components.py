"""The parts of a stock Stable Diffusion pipeline, loaded one by one, and the text encoder as the pipeline calls it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

# No tokenizer of a text-to-image model reads more; larger values are transformers' placeholder for "unknown".
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Components:
    """What a Stable Diffusion pipeline holds besides its UNet."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any


def load_components(
    pipeline_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Components:
    """Loads VAE, text encoder, tokenizer and scheduler of a pipeline directory, by the classes of its model_index.json.

    Args:
        pipeline_dir: a stock Stable Diffusion directory; weights in safetensors.
        dtype: of the text encoder, and of the VAE unless its config asks for ``force_upcast``.
        device: where the models run.

    Raises:
        FileNotFoundError: if the directory or one of its parts is not there.
        ValueError: if a part names a class that neither diffusers nor transformers has.
    """
    root = Path(pipeline_dir)
    index_file = root / "model_index.json"
    if not index_file.is_file():
        raise FileNotFoundError(f"{root} is no pipeline directory: it has no model_index.json")
    index = json.loads(index_file.read_text(encoding="utf-8"))

    def load(part: str, **options: Any) -> Any:
        library, name = index.get(part) or (None, None)
        if name is None or not (root / part).is_dir():
            raise FileNotFoundError(f"{root} has no {part}: a Stable Diffusion pipeline names it in model_index.json")
        found = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), name, None)
        if found is None and part == "tokenizer":  # names of tokenizer classes come and go between transformers versions
            found = transformers.AutoTokenizer
        if found is None:
            raise ValueError(f"{index_file}: {part} is {library}.{name}; only classes of diffusers and transformers load")
        return found.from_pretrained(str(root / part), **options)

    vae = load("vae", use_safetensors=True, torch_dtype=torch.float32)
    if dtype != torch.float32 and not vae.config.get("force_upcast", False):
        vae = vae.to(dtype)
    text_encoder = load("text_encoder", use_safetensors=True, dtype=dtype)
    return Components(
        vae=vae.to(device).eval().requires_grad_(False),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        tokenizer=load("tokenizer"),
        scheduler=load("scheduler"),
    )


def load_unet(directory: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a stock or a pruned UNet, as the directory's config.json says.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it names another class.
    """
    config_file = Path(directory) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} is no UNet directory: it has no config.json")
    name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
    if name == "PrunedUNet2DConditionModel":
        from aptp_ray.core.prune import PrunedUNet2DConditionModel

        unet = PrunedUNet2DConditionModel.from_pretrained(str(directory), use_safetensors=True, torch_dtype=dtype)
    elif name == "UNet2DConditionModel":
        unet = diffusers.UNet2DConditionModel.from_pretrained(str(directory), use_safetensors=True, torch_dtype=dtype)
    else:
        raise ValueError(f"{config_file} names {name}; expected UNet2DConditionModel or PrunedUNet2DConditionModel")
    return unet.to(device).eval().requires_grad_(False)


def make_scheduler(name: str, like: Any) -> Any:
    """Returns a scheduler of diffusers class ``name`` with the noise schedule and prediction type of ``like``.

    Raises:
        ValueError: if diffusers has no such class.
    """
    found: Any = getattr(diffusers, name, None)
    try:
        known = hasattr(found, "set_timesteps")
    except ImportError as error:  # a stand-in: some schedulers need packages that are not here
        raise ValueError(f"{name} cannot be used here: {error}") from error
    if not known:
        raise ValueError(f"diffusers has no scheduler {name!r}; try DDIMScheduler, EulerDiscreteScheduler or PNDMScheduler")
    return found.from_config(like.config)


class TextEncoder:
    """Prompts to the states that the UNet attends to, as StableDiffusionPipeline.encode_prompt makes them.

    Padded to ``tokenizer.model_max_length``; the attention mask is passed only where the text encoder's config says
    ``use_attention_mask``, and the UNet gets none.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        if not 1 <= tokenizer.model_max_length <= _MAX_TOKENS:
            raise ValueError(
                f"the tokenizer's model_max_length is {tokenizer.model_max_length}: set it in tokenizer_config.json to the "
                "number of tokens that the UNet was trained with (77 for Stable Diffusion)"
            )
        self._tokenizer, self._model = tokenizer, model

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns [n, tokens, width] on the model's device and in its precision."""
        inputs = self._tokenizer(
            list(texts),
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self._model.parameters()).device
        mask = inputs.attention_mask.to(device) if getattr(self._model.config, "use_attention_mask", False) else None
        return self._model(inputs.input_ids.to(device), attention_mask=mask)[0]
