"""Hard code to a physically smaller model that keeps diffusers' interface.

`prune_unet` cuts a teacher's weights; the result records in its config which entries of each site it kept, so that
`from_pretrained` rebuilds the same shapes. One routine, `pruned_model.shrink`, cuts a full model in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from aptp_ray.core.backbones import Backbone, stock_class
from aptp_ray.core.pruned_model import PRUNED_CLASSES, read_pruning, shrink
from aptp_ray.core.space import ArchitectureSpace


def prune_unet(unet: Backbone, code: Tensor, space: ArchitectureSpace | None = None) -> Any:
    """Cuts a teacher down to a hard code; its output equals the teacher's under that code's masks.

    The result owns copies of the kept weights, with the teacher's dtype, device, `requires_grad`, training mode,
    gradient checkpointing and attention processors. Hooks (those of a GatedUNet, too) stay on the teacher.

    Args:
        unet: The teacher, UNet2DConditionModel or PixArtTransformer2DModel; not changed.
        code: bool (or 0/1) [dim] in the layout of `space`.
        space: The teacher's sites; `ArchitectureSpace.of(unet)` by default.

    Returns:
        PrunedUNet2DConditionModel or PrunedPixArtTransformer2DModel.

    Raises:
        ValueError: If the code is not a valid hard code, the UNet is pruned already, or it holds weights that its
            config does not describe (adapters).
    """
    space = ArchitectureSpace.of(unet) if space is None else space
    if code.ndim != 1:
        raise ValueError(f"prune_unet takes one code [dim], got shape {tuple(code.shape)}")
    hard = space.validate(code).cpu()
    if unet.config.get("pruning") is not None:
        raise ValueError("this UNet is pruned already; prune its teacher, with the codes combined by `&`")
    with torch.device("meta"):
        pruned: Any = _pruned_class(unet).from_config(unet.config)
    expected, present = set(pruned.state_dict()), set(unet.state_dict())
    if expected != present:
        raise ValueError(
            f"the UNet's weights are not those its config describes, for instance {sorted(expected ^ present)[:3]}; "
            "fuse or unload adapters (LoRA, IP-Adapter, fused projections) before pruning"
        )
    pruned.load_state_dict(unet.state_dict(), assign=True)
    _copy_settings(unet, pruned)
    shrink(pruned, *_kept_and_closed(hard, space))
    pruned.register_to_config(pruning=_encode(hard, space))
    _own_storage(unet, pruned)
    return pruned


def extract_code(pruned: Any, space: ArchitectureSpace | None = None) -> Tensor:
    """The hard code that a pruned model was cut by.

    Args:
        pruned: Result of `prune_unet` or `from_pretrained`.
        space: The teacher's sites, if known. By default those of the model that the config describes.

    Returns:
        bool [dim].
    """
    pruning = pruned.config.get("pruning")
    teacher = full_model(pruned)
    if space is None:
        space = ArchitectureSpace.of(teacher, depth=(pruning or {}).get("depth", "modules"))
    code = space.full_code()
    if pruning is None:
        return code
    kept, closed = read_pruning(teacher, pruning)
    for site in space.sites:
        if site.kind == "depth":
            code[site.start] = site.name not in closed
        elif site.name in kept:
            code[site.slice] = kept[site.name]
    return space.validate(code)


def full_model(pruned: Any) -> Any:
    """The model that a pruned one was cut out of, as its config describes it: shapes only, on the meta device."""
    with torch.device("meta"):
        return stock_class(pruned).from_config(_teacher_config(pruned.config))


def _pruned_class(teacher: nn.Module) -> Any:
    return next(kind for kind in PRUNED_CLASSES if issubclass(kind, stock_class(teacher)))


def _teacher_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("pruning", "auto_map", "_class_name")}


def _kept_and_closed(code: Tensor, space: ArchitectureSpace) -> tuple[dict[str, Tensor], list[str]]:
    view = space.view(code)
    kept = {site.name: view[site.key] for site in space.width_sites if not view[site.key].all()}
    return kept, [site.name for site in space.depth_sites if not view[site.key].item()]


def _encode(code: Tensor, space: ArchitectureSpace) -> dict[str, Any]:
    """Config form of a hard code [dim]; sites that are whole are left out."""
    kept, closed = _kept_and_closed(code, space)
    ranges = {name: _to_ranges(mask.nonzero().flatten().tolist()) for name, mask in kept.items()}
    pruning = {"format": 1, "kept": ranges, "closed": closed}
    return pruning | ({"depth": space.depth} if space.depth != "modules" else {})


def _to_ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def _copy_settings(source: Any, target: Any) -> None:
    """What a state dict does not carry."""
    trainable = {name: parameter.requires_grad for name, parameter in source.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(trainable[name])
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        module.training = modules[name].training
        for key in module._non_persistent_buffers_set:  # a transformer's position embedding
            setattr(module, key, getattr(modules[name], key).clone())
        if isinstance(module, Attention):
            # Processors without weights (the others fail the check of the weights) can be shared.
            module.set_processor(modules[name].processor)
        if getattr(modules[name], "gradient_checkpointing", False):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = modules[name]._gradient_checkpointing_func


def _own_storage(source: nn.Module, target: nn.Module) -> None:
    """Copies what is still the source's memory, so that training one does not change the other."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in source.parameters()}
    for parameter in target.parameters():
        if parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.data.clone()
