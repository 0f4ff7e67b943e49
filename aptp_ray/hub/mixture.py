"""A mixture in one Python process: prompts in, images and their routing out; no server, no Ray."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.sampler import Sampler
from aptp_ray.hub.places import Place, find_place

_GIB = 2**30


@dataclass(frozen=True)
class MixtureOutput:
    """What a call returns, all in the order of the prompts.

    Attributes:
        images: one a prompt.
        experts: which expert drew each.
        similarity: [n][K] cosines of each prompt's architecture embedding with the experts' codes.
        seeds: of each image's noise.
    """

    images: list[Image.Image]
    experts: list[int]
    similarity: list[list[float]]
    seeds: list[int]


class MixturePipeline:
    """Routes prompts to experts and draws each group in one batch of its expert.

    Experts load when a prompt first needs them, and the least recently used are dropped when the next would not fit.

    Attributes:
        router: captions -> experts.
        loaded: the experts in memory now, least recently used first.
        memory_gb: what experts may take in all.
    """

    def __init__(
        self, place: Place, *, device: str | torch.device, dtype: torch.dtype, memory_gb: float | None, max_batch_size: int
    ) -> None:
        """See :meth:`from_pretrained`."""
        self._place, self._device, self._dtype = place, torch.device(device), dtype
        self._max_batch_size = max_batch_size
        self.router = PromptRouter.from_pretrained(place.folder("router"), prompt_encoder=place.prompt_encoder())
        self._components = load_components(place.folder("teacher"), dtype=dtype, device=self._device)
        self.memory_gb = _free_gb(self._device) / 2 if memory_gb is None else memory_gb
        self._samplers: OrderedDict[int, tuple[Sampler, float]] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        memory_gb: float | None = None,
        max_batch_size: int = 8,
        revision: str | None = None,
        storage_options: dict[str, Any] | None = None,
        **hub: Any,
    ) -> MixturePipeline:
        """Opens a mixture; its experts load later.

        Args:
            source: a run directory (any fsspec URI), a folder that jobs/export.py wrote, or a hub id.
            device: where models run; by default the first GPU, or the CPU.
            dtype: of the models.
            memory_gb: what the experts in memory may take, in GiB; by default half of what is free now.
            max_batch_size: images denoised together.
            revision: of a hub repository.
            storage_options: of a run directory, for fsspec.
            hub: further arguments of huggingface_hub's ``snapshot_download``, such as ``token``.

        Raises:
            RunDirError: if there is no mixture, or a part of it is missing.
        """
        place = find_place(os.fspath(source), revision=revision, storage_options=storage_options, **hub)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(place, device=device, dtype=dtype, memory_gb=memory_gb, max_batch_size=max_batch_size)

    def __repr__(self) -> str:
        facts = self._place.facts
        return (
            f"MixturePipeline({facts.name!r}: {self.num_experts} experts at {facts.routing['macs_ratio']:.1%} of the teacher's "
            f"MACs, {facts.resolution} px, {self._dtype} on {self._device}, loaded: {self.loaded})"
        )

    @property
    def num_experts(self) -> int:
        return len(self._place.facts.routing["experts"])

    @property
    def loaded(self) -> list[int]:
        return list(self._samplers)

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        negative_prompts: Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        expert: int | None = None,
    ) -> MixtureOutput:
        """Draws one image a prompt; an image depends on its prompt, its seed and the settings, not on the others.

        Args:
            prompts: one or several.
            seed: of the first image, the others counting on; or one for each.
            negative_prompts: one for each, or none.
            num_inference_steps: the run's ``sampling`` by default.
            guidance_scale: the run's ``sampling`` by default.
            expert: draws all prompts, in place of those that they are routed to.

        Raises:
            ValueError: if lists differ in length, or there is no such expert.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(range(seed, seed + len(prompts))) if isinstance(seed, int) else list(seed)
        negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
        if not len(prompts) == len(seeds) == len(negatives):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds, {len(negatives)} negative prompts: give one each")
        if expert is not None and not 0 <= expert < self.num_experts:
            raise ValueError(f"there is no expert {expert}; there are 0 to {self.num_experts - 1}")
        facts, routing = self._place.facts, self.router.route(prompts)
        experts = routing.expert.tolist() if expert is None else [expert] * len(prompts)
        images: dict[int, Image.Image] = {}
        # Experts in memory go first: loading another may drop them.
        for k in sorted(set(experts), key=lambda k: (k not in self._samplers, k)):
            rows = [row for row, chosen in enumerate(experts) if chosen == k]
            drawn = self._sampler(k).generate(
                [prompts[row] for row in rows],
                [seeds[row] for row in rows],
                num_inference_steps=facts.num_inference_steps if num_inference_steps is None else num_inference_steps,
                guidance_scale=facts.guidance_scale if guidance_scale is None else guidance_scale,
                negative_prompts=[negatives[row] for row in rows],
            )
            images.update(zip(rows, drawn, strict=True))
        in_order = [images[row] for row in range(len(prompts))]
        return MixtureOutput(in_order, experts, routing.similarity.tolist(), seeds)

    def _sampler(self, expert: int) -> Sampler:
        """The expert's engine, loaded now if it has to be."""
        if expert not in self._samplers:
            folder = self._place.folder(f"experts/{expert}")
            size = _size_gb(folder, self._dtype)
            if size > self.memory_gb:
                raise ValueError(
                    f"expert {expert} takes {size:.2f} GiB in {self._dtype}, and memory_gb is {self.memory_gb:.2f}: raise it, or "
                    "choose a smaller dtype"
                )
            while sum(held for _, held in self._samplers.values()) + size > self.memory_gb:
                self._samplers.popitem(last=False)[1][0].close()
            sampler = Sampler.from_components(
                load_unet(folder, dtype=self._dtype, device=self._device),
                self._components,
                scheduler=self._place.facts.scheduler,
                resolution=self._place.facts.resolution,
                max_batch_size=self._max_batch_size,
            )
            self._samplers[expert] = (sampler, size)
        self._samplers.move_to_end(expert)
        return self._samplers[expert][0]


def _size_gb(folder: Path, dtype: torch.dtype) -> float:
    """GiB that a saved model's weights take in a precision, from the headers of its files."""
    from safetensors import safe_open

    numbers = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                part = 1
                for length in tensors.get_slice(name).get_shape():
                    part *= length
                numbers += part
    return numbers * dtype.itemsize / _GIB


def _free_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / _GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / _GIB
