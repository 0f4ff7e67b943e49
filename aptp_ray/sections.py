"""The sections of the configuration tree; ``config.py`` puts them together, reads them and hashes them.

Every field stands here, in ``data_sections.py`` or in ``serve_sections.py``, with its type, its limits and its default. A key
that no stage reads is no field: it is refused.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from aptp_ray.data_sections import (
    Coco,
    CocoPart,
    ConceptualCaptions,
    Data,
    Encode,
    HuggingFace,
    HuggingFacePart,
    ImageFolder,
    Layout,
    OpenMoji,
    Source,
    TsvPart,
    WebDataset,
)
from aptp_ray.section import HOW, YOUNG, ConfigError, Fraction, Positive, Precision, Section, UserError
from aptp_ray.serve_sections import Serve


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
    shuffle_window: Positive = Field(4096, description="rows held and permuted together, over all lanes")
    lanes: Positive | None = Field(
        None, description="parts of the data that feed each global batch; null: as many as fit, up to 64. The workers divide them"
    )
    log_every_steps: Annotated[Positive, HOW] = 10
    accumulation: Positive = Field(1, description="passes into which a worker's share of the global batch is cut, to save memory")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass, to save memory")
    channels_last: bool = Field(False, description="memory format of the model: faster on tensor cores, slower on CPUs")
    compile: bool = Field(False, description="torch.compile the UNet that is trained; the first steps then take minutes")
    checkpoint_every_steps: Annotated[Positive, HOW] = 500
    checkpoint_every_minutes: Annotated[float | None, HOW] = Field(
        None, gt=0.0, description="a checkpoint at least this often, whatever a step takes; null: by steps alone"
    )
    validate_every_steps: Annotated[Positive | None, HOW] = Field(
        None, description="losses on held-out rows, with draws that are the same each time; null: at the end alone"
    )
    validation_batches: Annotated[Positive, HOW] = Field(2, description="global batches of one validation")
    num_checkpoints: Annotated[Positive, HOW] = Field(2, description="how many checkpoints are kept")
    workers: Annotated[Positive | None, HOW] = Field(None, description="Train workers of this stage; null: compute.workers")

    def num_lanes(self) -> int:
        """Returns ``lanes``, or the largest power of two up to 64 that divides the global batch."""
        return self.lanes or math.gcd(self.global_batch_size, 64)

    def check_division(self, name: str, workers: int | tuple[int, int]) -> None:
        """Refuses a global batch that cannot be dealt out: evenly to a fixed number of workers, at all to an elastic one.

        Raises:
            ValueError: if the lanes do not divide the global batch, or the workers the lanes.
        """
        lanes = self.num_lanes()
        if self.global_batch_size % lanes:
            raise ValueError(
                f"{name}.lanes={lanes} does not divide {name}.global_batch_size={self.global_batch_size}: change one of them"
            )
        most = workers if isinstance(workers, int) else workers[1]
        if most > lanes or (isinstance(workers, int) and lanes % workers):
            raise ValueError(
                f"the {most} workers of {name} do not divide its {lanes} lanes (global_batch_size={self.global_batch_size}): "
                f"change compute.workers or {name}.workers, or set {name}.lanes to a multiple of it that divides the global batch"
            )


class RatedLoop(Loop):
    """A loop whose optimizer has one learning rate for all."""

    optimizer: Optimizer = Optimizer()


class VaeTraining(Section):
    """A small VAE from scratch (only where the teacher is made here): its encoder is solved for, its decoder trained."""

    model: dict[str, Any] = Field(description="arguments of diffusers.AutoencoderKL")
    loop: RatedLoop
    crop: Positive = Field(48, description="pixels of a training crop's side")
    encoder_images: Positive = Field(2048, description="of which the encoder's principal components are taken")
    whitening: float = Field(0.5, ge=0.0, le=1.0, description="power of a component's deviation that it is divided by")
    gradient_weight: float = Field(0.5, ge=0.0, description="of the L1 distance between image gradients")

    @model_validator(mode="after")
    def _only_unets_are_compiled(self) -> VaeTraining:
        if self.loop.compile:
            raise ValueError("teacher.vae.loop.compile: only a UNet is compiled; leave it false")
        return self


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
    depth_order: Literal["protected", "free"] = Field(
        "protected", description="which blocks close first: inner before outer, as in the paper; free: any, by their own logits"
    )
    epsilon: float = Field(0.3, gt=0.0, description="transport regularization; in which units, says relative_epsilon")
    relative_epsilon: bool = Field(
        True, description="epsilon counts in standard deviations of the similarity; false: absolute, as the reference's .05"
    )
    centre: bool = Field(
        True, description="compare embeddings and codes after taking each side's running mean off; false: as they are (reference)"
    )
    duals: bool = Field(
        True, description="route by similarity and the transport's dual potentials; false: to the nearest code alone (reference)"
    )
    alignment: Positive = Field(8, description="kept channels are a multiple of this")
    depth: Literal["modules", "layers"] = Field(
        "modules", description="what of a transformer of several layers (SDXL) can be left out: the whole, or single layers"
    )


class PruneWeights(Section):
    """Weights of the pruning losses."""

    denoising: float = Field(1.0, ge=0.0)
    distillation: float = Field(0.2, ge=0.0)
    block: float = Field(0.2, ge=0.0)
    resource: float = Field(2.0, ge=0.0)
    contrastive: float = Field(1.0, ge=0.0)
    commitment: float = Field(1.0, ge=0.0, description="holds e and its code together; 0: none, as in the reference")
    spread: float = Field(0.1, ge=0.0)
    peak: float = Field(0.1, ge=0.0)


class Prune(Section):
    """The pruning stage: router and codes learn under a budget."""

    codes: Literal["learned", "ablation_greedy", "norm", "random", "block_removal"] = Field(
        "learned",
        description="learned: APTP; else one code for all prompts, by a rule (a baseline; needs router.experts=1): by importance "
        "per MAC, by weights, at random, or BK-SDM's blocks, whose size is what it is",
    )
    budget: Fraction = Field(0.65, description="MACs of the mixture over the teacher's, weighted by traffic")
    loop: Loop = Loop()
    predictor_lr: float = Field(2e-3, gt=0.0, description="peak learning rate of the architecture predictor")
    code_lr: float = Field(1.5e-2, gt=0.0, description="peak learning rate of the codes")
    start: Literal["importance", "zeros"] = Field(
        "importance", description="codes start from measured importance, at the budget; zeros: from zero logits (reference)"
    )
    hardening: Literal["masks", "needs", "shared"] = Field(
        "masks", description="how codes become binary; masks: by what they learned; needs: entries by importance per MAC, each "
        "code as large as its own prompts' measured error asks for; shared: likewise, all of one size, so that experts keep the "
        "same entries and differ by their weights alone"
    )
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0, description="first part of the steps, in which e itself is the code")
    importance_samples: Positive = Field(8, description="noised samples by which each entry's closing is judged")
    importances_at: Annotated[list[Fraction], YOUNG] = Field(
        [], description="MACs ratios at which entries are judged anew on the way down, beside what is left (ablation_greedy: "
        "those above the budget; needs, shared: all of them). Codes lose less before fine-tuning, not after it"
    )
    importance_batch: Annotated[Positive, HOW] = Field(128, description="rows of one such forward")
    gate_placement: Literal["after_norm", "before_norm"] = Field(
        "after_norm", description="where a resnet's masks act; before_norm (reference): pruning changes what the masks promised"
    )
    unet_masks: Literal["soft", "hard"] = Field(
        "soft", description="what the UNet runs under while codes learn; hard: binary with a straight-through gradient"
    )
    resource_masks: Literal["soft", "hard"] = Field(
        "hard", description="what the MACs ratio in the losses and the log is counted on; soft is not what hardening meets"
    )
    noise_per: Literal["code", "sample"] = Field("code", description="one Gumbel draw a step for each code, or for each sample")
    noisy_similarity: bool = Field(False, description="compare codes under the step's noise (reference); needs noise_per=code")
    assignment: Annotated[Literal["transport", "nearest"], YOUNG] = Field(
        "transport", description="which code a prompt trains; transport: by a balanced plan of the batch; nearest: the most "
        "similar one, whatever shares that gives (with router.duals=false it is routed that way, too)"
    )
    normalise_blocks: bool = Field(
        True, description="divide a block's error by the mean square of the teacher's output there; false: as it is (reference)"
    )
    min_snr_gamma: float | None = Field(5.0, gt=0.0, description="null: every timestep weighs the same")
    contrastive_temperature: float = Field(0.03, gt=0.0)
    contrastive_form: Literal["softmax", "binary"] = Field(
        "softmax", description="cross-entropy of two distributions over the batch, or entry by entry (reference)"
    )
    contrastive_diagonal: bool = Field(False, description="keep a prompt's similarity with itself, as the reference does")
    weights: PruneWeights = PruneWeights()

    @model_validator(mode="after")
    def _noise_to_compare_under(self) -> Prune:
        if self.noisy_similarity and self.noise_per != "code":
            raise ValueError("prune.noisy_similarity compares codes under their own noise: it needs prune.noise_per=code")
        return self

    @model_validator(mode="after")
    def _codes_to_size(self) -> Prune:
        if self.hardening != "masks" and self.codes != "learned":
            raise ValueError(
                f"prune.hardening={self.hardening} hardens learned codes: with prune.codes={self.codes} set it to masks"
            )
        return self


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
    steps_by: Literal["expert", "share"] = Field(
        "expert", description="expert: apart.steps for each; share: K times apart.steps in all, by the rows that each one has"
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


class Compute(Section):
    """What the cluster gives to Ray Train."""

    workers: Positive | tuple[Positive, Positive] = Field(
        1, description="Train workers; [least, most]: as many as the cluster has, growing and shrinking while a run goes on"
    )
    gpus_per_worker: float = Field(0.0, ge=0.0)
    cpus_per_worker: float = Field(1.0, gt=0.0, description="logical CPUs; leave some for Ray Data")
    threads_per_worker: Positive = Field(1, description="torch threads of a worker on CPU")
    accelerator_type: str | None = None
    max_failures: int = Field(2, ge=-1, description="failures after which a run goes on from its checkpoint; -1: any number")
    max_preemptions: int = Field(-1, ge=-1, description="the same for spot nodes that are taken away, counted apart")
    tf32: bool = Field(True, description="TensorFloat-32 products where a GPU computes in float32")

    @model_validator(mode="after")
    def _least_before_most(self) -> Compute:
        if not isinstance(self.workers, int) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers={list(self.workers)} is [least, most]: the first is the larger one")
        return self


class Tracking(Section):
    """Weights & Biases; offline where no key is in the environment."""

    project: str = "aptp-ray"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online where WANDB_API_KEY is set, else offline"
    )
    samples: int = Field(
        4, ge=0, description="held-out prompts that are drawn and logged at each validation of fine-tuning; 0: none"
    )
    peak_tflops: float | None = Field(
        None, gt=0.0, description="of one worker's device in the precision that is trained in, for the UNet's FLOP utilisation; "
        "null: that of a known GPU, and no utilisation on others"
    )

__all__ = [
    "Coco",
    "CocoPart",
    "Compute",
    "ConceptualCaptions",
    "ConfigError",
    "Data",
    "Encode",
    "Finetune",
    "FinetuneWeights",
    "HOW",
    "HuggingFace",
    "HuggingFacePart",
    "ImageFolder",
    "Layout",
    "Loop",
    "OpenMoji",
    "Optimizer",
    "Prune",
    "PruneWeights",
    "RatedLoop",
    "Report",
    "Router",
    "Sampling",
    "Schedule",
    "Section",
    "Serve",
    "Source",
    "Teacher",
    "Tracking",
    "TsvPart",
    "UNetTraining",
    "UserError",
    "VaeTraining",
    "WebDataset",
    "YOUNG",
]
