"""APTP on Ray: prunes a text-to-image diffusion model by prompt into a mixture of smaller experts, and serves them.

`MixturePipeline` uses a finished mixture in Python; the pruned models open by their names here, as diffusers looks for them.
All load on first use, so that importing the package costs nothing.
"""

from importlib import import_module, metadata
from typing import Any

try:
    __version__ = metadata.version("aptp-ray")
except metadata.PackageNotFoundError:  # used from a checkout that was not installed
    __version__ = "0.0.0"

_HOMES = {
    "MixturePipeline": "hub.mixture",
    "PrunedPixArtTransformer2DModel": "core.pruned_model",
    "PrunedUNet2DConditionModel": "core.pruned_model",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
