"""The sections of the configuration tree; ``config.py`` puts them together, reads them and hashes them.

Every field stands here with its type, its limits and its default. A key that no stage reads is no field: it is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "bf16", "fp16"]

# In the annotation of a field that says where or how fast a thing is made, never what: it is in no stage's hash.
HOW = "how"


class UserError(Exception):
    """Something that the user can mend; the message is one line and says what to change."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used."""


class Section(BaseModel):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Schedule(Section):
    """What training shares whose parts learn at rates of their own: AdamW's moments and the course of the rates."""

    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = Field(0, ge=0, description="linear rise from zero")
    schedule: Literal["constant", "cosine", "constant_cosine"] = Field(
        "constant", description="constant_cosine holds the peak for half of the steps, then falls"
    )
    final_lr_fraction: float = Field(0.02, ge=0.0, le=1.0, description="of the peak, where a cosine ends")
    clip_norm: float = Field(1.0, gt=0.0, description="gradient norm above which gradients are scaled down")
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0, description="exponential moving average of weights; null: off")


class Optimizer(Schedule):
    """AdamW with one learning rate for all that a stage trains."""

    lr: float = Field(1e-4, gt=0.0, description="peak learning rate")
    weight_decay: float = Field(0.01, ge=0.0)

    def rates(self) -> dict[str, float]:
        """Returns what a parameter group carries: ``lr`` and ``weight_decay``."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}


class Loop(Section):
    """What every training stage shares."""

    steps: Positive = 100
    global_batch_size: Positive = Field(32, description="samples of one optimizer step, over all workers")
    optimizer: Schedule = Schedule()
    precision: Precision = "fp32"
    seed: int = 0
    shuffle_window: Positive = Field(4096, description="rows permuted together, keyed by (seed, epoch, window)")
    log_every_steps: Annotated[Positive, HOW] = 10
    checkpoint_every_steps: Annotated[Positive, HOW] = 500
    num_checkpoints: Annotated[Positive, HOW] = Field(2, description="how many checkpoints are kept")
    workers: Annotated[Positive | None, HOW] = Field(None, description="Train workers of this stage; null: compute.workers")


class RatedLoop(Loop):
    """A loop whose optimizer has one learning rate for all."""

    optimizer: Optimizer = Optimizer()


class Source(Section):
    """Where captioned images come from."""

    kind: Literal["webdataset", "openmoji"] = "webdataset"
    train: str | None = Field(None, description="webdataset: path, glob or brace pattern of the training shards")
    validation: str | None = Field(None, description="webdataset: the same for validation")
    train_images: Positive = Field(12000, description="openmoji: how many to draw")
    validation_images: Positive = Field(1500, description="openmoji: how many to draw")
    images_per_shard: Positive = 1000
    storage_options: Annotated[dict[str, Any], HOW] = Field(
        default_factory=dict, repr=False, description="of the shards, for fsspec; secrets as env:NAME (see credentials.py)"
    )

    @model_validator(mode="after")
    def _patterns_given(self) -> Source:
        if self.kind == "webdataset" and not (self.train and self.validation):
            raise ValueError("data.source.kind=webdataset needs shard patterns: set data.source.train and .validation")
        return self


class Data(Section):
    """The images and captions, and how they are encoded."""

    source: Source
    resolution: Positive = Field(64, description="pixels of a side; the VAE's factor must divide it")
    batch_size: Annotated[Positive, HOW] = Field(64, description="rows that an encoding actor takes at once")
    encoders: Annotated[Positive | None, HOW] = Field(None, description="encoding actors; null: from the cluster's size")
    rows_per_file: Annotated[Positive, HOW] = Field(2000, description="rows of one encoded Parquet file")
    precision: Precision = Field("fp32", description="in which the encoders run; what they give is stored as half floats")


class VaeTraining(Section):
    """A small VAE from scratch (only where the teacher is made here): its encoder is solved for, its decoder trained."""

    model: dict[str, Any] = Field(description="arguments of diffusers.AutoencoderKL")
    loop: RatedLoop
    crop: Positive = Field(48, description="pixels of a training crop's side")
    encoder_images: Positive = Field(2048, description="of which the encoder's principal components are taken")
    whitening: float = Field(0.5, ge=0.0, le=1.0, description="power of a component's deviation that it is divided by")
    gradient_weight: float = Field(0.5, ge=0.0, description="of the L1 distance between image gradients")


class UNetTraining(Section):
    """Training or fine-tuning of the teacher's UNet."""

    model: dict[str, Any] | None = Field(None, description="arguments of UNet2DConditionModel; null: fine-tune the source's")
    scheduler: dict[str, Any] = Field(default_factory=dict, description="arguments of diffusers.DDIMScheduler")
    loop: RatedLoop
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
    predictor_lr: float = Field(2e-3, gt=0.0, description="peak learning rate of the architecture predictor")
    code_lr: float = Field(1.5e-2, gt=0.0, description="peak learning rate of the codes")
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0, description="first part of the steps, in which e itself is the code")
    importance_samples: Positive = Field(8, description="noised samples by which each entry's closing is judged")
    importance_batch: Annotated[Positive, HOW] = Field(128, description="rows of one such forward")
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

    shared: RatedLoop | None = Field(None, description="null: no shared phase")
    apart: RatedLoop = RatedLoop()
    parallel_experts: Annotated[Positive | None, HOW] = Field(
        None, description="runs side by side; null: as the cluster allows"
    )
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
