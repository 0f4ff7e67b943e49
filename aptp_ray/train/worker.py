"""What every training worker does before and around its loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, Loop
from aptp_ray.core.backbones import Backbone
from aptp_ray.core.components import denoiser_dir, load_backbone, load_text
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.sites import DepthSites
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.encoding import Encoding
from aptp_ray.tracking import Tracker, known_peak_tflops
from aptp_ray.train.draws import TextStates
from aptp_ray.train.feed import RowReader
from aptp_ray.train.launch import record_outcome
from aptp_ray.train.loop import Parts, Place, place_of_worker, run_loop
from aptp_ray.train.pictures import Artists, SampleGrid

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Worker:
    """A worker's view of its run."""

    config: Config
    run: RunDir
    name: str
    rows: RowReader
    place: Place
    settings: dict[str, Any]

    @classmethod
    def start(cls, settings: dict[str, Any]) -> Worker:
        """Unpacks what ``launch`` sent, and sets this process up."""
        config: Config = settings["config"]
        allow_tf32(config.compute.tf32)
        place = place_of_worker(config.compute.threads_per_worker)
        run = RunDir(settings["run_uri"], config.storage_options)
        return cls(config, run, settings["name"], settings["rows"], place, settings)

    @property
    def validation(self) -> RowReader | None:
        """Held-out rows, where the job has handed some in."""
        return self.settings.get("validation")

    def train(self, parts: Parts, loop: Loop) -> None:
        """Runs the loop and records the outcome."""
        save = parts.save

        def save_and_record(module: nn.Module, figures: dict[str, Any]) -> dict[str, Any]:
            outcome = figures | save(module, figures)
            record_outcome(self.run, self.name, outcome)
            return outcome

        parts.save = save_and_record
        tracker = Tracker.of(
            self.config,
            self.name,
            directory=self.run.path("wandb") if self.run.is_local else None,
            rank=self.place.rank,
            run_id=self._tracking_id() if self.place.rank == 0 else None,
        )
        run_loop(
            parts,
            loop,
            place=self.place,
            reader=self.rows,
            tracker=tracker,
            label=self.name,
            peak_flops=self._peak_flops(loop),
            validation=self.validation,
        )

    def grid(self, prompts: Sequence[str], artists: Artists, teacher: Any) -> SampleGrid:
        """Returns what draws prompts with the run's own teacher beside the UNets in training."""
        return SampleGrid(self.config, self.run.local("teacher"), self.place.device, prompts, artists, teacher)

    def _tracking_id(self) -> str:
        """The id under which all attempts at this run log; a run that is made anew gets another, its folder being gone."""
        kept = ("train", self.name, "tracking.json")
        if not self.run.exists(*kept):
            self.run.write_json({"id": f"{Path(self.run.root).name}-{self.name}-{uuid4().hex[:8]}".replace("=", "-")}, *kept)
        return self.run.read_json(*kept)["id"]

    def _peak_flops(self, loop: Loop) -> float | None:
        """Of all workers' devices together, where it is known."""
        peak, device = self.config.tracking.peak_tflops, self.place.device
        if peak is None and device.type == "cuda":
            peak = known_peak_tflops(torch.cuda.get_device_name(device), loop.precision)
        return None if peak is None else 1e12 * peak * self.place.world_size


def allow_tf32(allowed: bool) -> None:
    """Lets GPUs round the factors of float32 products to TensorFloat-32, or not; convolutions and matrix products alike."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def exact_products() -> Iterator[None]:
    """Turns TensorFloat-32 off for the time of the block."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def tuned(unet: Any, loop: Loop) -> Any:
    """Gives a UNet that is to be trained the memory format and the recomputation that its loop asks for; in place."""
    if loop.channels_last:
        unet.to(memory_format=torch.channels_last)
    if loop.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def load_teacher_model(pipeline_dir: str) -> Any:
    """Loads the model of a pipeline that denoises, in float32."""
    return load_backbone(denoiser_dir(pipeline_dir))


def load_with_costs(pipeline_dir: str, encoding: Encoding, depth: DepthSites) -> tuple[Any, MacsModel]:
    """Loads the same model, with the MACs of its codes at the size that rows are encoded at; ``depth`` as ``router.depth``."""
    model = load_teacher_model(pipeline_dir)
    space = ArchitectureSpace.of(model, depth=depth)
    return model, MacsModel.measure(model, latent_size=encoding.latent_shape[1:], num_tokens=encoding.num_tokens, space=space)


def fast_attention(unet: Backbone, device: torch.device) -> Any:
    """On a CPU, replaces fused attention by plain matrix products: its CPU backward pass is the slower one by half."""
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
    return unet


@dataclass(frozen=True)
class NoiseSchedule:
    """A teacher's noise schedule.

    Attributes:
        alphas_cumprod: [train timesteps].
        prediction_type: "epsilon" or "v_prediction".
    """

    alphas_cumprod: Tensor
    prediction_type: Any


def noise_schedule(pipeline_dir: str) -> NoiseSchedule:
    """Reads the schedule that a pipeline's UNet was trained with."""
    # DDIM's class reads every diffusers scheduler config and applies rescale_betas_zero_snr as training does.
    scheduler = DDIMScheduler.from_pretrained(pipeline_dir, subfolder="scheduler")
    return NoiseSchedule(scheduler.alphas_cumprod, scheduler.config["prediction_type"])


def empty_text_states(pipeline_dir: str) -> list[list[float]]:
    """Returns the states of the empty caption, [tokens][width], which an image without guidance is drawn from."""
    return load_text(pipeline_dir)([""])[0].float().tolist()


def text_states_of(encoding: Encoding, pipeline_dir: str, device: torch.device) -> TextStates | None:
    """Loads the frozen text encoders where rows hold token ids (``encode.text=tokens``); None where they hold its states.

    Returns:
        what makes states of token ids on ``device``: the values that encoding with ``encode.text=states`` would have stored,
        within the rounding of half floats.

    Raises:
        ValueError: if the tokenizer pads on the left.
    """
    if encoding.text == "states":
        return None
    dtype = _DTYPES[encoding.precision]
    text = load_text(pipeline_dir, dtype=dtype, device=device)
    if not text.pads_on_the_right:
        raise ValueError(f"{pipeline_dir}: the tokenizer does not pad on the right: use encode.text=states")

    def make(tokens: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(encoding.num_tokens) < lengths[:, None]).long()
        # Through half floats, as states are stored.
        return text.states(tokens, mask).half().float()  # [n, tokens, width]

    return make
