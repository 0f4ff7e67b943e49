"""Tensors in, tensors out: the method itself, without Ray, configuration or storage.

The names below are the stable public surface; they load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ArchitectureSpace": "space",
    "GatedUNet": "gates",
    "MacsModel": "macs",
    "PromptEncoder": "prompt_encoder",
    "PromptRouter": "router",
    "PrunedPixArtTransformer2DModel": "pruned_model",
    "PrunedUNet2DConditionModel": "pruned_model",
    "Sampler": "sampler",
    "Site": "sites",
    "balanced_assignment": "transport",
    "count_macs": "macs",
    "prune_unet": "prune",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
