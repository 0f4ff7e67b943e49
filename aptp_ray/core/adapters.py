"""A teacher's LoRA for a model that was pruned out of it: the same low-rank update, of the channels that stayed.

Because pruning slices the weights, an update fitted this way and fused into the pruned model is the update fused into the
teacher and pruned afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from aptp_ray.core.prune import extract_code, full_model
from aptp_ray.core.pruned_model import site_width
from aptp_ray.core.space import ArchitectureSpace

# "unet." or "transformer." of a pipeline's file; then the module; then diffusers' old names of the factors, or peft's.
_KEY = re.compile(
    r"^(?:unet\.|transformer\.)?(?P<module>.+?)(?:\.processor)?(?:\.lora)?\.(?P<factor>lora_A|lora_B|down|up)\.weight$"
)


def fit_lora(state: Mapping[str, Tensor], pruned: Any) -> dict[str, Tensor]:
    """Cuts a LoRA that was trained on the teacher down to a pruned model.

    Args:
        state: Module path -> factor, in diffusers' or peft's names: `...to_q.lora_A.weight` [rank, inputs] and
            `...to_q.lora_B.weight` [outputs, rank]. Others (alphas) are passed on.
        pruned: PrunedUNet2DConditionModel or PrunedPixArtTransformer2DModel.

    Returns:
        The factors of the modules that are still there, under the same names.

    Raises:
        ValueError: If a factor's shape is not that of the teacher's layer.
    """
    teacher = full_model(pruned)
    space = ArchitectureSpace.of(teacher, depth=(pruned.config.get("pruning") or {}).get("depth", "modules"))
    kept = _kept_channels(teacher, space, space.view(extract_code(pruned, space)))
    present, modules = dict(pruned.named_modules()), dict(teacher.named_modules())
    fitted = {}
    for key, value in state.items():
        found = _KEY.match(key)
        if found is None:
            fitted[key] = value
            continue
        name, into = found["module"], found["factor"] in ("lora_A", "down")
        layer: Any = modules.get(name)
        sizes = () if layer is None else tuple(layer.weight.shape[:2])
        if not sizes or value.shape[1 if into else 0] != sizes[1 if into else 0]:
            raise ValueError(f"{key} has shape {list(value.shape)}, the teacher's {name} {list(sizes)}: not this teacher's LoRA")
        if name not in present:
            continue  # of a closed block
        outputs, inputs = kept.get(name, (None, None))
        index = inputs if into else outputs
        fitted[key] = value if index is None else value.index_select(1 if into else 0, index.to(value.device))
    return fitted


@torch.no_grad()
def fuse_lora(model: nn.Module, state: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Adds scale * B A to the weights, in place; `state` as `fit_lora` returns it, without alphas.

    Raises:
        ValueError: If a factor is missing or fits no layer.
    """
    factors: dict[str, dict[bool, Tensor]] = {}
    for key, value in state.items():
        found = _KEY.match(key)
        if found is None:
            raise ValueError(f"{key} is no factor of a LoRA: fold alphas into the scale first")
        factors.setdefault(found["module"], {})[found["factor"] in ("lora_A", "down")] = value
    for name, pair in factors.items():
        if len(pair) != 2:
            raise ValueError(f"the LoRA has one factor of {name} alone")
        weight: Any = model.get_submodule(name).weight
        up, down = (pair[into].to(weight.device, torch.float32) for into in (False, True))
        weight += (scale * (up.flatten(1) @ down.flatten(1))).reshape(weight.shape).to(weight.dtype)


def _kept_channels(
    teacher: nn.Module, space: ArchitectureSpace, view: dict[str, Tensor]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Module path of each layer that shrinks -> the outputs and the inputs that stay; None: all."""
    kept: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for site in space.width_sites:
        module: Any = teacher.get_submodule(site.name)
        index = view[site.key].repeat_interleave(site_width(module)[1]).nonzero().flatten()
        if isinstance(module, ResnetBlock2D):
            layers = {"conv1": (index, None), "time_emb_proj": (index, None), "conv2": (None, index)}
        elif isinstance(module, Attention):
            layers = {**dict.fromkeys(("to_q", "to_k", "to_v"), (index, None)), "to_out.0": (None, index)}
        else:
            gated = isinstance(module.net[0], GEGLU)
            into = torch.cat([index, index + module.net[2].in_features]) if gated else index
            layers = {"net.0.proj": (into, None), "net.2": (None, index)}
        kept |= {f"{site.name}.{part}": indices for part, indices in layers.items()}
    return kept
