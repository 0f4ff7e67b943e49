"""Hard code to a physically smaller UNet that keeps diffusers' interface.

`prune_unet` cuts a teacher's weights; the result records in its config which entries of each site it kept, so that
`from_pretrained` rebuilds the same shapes. One routine, `cutting.cut`, shrinks a full UNet in both cases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from aptp_ray.core.cutting import cut
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace


def _with_base_parameters(init: Callable[..., None]) -> Callable[..., None]:
    """Spells out the base class's parameters: diffusers reads the config's fields from the signature."""
    own = inspect.signature(init)
    base = inspect.signature(UNet2DConditionModel.__init__)
    init.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*base.parameters.values(), own.parameters["pruning"]]
    )
    return init


class PrunedUNet2DConditionModel(UNet2DConditionModel):
    """A UNet2DConditionModel with fewer groups, heads, chunks and blocks.

    Takes the arguments of `UNet2DConditionModel` (those of the teacher) and `pruning`. With `pruning=None` it is the
    full UNet.
    """

    @register_to_config
    @_with_base_parameters
    def __init__(self, *args: Any, pruning: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Builds the teacher's UNet and cuts it.

        Args:
            *args: Of UNet2DConditionModel.
            pruning: What to keep: {"format": 1, "kept": {width site: "0-3,7"}, "closed": [depth sites]}. A width site
                that is not named is whole.
            **kwargs: Of UNet2DConditionModel.

        Raises:
            ValueError: If `pruning` does not fit the UNet that the other arguments describe.
        """
        super().__init__(*args, **kwargs)
        if pruning is not None:
            space = ArchitectureSpace.of(self)
            cut(self, space, _decode(pruning, space))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' `from_pretrained`, but every weight must be there, in the right shape.

        Raises:
            ValueError: If a weight is missing, left over, or of another shape, or `ignore_mismatched_sizes` is asked
                for: diffusers would leave such weights at random values with no more than a warning.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("a pruned UNet is never loaded with ignore_mismatched_sizes: weights would be random")
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
        if wrong:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not fit their config.json: "
                + "; ".join(f"{what}: {len(keys)}, such as {keys[:3]}" for what, keys in wrong.items())
                + ". The two files are probably not of the same expert; write both again with save_pretrained."
            )
        return (model, info) if wants_info else model


def prune_unet(unet: UNet2DConditionModel, code: Tensor) -> PrunedUNet2DConditionModel:
    """Cuts a teacher down to a hard code; its output equals the teacher's under that code's masks.

    The result owns copies of the kept weights, with the teacher's dtype, device, `requires_grad`, training mode,
    gradient checkpointing and attention processors. Hooks (those of a GatedUNet, too) stay on the teacher.

    Args:
        unet: The teacher; not changed.
        code: bool (or 0/1) [dim] in the layout of `ArchitectureSpace.of(unet)`.

    Raises:
        ValueError: If the code is not a valid hard code, the UNet is pruned already, or it holds weights that its
            config does not describe (adapters).
    """
    space = ArchitectureSpace.of(unet)
    if code.ndim != 1:
        raise ValueError(f"prune_unet takes one code [dim], got shape {tuple(code.shape)}")
    hard = space.validate(code).cpu()
    if unet.config.get("pruning") is not None:
        raise ValueError("this UNet is pruned already; prune its teacher, with the codes combined by `&`")
    with torch.device("meta"):
        pruned = PrunedUNet2DConditionModel.from_config(unet.config)
    expected, present = set(pruned.state_dict()), set(unet.state_dict())
    if expected != present:
        raise ValueError(
            f"the UNet's weights are not those its config describes, for instance {sorted(expected ^ present)[:3]}; "
            "fuse or unload adapters (LoRA, IP-Adapter, fused projections) before pruning"
        )
    pruned.load_state_dict(unet.state_dict(), assign=True)
    _copy_settings(unet, pruned)
    cut(pruned, space, hard)
    pruned.register_to_config(pruning=_encode(hard, space))
    _own_storage(unet, pruned)
    return pruned


def extract_code(pruned: PrunedUNet2DConditionModel, space: ArchitectureSpace | None = None) -> Tensor:
    """The hard code that a pruned UNet was cut by.

    Args:
        pruned: Result of `prune_unet` or `from_pretrained`.
        space: The teacher's sites, if known. By default those of the UNet that the config describes.

    Returns:
        bool [dim].
    """
    if space is None:
        with torch.device("meta"):
            space = ArchitectureSpace.of(UNet2DConditionModel.from_config(_teacher_config(pruned.config)))
    pruning = pruned.config.get("pruning")
    return space.full_code() if pruning is None else _decode(pruning, space)


def _teacher_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("pruning", "_class_name")}


def _encode(code: Tensor, space: ArchitectureSpace) -> dict[str, Any]:
    """Config form of a hard code [dim]; sites that are whole are left out."""
    view = space.view(code)
    partial = [site for site in space.width_sites if not view[site.key].all()]
    kept = {site.name: _to_ranges(view[site.key].nonzero().flatten().tolist()) for site in partial}
    closed = [site.name for site in space.depth_sites if not view[site.key].item()]
    return {"format": 1, "kept": kept, "closed": closed}


def _decode(pruning: Mapping[str, Any], space: ArchitectureSpace) -> Tensor:
    """Inverse of `_encode`: bool [dim]."""
    if pruning.get("format") != 1:
        raise ValueError(f"unknown pruning format {pruning.get('format')!r} in config.json; this version reads 1")
    width = {site.name: site for site in space.width_sites}
    depth = {site.name: site for site in space.depth_sites}
    unknown = [*(pruning["kept"].keys() - width.keys()), *(set(pruning["closed"]) - depth.keys())]
    if unknown:
        raise ValueError(
            f"config.json prunes {sorted(unknown)[:3]}, which this UNet does not have: "
            "its other fields are not those of the teacher that was pruned"
        )
    code = space.full_code()
    for name, ranges in pruning["kept"].items():
        code[width[name].slice] = _from_ranges(ranges, width[name])
    for name in pruning["closed"]:
        code[depth[name].start] = False
    return space.validate(code)


def _to_ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)


def _from_ranges(text: str, site: Site) -> Tensor:
    """Inverse of `_to_ranges`: bool [width]."""
    mask = torch.zeros(site.width, dtype=torch.bool)
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first) + 1
        if not 0 <= start < stop <= site.width:
            raise ValueError(f"config.json keeps {part!r} of {site.name}, which has entries 0 to {site.width - 1}")
        mask[start:stop] = True
    return mask


def _copy_settings(source: UNet2DConditionModel, target: UNet2DConditionModel) -> None:
    """What a state dict does not carry."""
    trainable = {name: parameter.requires_grad for name, parameter in source.named_parameters()}
    for name, parameter in target.named_parameters():
        parameter.requires_grad_(trainable[name])
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        module.training = modules[name].training
        if isinstance(module, Attention):
            # Processors without weights (the others fail the check of the weights) can be shared.
            module.set_processor(modules[name].processor)
        if getattr(modules[name], "gradient_checkpointing", False):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = modules[name]._gradient_checkpointing_func


def _own_storage(source: UNet2DConditionModel, target: UNet2DConditionModel) -> None:
    """Copies what is still the source's memory, so that training one does not change the other."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in source.parameters()}
    for parameter in target.parameters():
        if parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.data.clone()
