"""The one typed configuration tree: YAML in, YAML out, unknown keys refused.

Every job takes one YAML file (``jobs/configs/*.yaml``) and ``key=value`` overrides. The tree is frozen: a value is decided
once, and the stages that a finished value decides are hashed into the run's manifest (see ``artifacts.py``).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "bf16", "fp16"]


class UserError(Exception):
    """Something that the user can mend; the message is one line and says what to change."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""


class Section(BaseModel):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-4, gt=0.0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0.0)
    warmup_steps: int = Field(0, ge=0, description="linear rise from zero")
    schedule: Literal["constant", "cosine", "constant_cosine"] = Field(
        "constant", description="constant_cosine holds the peak for half of the steps, then falls"
    )
    final_lr_fraction: float = Field(0.02, ge=0.0, le=1.0, description="of the peak, where a cosine ends")
    clip_norm: float = Field(1.0, gt=0.0, description="gradient norm above which gradients are scaled down")
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0, description="exponential moving average of weights; null: off")


class Loop(Section):
    """What every training stage shares."""

    steps: Positive = 100
    global_batch_size: Positive = Field(32, description="samples of one optimizer step, over all workers")
    optimizer: Optimizer = Optimizer()
    precision: Precision = "fp32"
    seed: int = 0
    shuffle_window: Positive = Field(4096, description="rows permuted together, keyed by (seed, epoch, window)")
    log_every_steps: Positive = 10
    validate_every_steps: int = Field(0, ge=0, description="0: only at the end")
    validation_samples: int = Field(256, ge=0)
    checkpoint_every_steps: Positive = 500
    num_checkpoints: Positive = Field(2, description="how many checkpoints are kept")
    workers: Positive | None = Field(None, description="Train workers of this stage; null: compute.workers")


class Source(Section):
    """Where captioned images come from."""

    kind: Literal["webdataset", "openmoji"] = "webdataset"
    train: str | None = Field(None, description="webdataset: path, glob or brace pattern of the training shards")
    validation: str | None = Field(None, description="webdataset: the same for validation")
    train_images: Positive = Field(12000, description="openmoji: how many to draw")
    validation_images: Positive = Field(1500, description="openmoji: how many to draw")
    images_per_shard: Positive = 1000
    storage_options: dict[str, Any] = Field(default_factory=dict, description="handed to fsspec")

    @model_validator(mode="after")
    def _patterns_given(self) -> Source:
        if self.kind == "webdataset" and not (self.train and self.validation):
            raise ValueError("data.source.kind=webdataset needs shard patterns: set data.source.train and .validation")
        return self


class Data(Section):
    """The images and captions, and how they are encoded."""

    source: Source
    resolution: Positive = Field(64, description="pixels of a side; the VAE's factor must divide it")
    batch_size: Positive = Field(64, description="rows that an encoding actor takes at once")
    encoders: Positive | None = Field(None, description="encoding actors; null: from the cluster's size")
    rows_per_file: Positive = Field(2000, description="rows of one encoded Parquet file")
    precision: Precision = Field("fp32", description="in which the encoders run; what they give is stored as half floats")


class VaeTraining(Section):
    """A small VAE from scratch (only where the teacher is made here): its encoder is solved for, its decoder trained."""

    model: dict[str, Any] = Field(description="arguments of diffusers.AutoencoderKL")
    loop: Loop
    crop: Positive = Field(48, description="pixels of a training crop's side")
    encoder_images: Positive = Field(2048, description="of which the encoder's principal components are taken")
    whitening: float = Field(0.5, ge=0.0, le=1.0, description="power of a component's deviation that it is divided by")
    gradient_weight: float = Field(0.5, ge=0.0, description="of the L1 distance between image gradients")


class UNetTraining(Section):
    """Training or fine-tuning of the teacher's UNet."""

    model: dict[str, Any] | None = Field(None, description="arguments of UNet2DConditionModel; null: fine-tune the source's")
    scheduler: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.DDIMScheduler")
    loop: Loop
    caption_dropout: float = Field(0.1, ge=0.0, lt=1.0, description="share of captions emptied, for guidance")


