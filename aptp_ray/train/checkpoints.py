"""Training state on disk: safetensors and JSON, so that a checkpoint can be opened without unpickling anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def trainable_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters that learn, and all buffers, by name; frozen parameters come from their own artifacts."""
    state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return state | {name: b.detach() for name, b in module.named_buffers()}


def save_state(
    folder: str | Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
    facts: dict[str, Any],
) -> None:
    """Writes module, optimizer and averages as ``state.safetensors`` and counters as ``facts.json`` (last)."""
    tensors = {f"module.{k}": v for k, v in trainable_state(module).items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors |= {f"ema.{k}": v for k, v in (ema or {}).items()}
    # safetensors refuses tensors that share memory; a clone also cuts views loose from their larger storage.
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, str(Path(folder) / "state.safetensors"))
    (Path(folder) / "facts.json").write_text(json.dumps(facts))


def load_state(
    folder: str | Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None
) -> dict[str, Any]:
    """Reads what :func:`save_state` wrote into place and returns the facts.

    Raises:
        ValueError: if names or shapes are not those of ``module``; nothing is silently left at its start value.
    """
    tensors = load_file(str(Path(folder) / "state.safetensors"))
    target = trainable_state(module)
    found = {k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")}
    wrong = [k for k in target.keys() ^ found.keys()] or [k for k in target if target[k].shape != found[k].shape]
    if wrong:
        raise ValueError(f"the checkpoint in {folder} is of another model; first difference: {min(wrong)}")
    for name, value in target.items():
        value.copy_(found[name])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name in ema or {}:
        ema[name].copy_(tensors[f"ema.{name}"])  # type: ignore[index]
    return json.loads((Path(folder) / "facts.json").read_text())
