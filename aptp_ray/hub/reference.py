"""Published APTP checkpoints of the reference implementation, made into a run directory.

Their layout: ``hypernet/`` (a linear map from prompt embeddings to logits) and ``quantizer/`` (the codes' logits), both
diffusers ModelMixin folders whose config holds the ``structure`` of a vector; and one folder an expert with its vector of
masks (``arch_vector*.pt``) and, in it or in ``unet/`` below, the weights of its pruned UNet. Tensors are read without running
any pickled code, and every shape is compared with the teacher's before anything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aptp_ray.config import UserError
from aptp_ray.core.backbones import blocks_of
from aptp_ray.core.code_router import CodeRouter
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.pruned_model import PrunedUNet2DConditionModel
from aptp_ray.core.space import ArchitectureSpace

# Masks of the reference's own modules, which lie beside the weights.
_MASK_KEYS = re.compile(r"(^|\.)gate_f$|\.(depth_)?gate\.")
# For an entry that the reference does not prune: open under any noise.
_ALWAYS_OPEN = 20.0

NOT_EXACT = (
    "routing: the reference adds noise, drawn anew for each batch, to what it compares; here it is deterministic",
    "routing: the reference compares hard masks, weighted by MACs where its config says so; here soft ones, each site alike",
    "routing: the share of prompts that each expert gets is not on record; routing.json says that all get the same",
    "MACs: counted here with the real length of the text, which the reference's counter does not",
)


class CheckpointError(UserError, ValueError):
    """A checkpoint that is not of the published layout, or not of this teacher."""


@dataclass(frozen=True)
class Layout:
    """Where our entries lie in a published vector.

    Attributes:
        index: int64 [dim], the place of each of our entries; -1: not pruned there.
        logit_index: int64 [dim], the same for logits, whose depth entries stand in order of importance.
        length: of a published vector.
    """

    index: Tensor
    logit_index: Tensor
    length: int

    def masks(self, vector: Tensor) -> Tensor:
        """A published vector of soft masks [length] -> hard code bool [dim]."""
        return torch.where(self.index >= 0, vector.float()[self.index], torch.tensor(1.0)) >= 0.5

    def logits(self, vectors: Tensor, *, missing: float = _ALWAYS_OPEN) -> Tensor:
        """Published logits [..., length] -> [..., dim], `missing` where the reference prunes nothing."""
        return torch.where(self.logit_index >= 0, vectors.float()[..., self.logit_index], torch.tensor(missing))


def read_layout(space: ArchitectureSpace, unet: Any, structure: Mapping[str, Any], depth_order: Sequence[int] | None) -> Layout:
    """Finds our entries in the published order: block by block its resnets, then its transformers; depth entries last.

    Args:
        space: of the teacher.
        unet: the teacher, on any device.
        structure: of the checkpoint's config: {"width": [[32], [5, 5, 32], ...], "depth": [[0], [1], ...]}.
        depth_order: of the checkpoint's config: the depth entries, most protected first; None: in forward order.

    Raises:
        CheckpointError: if the structure is not this teacher's.
    """
    modules = list(_modules(unet, structure["width"]))
    if len(modules) != len(structure["depth"]):
        raise CheckpointError(f"structure has {len(modules)} widths, but {len(structure['depth'])} depths")
    places: dict[str, list[int]] = {}
    start = 0
    for name, widths in modules:
        parts = [name] if len(widths) == 1 else [f"{name}.transformer_blocks.0.{part}" for part in ("attn1", "attn2", "ff")]
        for part, width in zip(parts, widths, strict=False):
            places[part] = list(range(start, start + width))
            start += width
    depths = [name for (name, _), flag in zip(modules, structure["depth"], strict=True) if flag == [1]]
    order = list(range(len(depths))) if depth_order is None else [i % max(1, len(depths)) for i in depth_order]
    if sorted(order) != list(range(len(depths))):
        raise CheckpointError(f"depth_order {depth_order} is no order of the {len(depths)} depth entries")
    index = torch.full((space.dim,), -1, dtype=torch.long)
    for site in space.width_sites:
        found = places.pop(site.name, None)
        if found is None:
            continue
        if len(found) != site.width:
            raise CheckpointError(f"{site.name} has {site.width} entries in this teacher, {len(found)} in the checkpoint")
        index[site.slice] = torch.tensor(found)
    known = {site.name: site for site in space.depth_sites}
    if places or set(depths) - known.keys():
        raise CheckpointError(f"the checkpoint prunes {[*places, *sorted(set(depths) - known.keys())][:3]}, this teacher cannot")
    logit_index = index.clone()
    for module, name in enumerate(depths):
        index[known[name].start] = start + module
        # A logit at place i of the depth part belongs to module depth_order[i].
        logit_index[known[name].start] = start + order.index(module)
    return Layout(index, logit_index, start + len(depths))


def _modules(unet: Any, widths: Sequence[Sequence[int]]) -> list[tuple[str, Sequence[int]]]:
    """(module path, its widths) in the published order; a resnet has one width, a transformer two or three."""
    names = {id(module): name for name, module in unet.named_modules()}
    waiting, found = list(widths), []
    blocks: list[Any] = blocks_of(unet)
    for block in blocks:
        resnets = [names[id(m)] for m in block.resnets]
        transformers = [names[id(m)] for m in getattr(block, "attentions", ()) if m is not None]
        for _ in range(len(resnets) + len(transformers)):
            if not waiting:
                raise CheckpointError(f"structure ends at {names[id(block)]}: it is of a smaller UNet")
            width = waiting.pop(0)
            kind = resnets if len(width) == 1 else transformers
            if not kind or len(width) > 3:
                raise CheckpointError(f"structure has {width} in {names[id(block)]}, which does not fit this teacher")
            found.append((kind.pop(0), width))
    if waiting:
        raise CheckpointError(f"structure has {len(waiting)} widths too many: it is of a larger UNet")
    return found


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a ModelMixin folder, from safetensors or, without running code, a .bin file.

    Raises:
        FileNotFoundError: if one is missing.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no published APTP checkpoint")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config, read_tensors(folder)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's weight files."""
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    if not files and (folder / "diffusion_pytorch_model.bin").is_file():
        tensors = torch.load(folder / "diffusion_pytorch_model.bin", map_location="cpu", weights_only=True)
    if not tensors:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors)")
    return tensors


