"""Image-text models in transformers' layout (CLIP, VisionTextDualEncoder and their like): images and captions as vectors.

Images are prepared here and not by transformers' image processors, some of which need torchvision, and of which no two
resize alike: one filter for references and samples (Parmar, Zhang, Zhu 2022, "On Aliased Resizing").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# What CLIP's processors do where a model's own says nothing.
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes the central square: uint8 [height, width, 3] -> uint8 [side, side, 3], by PIL's antialiased bicubic filter.

    The one resize of evaluation; an image that has the size already is returned as it is.
    """
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    square = min(height, width)
    left, top = (width - square) / 2, (height - square) / 2
    box = (left, top, left + square, top + square)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box=box))


@dataclass(frozen=True)
class ImageVectors:
    """Attributes:
    features: [n, width] float32, the image encoder's pooled output; what heads and Frechet distances read.
    embeddings: [n, dimension] float32 of unit length, in the space of the texts; what CLIP score and CMMD read.
    """

    features: Tensor
    embeddings: Tensor


class ImageTextModel:
    """A loaded model.

    Attributes:
        label: how numbers made with it are named.
        image_size: pixels of a side that it sees.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocessor: dict[str, Any], *, label: str) -> None:
        self.label = label
        self._model, self._tokenizer = model, tokenizer
        self.image_size = _side(preprocessor)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(preprocessor.get("image_mean", _CLIP_MEAN)).reshape(shape)
        self._std = torch.tensor(preprocessor.get("image_std", _CLIP_STD)).reshape(shape)
        # BERT-like tokenizers name no limit; the text encoder's positions are one.
        text = model.config.text_config
        self._max_tokens = min(int(tokenizer.model_max_length), int(text.max_position_embeddings))

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu", label: str | None = None) -> ImageTextModel:
        """Loads a folder in transformers' layout: weights in safetensors, tokenizer, preprocessor_config.json.

        Args:
            folder: a CLIP or VisionTextDualEncoder model.
            device: where it runs.
            label: how numbers made with it are named; by default what ``scorer.json`` beside it says, else the folder's name.

        Raises:
            FileNotFoundError: if a part is missing, before anything is loaded.
        """
        from transformers import AutoModel, AutoTokenizer

        root = Path(folder)
        weights = next((name for name in _WEIGHTS if (root / name).is_file()), None)
        missing = [name for name in ("config.json", "preprocessor_config.json") if not (root / name).is_file()]
        if missing or weights is None:
            raise FileNotFoundError(
                f"{folder} is no image-text model in transformers' layout: {', '.join(missing) or 'model.safetensors'} is not "
                "there; name the folder of a CLIP or VisionTextDualEncoder model with weights in safetensors"
            )
        model = AutoModel.from_pretrained(str(root), use_safetensors=True, dtype=torch.float32)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise ValueError(f"{folder} holds a {type(model).__name__}, which has no features of images and texts; name a CLIP")
        preprocessor = json.loads((root / "preprocessor_config.json").read_text(encoding="utf-8"))
        if label is None:
            facts = root / "scorer.json"
            label = json.loads(facts.read_text(encoding="utf-8"))["label"] if facts.is_file() else root.name
        tokenizer = AutoTokenizer.from_pretrained(str(root))
        return cls(model.to(device).eval().requires_grad_(False), tokenizer, preprocessor, label=label)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [height, width, 3] each -> normalised float32 [n, 3, image_size, image_size]."""
        stacked = np.stack([resized(image, self.image_size) for image in images])
        return (torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    @torch.inference_mode()
    def images(self, images: Sequence[np.ndarray], *, batch_size: int = 64) -> ImageVectors:
        """Encodes images.

        Args:
            images: uint8 [height, width, 3] each.
            batch_size: of one forward pass.

        Raises:
            ValueError: if there are none.
        """
        if not len(images):
            raise ValueError("no images to encode")
        features, embeddings = [], []
        for start in range(0, len(images), batch_size):
            pixels = self.pixels(images[start : start + batch_size]).to(self._device)
            pooled = self._model.vision_model(pixel_values=pixels).pooler_output
            features.append(pooled.float().cpu())
            embeddings.append(normalize(self._model.visual_projection(pooled).float(), dim=-1).cpu())
        return ImageVectors(torch.cat(features), torch.cat(embeddings))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Encodes captions -> [n, dimension] float32 of unit length.

        Raises:
            ValueError: if there are none.
        """
        if not len(texts):
            raise ValueError("no captions to encode")
        found = []
        for start in range(0, len(texts), batch_size):
            inputs = self._tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            given = {name: inputs[name].to(self._device) for name in ("input_ids", "attention_mask")}
            output = self._model.get_text_features(**given)
            output = getattr(output, "pooler_output", output)  # a tensor, or an output that holds it, by transformers' version
            found.append(normalize(output.float(), dim=-1).cpu())
        return torch.cat(found)


def _side(preprocessor: dict[str, Any]) -> int:
    """The side of the square that a processor's config makes: of its crop, else of its size."""
    for name in ("crop_size", "size"):
        size = preprocessor.get(name)
        if isinstance(size, int):
            return size
        if isinstance(size, dict):
            return int(size.get("height") or size.get("shortest_edge") or 0)
    raise ValueError("preprocessor_config.json names neither crop_size nor size: add the side that the image encoder sees")


def recall_at_1(images: Tensor, texts: Tensor, *, gallery: int, owners: Sequence[int]) -> dict[str, float]:
    """How often the nearest caption among ``gallery`` is an image's own, and the other way round.

    Args:
        images: [n, dimension] of unit length.
        texts: [n, dimension], row i the caption of image i.
        gallery: captions (and images) to choose from; the last, incomplete gallery is left out.
        owners: [n]; within a gallery, rows with one number count as each other's.

    Returns:
        ``image_to_text``, ``text_to_image``, ``gallery`` and ``queries`` (images that were asked).

    Raises:
        ValueError: if not even one gallery is full.
    """
    full = len(images) // gallery
    if not full:
        raise ValueError(f"{len(images)} pairs do not fill a gallery of {gallery}: give more, or make the gallery smaller")
    same = torch.tensor(list(owners))
    right = {"image_to_text": 0, "text_to_image": 0}
    for start in range(0, full * gallery, gallery):
        part = slice(start, start + gallery)
        similarity, numbers = images[part] @ texts[part].T, same[part]
        right["image_to_text"] += int((numbers[similarity.argmax(dim=1)] == numbers).sum())
        right["text_to_image"] += int((numbers[similarity.argmax(dim=0)] == numbers).sum())
    return {name: count / (full * gallery) for name, count in right.items()} | {"gallery": gallery, "queries": full * gallery}