class Teacher(Section):
    """The unpruned pipeline: a model source, or how to train one."""

    source: str | None = Field(
        None, description="diffusers pipeline: hub id, directory, fsspec URI, or package:NAME/sub/folder"
    )
    revision: str | None = Field(None, description="pinned revision of a hub source")
    variant: str | None = Field(None, description="fp16, where the source has such files")
    text_encoder: str | None = Field(
        None, description="transformers encoder, as a model source, where the pipeline is trained here or ships without one"
    )
    max_tokens: Positive = Field(77, description="to which captions are padded, where text_encoder is given")
    vae: VaeTraining | None = None
    unet: UNetTraining | None = None


class Router(Section):
    """Prompt encoder, architecture predictor and codes."""

    experts: Positive = Field(4, description="K, the number of architecture codes")
    prompt_encoder: str = Field(
        "sentence-transformers/all-mpnet-base-v2", description="hub id, directory, or package:NAME/sub/folder"
    )
    hidden: Positive = Field(256, description="width of the architecture predictor's hidden layer")
    tau: float = Field(0.4, gt=0.0, description="temperature of the relaxation")
    base: float = Field(3.0, description="offset of the relaxation")
    epsilon: float = Field(0.3, gt=0.0, description="transport regularization, times the similarity's standard deviation")
    alignment: Positive = Field(8, description="kept channels are a multiple of this")


class PruneWeights(Section):
    """Weights of the pruning losses."""

    denoising: float = Field(1.0, ge=0.0)
    distillation: float = Field(0.2, ge=0.0)
    block: float = Field(0.2, ge=0.0)
    resource: float = Field(2.0, ge=0.0)
    contrastive: float = Field(1.0, ge=0.0)
    commitment: float = Field(1.0, ge=0.0)
    spread: float = Field(0.1, ge=0.0)
    peak: float = Field(0.1, ge=0.0)


class Prune(Section):
    """The pruning stage: router and codes learn under a budget."""

    budget: Fraction = Field(0.65, description="MACs of the mixture over the teacher's, weighted by traffic")
    loop: Loop = Loop()
    predictor_lr: float = Field(2e-3, gt=0.0)
    code_lr: float = Field(1.5e-2, gt=0.0)
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0, description="first part of the steps, in which e itself is the code")
    importance_samples: Positive = Field(8, description="noised samples by which each entry's closing is judged")
    importance_batch: Positive = Field(128, description="rows of one such forward")
    min_snr_gamma: float = Field(5.0, gt=0.0)
    contrastive_temperature: float = Field(0.03, gt=0.0)
    contrastive_diagonal: bool = Field(False, description="keep a prompt's similarity with itself, as the reference does")
    weights: PruneWeights = PruneWeights()


class FinetuneWeights(Section):
    """Weights of the fine-tuning losses."""

    denoising: float = Field(0.01, ge=0.0)
    distillation: float = Field(0.5, ge=0.0)
    block: float = Field(0.5, ge=0.0)


class Finetune(Section):
    """Fine-tuning: first together (one UNet under all masks), then each expert apart."""

    shared: Loop | None = Field(None, description="null: no shared phase")
    apart: Loop = Loop()
    parallel_experts: Positive | None = Field(None, description="runs side by side; null: as the cluster allows")
    caption_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    min_snr_gamma: float = Field(5.0, gt=0.0)
    weights: FinetuneWeights = FinetuneWeights()


class Sampling(Section):
    """How images are drawn, in reports and by default in the service."""

    scheduler: str = Field("DDIMScheduler", description="name of a diffusers scheduler class")
    num_inference_steps: Annotated[int, Field(ge=1, le=200)] = 20
    guidance_scale: Annotated[float, Field(ge=0.0, le=20.0)] = 3.0


class Report(Section):
    """The report's sample grid."""

    prompts: list[str] | None = Field(None, description="null: the demo's showcase, or validation captions")
    num_prompts: Positive = 12
    seed: int = 0


