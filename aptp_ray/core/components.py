"""The parts of a stock pipeline (Stable Diffusion, XL, PixArt), loaded one by one by the classes that its index names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from aptp_ray.core.backbones import STOCK_CLASSES, as_unet
from aptp_ray.core.pruned_model import PRUNED_CLASSES
from aptp_ray.core.text import AnyTextEncoder, PooledTextEncoder, TextEncoder


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

    def text(self) -> AnyTextEncoder:
        """Returns what encodes this pipeline's texts."""
        if self.text_encoder_2 is None:
            return TextEncoder(self.tokenizer, self.text_encoder)
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        return PooledTextEncoder(pairs, zero_empty=self.zero_empty_text)


def load_components(
    pipeline_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Components:
    """Loads VAE, text encoders, tokenizers and scheduler of a pipeline directory, by the classes of its model_index.json.

    Args:
        pipeline_dir: a stock pipeline's directory; weights in safetensors.
        dtype: of the text encoder, and of the VAE unless its config asks for ``force_upcast``.
        device: where the models run.

    Raises:
        FileNotFoundError: if the directory or one of its parts is not there.
        ValueError: if a part names a class that neither diffusers nor transformers has.
    """
    root = Path(pipeline_dir)
    if not (root / "model_index.json").is_file():
        raise FileNotFoundError(f"{root} is no pipeline directory: it has no model_index.json")
    index = read_index(root)
    second = text_parts(index)[2:]
    encoder_2, tokenizer_2 = second or (None, None)
    return Components(
        vae=load_vae(root, dtype=dtype, device=device),
        text_encoder=_load_text_model(root, index, "text_encoder", dtype, device),
        tokenizer=load_part(root, index, "tokenizer"),
        scheduler=load_part(root, index, "scheduler"),
        text_encoder_2=_load_text_model(root, index, encoder_2, dtype, device) if encoder_2 else None,
        tokenizer_2=load_part(root, index, tokenizer_2) if tokenizer_2 else None,
        zero_empty_text=_zero_empty(index),
    )


def load_vae(
    pipeline_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Any:
    """Loads a pipeline's VAE, frozen; in float32 where its config asks for ``force_upcast``."""
    root = Path(pipeline_dir)
    vae = load_part(root, read_index(root), "vae", use_safetensors=True, torch_dtype=torch.float32)
    if dtype != torch.float32 and not vae.config.get("force_upcast", False):
        vae = vae.to(dtype)
    return vae.to(device).eval().requires_grad_(False)


def load_text(
    pipeline_dir: str | Path,
    *,
    models: bool = True,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> AnyTextEncoder:
    """Loads what encodes a pipeline's texts, and nothing else of it.

    Args:
        pipeline_dir: see :func:`load_components`.
        models: False: tokenizers alone, which make token ids and know the states' shape.
        max_tokens: to which texts are padded and cut; None: the tokenizer's own limit.
        dtype: of the models.
        device: where they run.

    Raises:
        FileNotFoundError: if a part is not there.
        ValueError: as :func:`load_components`; or the number of tokens is not known.
    """
    root = Path(pipeline_dir)
    index = read_index(root)
    parts = text_parts(index)
    names, tokenizers = parts[::2], [load_part(root, index, part) for part in parts[1::2]]
    configs = [transformers.AutoConfig.from_pretrained(str(root / name)) for name in names]
    loaded = [_load_text_model(root, index, name, dtype, device) if models else None for name in names]
    if len(names) == 1:
        return TextEncoder(tokenizers[0], loaded[0], config=configs[0], max_tokens=max_tokens)
    pairs = list(zip(tokenizers, loaded, strict=True))
    return PooledTextEncoder(pairs, configs=configs, zero_empty=_zero_empty(index), max_tokens=max_tokens)


def read_index(pipeline_dir: str | Path) -> dict[str, Any]:
    """Returns model_index.json; of a folder whose model is still to be trained, what it would say of the parts that are there.

    Raises:
        FileNotFoundError: if the folder has neither an index nor a text encoder.
    """
    root = Path(pipeline_dir)
    if (root / "model_index.json").is_file():
        return json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    config = root / "text_encoder" / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{root} is no pipeline directory: it has no model_index.json")
    text_encoder = json.loads(config.read_text(encoding="utf-8"))["architectures"][0]
    return {
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", text_encoder],
        "tokenizer": ["transformers", "AutoTokenizer"],
    }


def text_parts(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a pipeline's text encoders, each followed by its tokenizer's.

    Raises:
        ValueError: if there are more than two text encoders (Stable Diffusion 3).
    """
    numbers = [suffix for suffix in ("", "_2", "_3") if (index.get(f"text_encoder{suffix}") or (None,))[0] is not None]
    if numbers not in ([""], ["", "_2"]):
        raise ValueError(
            f"the pipeline's text encoders are {[f'text_encoder{suffix}' for suffix in numbers]}; pipelines with text_encoder "
            "alone (Stable Diffusion 1.x and 2.x, PixArt) or with text_encoder_2 beside it (Stable Diffusion XL) can be used"
        )
    return tuple(f"{part}{suffix}" for suffix in numbers for part in ("text_encoder", "tokenizer"))


def class_name_of(index: Mapping[str, Any], part: str) -> str:
    """Name of the class that the index gives a part."""
    return str((index.get(part) or (None, None))[1])


def load_part(root: Path, index: Mapping[str, Any], part: str, **options: Any) -> Any:
    """Loads one part by the class that the index names for it.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if neither diffusers nor transformers has its class.
    """
    library, name = index.get(part) or (None, None)
    if name is None or not (root / part).is_dir():
        raise FileNotFoundError(f"{root} has no {part}: a pipeline names it in model_index.json")
    found = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), name, None)
    if found is None and part.startswith("tokenizer"):  # names of tokenizer classes come and go between transformers versions
        found = transformers.AutoTokenizer
    if found is None:
        raise ValueError(
            f"{root / 'model_index.json'}: {part} is {library}.{name}; only classes of diffusers and transformers load"
        )
    return found.from_pretrained(str(root / part), **options)


def _load_text_model(root: Path, index: Mapping[str, Any], part: str, dtype: torch.dtype, device: str | torch.device) -> Any:
    return load_part(root, index, part, use_safetensors=True, dtype=dtype).to(device).eval().requires_grad_(False)


def _zero_empty(index: Mapping[str, Any]) -> bool:
    return bool(index.get("force_zeros_for_empty_prompt", False))


def denoiser_part(index: Mapping[str, Any]) -> str:
    """The part of a pipeline that denoises and is pruned, by its model_index.json."""
    return "transformer" if "transformer" in index else "unet"


def denoiser_dir(pipeline_dir: str | Path) -> Path:
    """The folder of a pipeline's model that denoises."""
    root = Path(pipeline_dir)
    return root / denoiser_part(read_index(root))


def denoiser_config(source: str, *, revision: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Finds the class and the config of a pipeline's model that denoises, without its weights.

    Args:
        source: a folder, or a hub id.
        revision: of the hub's repository.

    Raises:
        OSError: if there is none.
        ValueError: if it is of a class that cannot be pruned.
    """
    try:
        index: Mapping[str, Any] = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    except OSError:  # parts of a pipeline, to which others are added
        index = {}
    config = diffusers.UNet2DConditionModel.load_config(source, subfolder=denoiser_part(index), revision=revision)
    return _class_named(config.get("_class_name"), source), config


def _class_named(name: Any, where: Any) -> Any:
    known = {kind.__name__: kind for kind in (*STOCK_CLASSES, *PRUNED_CLASSES)}
    if name not in known:
        raise ValueError(f"{where} names {name}; expected {', '.join(known)}")
    return known[name]


def load_backbone(directory: str | Path, **options: Any) -> Any:
    """Loads a stock or a pruned model, as the directory's config.json says.

    Args:
        directory: of the model itself: a teacher's :func:`denoiser_dir`, or an expert's.
        options: further arguments of diffusers' ``from_pretrained``.

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it names another class.
    """
    config_file = Path(directory) / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} is no UNet directory: it has no config.json")
    name = json.loads(config_file.read_text(encoding="utf-8")).get("_class_name")
    return _class_named(name, config_file).from_pretrained(str(directory), use_safetensors=True, **options)


def load_unet(directory: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a model as :func:`load_backbone` does, frozen; it is called as Stable Diffusion's UNet is."""
    model = load_backbone(directory, torch_dtype=dtype)
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