def read_linear(tensors: Mapping[str, Tensor], length: int, input_dim: int) -> tuple[Tensor, Tensor]:
    """The published map of prompt embeddings to logits as one weight [length, input_dim] and bias [length].

    Raises:
        CheckpointError: if parts are missing or of other shapes.
    """
    if "arch" in tensors:  # one vector for all prompts
        return torch.zeros(length, input_dim), tensors["arch"].float().reshape(-1)
    weights, biases = [], []
    for i in range(len({key.split(".")[1] for key in tensors if key.startswith("mh_fc.")})):
        head = f"mh_fc.{i}"
        pair = [(f"{head}.parametrizations.weight.original0", f"{head}.parametrizations.weight.original1")]
        pair.append((f"{head}.weight_g", f"{head}.weight_v"))
        # Weight normalization (Salimans and Kingma 2016): length and direction of each row apart.
        split = next(((tensors[g].float(), tensors[v].float()) for g, v in pair if g in tensors and v in tensors), None)
        if split is None and f"{head}.weight" not in tensors:
            raise CheckpointError(f"hypernet: no weight of {head} among {sorted(tensors)[:4]}")
        weight = tensors[f"{head}.weight"].float() if split is None else split[0] * split[1] / split[1].norm(dim=1, keepdim=True)
        weights.append(weight)
        biases.append(tensors.get(f"{head}.bias", torch.zeros(len(weight))).float())
    weight = torch.cat(weights) if weights else torch.empty(0, 0)
    if weight.shape != (length, input_dim):
        raise CheckpointError(f"hypernet: a map of shape {list(weight.shape)}, its structure says {[length, input_dim]}")
    return weight, torch.cat(biases)


@torch.no_grad()
def linear_predictor(router: CodeRouter, weight: Tensor, bias: Tensor) -> None:
    """Makes a router's predictor the linear map z -> weight z + bias, exactly for embeddings of unit length.

    Its hidden layer holds z and -z: their mean is zero and their variance |z|^2 / n, so the norm only scales, and
    gelu(x) - gelu(-x) = x.
    """
    layers: Any = router.predictor
    first, norm, _, last = layers
    n = router.z_dim
    if first.out_features != 2 * n:
        raise ValueError(f"the hidden layer has {first.out_features} units, this takes {2 * n}")
    first.weight.copy_(torch.cat([torch.eye(n), -torch.eye(n)]))
    first.bias.zero_()
    norm.weight.fill_((1 / n + norm.eps) ** 0.5)
    norm.bias.zero_()
    last.weight.copy_(torch.cat([weight, -weight], dim=1))
    last.bias.copy_(bias)


def read_vector(folder: Path, length: int) -> Tensor:
    """An expert's vector of masks [length].

    Raises:
        FileNotFoundError: if there is none.
        CheckpointError: if it is of another length, or no vector.
    """
    files = sorted(folder.glob("arch_vector*.pt"))
    if not files:
        raise FileNotFoundError(f"{folder} has no arch_vector.pt")
    vector = torch.load(files[0], map_location="cpu", weights_only=True)
    if not isinstance(vector, Tensor) or vector.numel() != length:
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise CheckpointError(f"{files[0]} holds {shape}, its structure says {length} masks")
    return vector.detach().reshape(-1)


def build_expert(teacher: Any, space: ArchitectureSpace, code: Tensor, folder: Path) -> PrunedUNet2DConditionModel:
    """A pruned UNet of a teacher's shapes with the published weights.

    Args:
        teacher: UNet2DConditionModel on the meta device.
        space: its sites.
        code: bool [dim].
        folder: of the expert; the weights lie in it, or in its ``unet``.

    Raises:
        CheckpointError: if a weight is missing, left over, or of another shape.
    """
    inner = folder / "unet"
    found = read_tensors(inner if inner.is_dir() else folder)
    weights = {name: value for name, value in found.items() if not _MASK_KEYS.search(name)}
    pruned: PrunedUNet2DConditionModel = prune_unet(teacher, space.validate(code), space)
    expected = pruned.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} weights are not those of its masks, such as {wrong[:3]}")
    pruned.load_state_dict(weights, assign=True)
    return pruned.eval()


def expert_folders(root: Path) -> list[Path]:
    """Folders below ``root`` with a vector of masks, in order of the numbers in their names.

    Raises:
        FileNotFoundError: if there are none.
    """
    found = {file.parent for file in root.rglob("arch_vector*.pt")}
    if not found:
        raise FileNotFoundError(f"{root} has no folder with an arch_vector.pt: it is no published APTP checkpoint")
    return sorted(found, key=lambda f: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", str(f.relative_to(root)))])