class Serve(Section):
    """The HTTP service."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: Positive = Field(1, description="least replicas of one expert")
    max_replicas: Positive = Field(1, description="most replicas of one expert")
    max_batch_size: Positive = Field(8, description="images that an expert denoises in one UNet call")
    max_queued_requests: Positive = 64
    route_batch_size: Positive = 16
    route_wait_ms: float = Field(5.0, ge=0.0)
    cpus_per_expert: float = Field(0.2, gt=0.0, description="logical CPUs of one expert's replica")
    gpus_per_expert: float = Field(0.0, ge=0.0)
    threads_per_expert: Positive = Field(1, description="torch threads of one expert's replica on CPU")
    precision: Precision = "fp32"


class Compute(Section):
    """What the cluster gives to Ray Train."""

    workers: Positive = 1
    gpus_per_worker: float = Field(0.0, ge=0.0)
    cpus_per_worker: float = Field(1.0, gt=0.0, description="logical CPUs; leave some for Ray Data")
    threads_per_worker: Positive = Field(1, description="torch threads of a worker on CPU")
    accelerator_type: str | None = None
    max_failures: int = Field(2, ge=-1)


class Tracking(Section):
    """Weights & Biases; offline where no key is in the environment."""

    project: str = "aptp-ray"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"


class Config(Section):
    """Everything that a run is made from."""

    name: str = "run"
    run_dir: str = Field(description="any fsspec URI; relative paths are local")
    seed: int = 0
    data: Data
    teacher: Teacher
    router: Router = Router()
    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    sampling: Sampling = Sampling()
    report: Report = Report()
    serve: Serve = Serve()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    storage_options: dict[str, Any] = Field(default_factory=dict, description="of the run directory, for fsspec")

    @model_validator(mode="after")
    def _teacher_given(self) -> Config:
        if self.teacher.source is None and (self.teacher.unet is None or self.teacher.vae is None):
            raise ValueError("teacher.source is empty: name a pipeline, or give teacher.vae and teacher.unet to train one")
        return self

    def to_yaml(self) -> str:
        """Returns YAML text from which :func:`load_config` makes an equal tree."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# Which sections decide what a stage writes. A later stage adds its own to those of the stages before it.
STAGES: dict[str, tuple[str, ...]] = {
    "teacher": ("seed", "data", "teacher"),
    "encode": (),
    "prune": ("router", "prune"),
    "assign": (),
    "finetune": ("finetune",),
    "report": ("sampling", "report"),
}

# Where and how fast a thing is made does not change what it is; these never invalidate a finished stage.
_UNHASHED = {"workers", "encoders", "batch_size", "storage_options", "log_every_steps", "num_checkpoints", "parallel_experts"}


def stage_hash(config: Config, stage: str) -> str:
    """Returns a hash of all that decides what ``stage`` writes, the stages before it included.

    Raises:
        KeyError: if ``stage`` is not one of :data:`STAGES`.
    """
    sections: list[str] = []
    for name, own in STAGES.items():
        sections += own
        if name == stage:
            break
    else:
        raise KeyError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
    tree = config.model_dump(mode="json")
    text = json.dumps({name: _hashed(tree[name]) for name in sections}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies ``key.sub=value`` overrides (values are YAML).

    Raises:
        ConfigError: if the file is missing, is not YAML, has unknown keys or values out of range; one line, which names
            the key and what is allowed.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a config is a mapping of sections")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, origin=str(path))


def parse_config(tree: dict[str, Any], origin: str = "config") -> Config:
    """Validates a plain tree; see :func:`load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'config'}: {item['msg']}"
            + (f" (got {item['input']!r})" if item["type"] not in {"missing", "value_error"} else "")
            for item in error.errors()
        )
        raise ConfigError(f"{origin}: {problems}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not key=value, e.g. prune.budget=0.5")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value of {key} is not YAML: {' '.join(str(error).split())}") from error


def _hashed(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _hashed(value) for key, value in node.items() if key not in _UNHASHED}
    return node
