"""Inception's features for FID and KID, from torchmetrics; nothing is downloaded.

The network is the one of the FID papers (a port of TensorFlow's weights by torch-fidelity, which torchmetrics wraps); its
2048 pool features go through the same float64 distances as every other encoder's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aptp_ray.config import ConfigError
from aptp_ray.evaluate.image_text import resized

# The name under which torch-fidelity publishes the weights, and torch's hub caches them.
FILE = "weights-inception-2015-12-05-6726825d.pth"
FEATURES = 2048
_INPUT = 299


def find_weights(weights: str) -> Path:
    """Returns the file of Inception's weights.

    Args:
        weights: a path, or "cache": torch's hub cache (``TORCH_HOME``).

    Raises:
        ConfigError: if it is not there, or a package is missing; before any work.
    """
    for package in ("torchmetrics", "torch_fidelity"):
        if find_spec(package) is None:
            raise ConfigError(
                f"evaluation.inception needs the package {package.replace('_', '-')}: pip install 'aptp-ray[eval]', "
                "or set evaluation.inception=null to score without FID"
            )
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILE if weights == "cache" else Path(weights)
    if not path.is_file():
        raise ConfigError(
            f"evaluation.inception={weights}: {path} is not there. Put {FILE} (released with torch-fidelity) there or name its "
            "path; evaluation.inception=null scores without FID"
        )
    return path


class InceptionFeatures:
    """The extractor inside torchmetrics' FrechetInceptionDistance.

    Attributes:
        label: how numbers made with it are named.
        fingerprint: of the weights.
    """

    def __init__(self, extractor: Any, *, fingerprint: str, label: str = "Inception v3 (torch-fidelity)") -> None:
        self._extractor, self.label, self.fingerprint = extractor, label, fingerprint

    @classmethod
    def load(cls, weights: str, *, device: str = "cpu") -> InceptionFeatures:
        """Loads it.

        Raises:
            ConfigError: as :func:`find_weights`.
        """
        path = find_weights(weights)
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature=FEATURES, feature_extractor_weights_path=str(path))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return cls(metric.inception.to(device).eval(), fingerprint=digest)

    @torch.inference_mode()
    def features(self, images: Sequence[np.ndarray], *, batch_size: int = 32) -> Tensor:
        """uint8 [height, width, 3] each -> float32 [n, features].

        Images are brought to Inception's size by the evaluation's one filter, so that its own resize has nothing to do.
        """
        found = []
        for start in range(0, len(images), batch_size):
            some = np.stack([resized(image, _INPUT) for image in images[start : start + batch_size]])
            pixels = torch.from_numpy(some).permute(0, 3, 1, 2)
            device = next((p.device for p in self._extractor.parameters()), torch.device("cpu"))
            found.append(self._extractor(pixels.to(device)).float().cpu())
        return torch.cat(found)
