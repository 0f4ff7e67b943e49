"""The parts of a stock pipeline (Stable Diffusion, XL, PixArt), loaded one by one, and its texts as it encodes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from aptp_ray.core.backbones import STOCK_CLASSES, as_unet
from aptp_ray.core.pruned_model import PRUNED_CLASSES

# No tokenizer of a text-to-image model reads more; larger values are transformers' placeholder for "unknown".
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Components:
    """What a pipeline holds besides the model that denoises.

    Attributes:
        vae: AutoencoderKL.
        text_encoder: the first, or only one.
        tokenizer: its tokenizer.
        scheduler: the pipeline's.
        text_encoder_2: Stable Diffusion XL's second one, which also pools; else None.
        tokenizer_2: its tokenizer.
        zero_empty_text: whether an empty text's states are zeros (Stable Diffusion XL).
    """

    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    zero_empty_text: bool = False

    def text(self) -> Callable[[Sequence[str]], Tensor]:
        """Returns what encodes this pipeline's texts."""
        if self.text_encoder_2 is None:
            return TextEncoder(self.tokenizer, self.text_encoder)
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return PooledTextEncoder(pairs, zero_empty=self.zero_empty_text)


def load_components(
    pipeline_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Components:
    """Loads VAE, text encoder, tokenizer and scheduler of a pipeline directory, by the classes of its model_index.json.

    Args:
        pipeline_dir: a stock pipeline's directory; weights in safetensors.
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
            raise FileNotFoundError(f"{root} has no {part}: a pipeline names it in model_index.json")
        found = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), name, None)
        if found is None and part.startswith("tokenizer"):  # names of tokenizer classes come and go between transformers versions
            found = transformers.AutoTokenizer
        if found is None:
            raise ValueError(f"{index_file}: {part} is {library}.{name}; only classes of diffusers and transformers load")
        return found.from_pretrained(str(root / part), **options)

    vae = load("vae", use_safetensors=True, torch_dtype=torch.float32)
    if dtype != torch.float32 and not vae.config.get("force_upcast", False):
        vae = vae.to(dtype)

    def text_model(part: str) -> Any:
        return load(part, use_safetensors=True, dtype=dtype).to(device).eval().requires_grad_(False)

    second = (index.get("text_encoder_2") or (None, None))[1] is not None
    return Components(
        vae=vae.to(device).eval().requires_grad_(False),
        text_encoder=text_model("text_encoder"),
        tokenizer=load("tokenizer"),
        scheduler=load("scheduler"),
        text_encoder_2=text_model("text_encoder_2") if second else None,
        tokenizer_2=load("tokenizer_2") if second else None,
        zero_empty_text=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def load_unet(directory: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a stock or a pruned model, as the directory's config.json says; it is called as Stable Diffusion's UNet is.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it names another class.
    """
    config_file = Path(directory) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} is no UNet directory: it has no config.json")
    name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
    known = {kind.__name__: kind for kind in (*STOCK_CLASSES, *PRUNED_CLASSES)}
    if name not in known:
        raise ValueError(f"{config_file} names {name}; expected {', '.join(known)}")
    loaded: Any = known[name]
    model = loaded.from_pretrained(str(directory), use_safetensors=True, torch_dtype=dtype)
    return as_unet(model.to(device).eval().requires_grad_(False))


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
    """Prompts to the states that the model attends to, as the pipeline's encode_prompt makes them.

    Padded to ``tokenizer.model_max_length``. Stable Diffusion's UNet gets no attention mask, and its text encoder one only
    where that one's config says ``use_attention_mask``. PixArt's transformer does not read padding: its states are zeros here.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        if not 1 <= tokenizer.model_max_length <= _MAX_TOKENS:
            raise ValueError(
                f"the tokenizer's model_max_length is {tokenizer.model_max_length}: set it in tokenizer_config.json to the "
                "number of tokens that the UNet was trained with (77 for Stable Diffusion)"
            )
        self._tokenizer, self._model = tokenizer, model
        self._pixart = getattr(model.config, "model_type", None) == "t5"

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns [n, tokens, width] on the model's device and in its precision."""
        # PixArt was trained on lower-case captions, and its pipeline lowers every prompt.
        inputs = _tokenized(self._tokenizer, [text.lower().strip() for text in texts] if self._pixart else texts)
        device = next(self._model.parameters()).device
        masked = self._pixart or getattr(self._model.config, "use_attention_mask", False)
        mask = inputs.attention_mask.to(device) if masked else None
        states = self._model(inputs.input_ids.to(device), attention_mask=mask)[0]
        return states * mask[:, :, None].to(states.dtype) if self._pixart and mask is not None else states


class PooledTextEncoder:
    """Prompts to the states of two text encoders side by side, and the second one's pooled text in a last row.

    As StableDiffusionXLPipeline.encode_prompt makes them (Podell et al. 2023, section 2.1); see `backbones.model_inputs`.
    """

    def __init__(self, encoders: Sequence[tuple[Any, Any]], *, zero_empty: bool = False) -> None:
        """Wraps loaded models.

        Args:
            encoders: (tokenizer, model) pairs; the last model pools.
            zero_empty: whether an empty text's states are zeros.
        """
        self._encoders, self._zero_empty = list(encoders), zero_empty

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns [n, tokens + 1, width] on the models' device and in their precision."""
        states, pooled = [], torch.empty(0)
        for tokenizer, model in self._encoders:
            ids = _tokenized(tokenizer, texts).input_ids.to(next(model.parameters()).device)
            output = model(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])  # the last layer's are tuned to the contrastive loss
            pooled = output[0]
        beside = torch.cat(states, dim=-1)  # [n, tokens, width]
        last = functional.pad(pooled, (0, beside.shape[-1] - pooled.shape[-1]))
        packed = torch.cat([beside, last[:, None].to(beside.dtype)], dim=1)
        if self._zero_empty:
            packed[[index for index, text in enumerate(texts) if not text]] = 0
        return packed


def _tokenized(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
