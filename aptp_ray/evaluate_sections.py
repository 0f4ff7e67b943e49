"""The sections of evaluation: what is drawn and scored, by which models, and how a scorer of one's own is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aptp_ray.section import HOW, Positive, Section


class ScorerTraining(Section):
    """An image-text dual encoder from scratch, and heads for facts on its frozen features: for data that no CLIP knows."""

    image_size: Positive = Field(64, description="pixels of a side that the image encoder sees")
    widths: list[Positive] = Field([48, 96, 192], description="of a Swin transformer's stages; each doubles the one before")
    depth: Positive = Field(2, description="blocks of a stage")
    text_width: Positive = 128
    text_layers: Positive = 2
    max_tokens: Positive = 32
    vocabulary: Positive = Field(1200, description="WordPiece entries at most, learned from the captions")
    dimension: Positive = Field(128, description="of the space that images and texts share")
    steps: Positive = 1200
    batch_size: Positive = 128
    lr: float = Field(2e-3, gt=0.0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.05, ge=0.0)
    warmup_steps: int = Field(60, ge=0)
    hard_fraction: float = Field(0.5, ge=0.0, le=1.0, description="of a batch, drawn from few subjects, so that looks count")
    facts_weight: float = Field(0.5, ge=0.0, description="of the facts' cross-entropy beside the contrastive loss")
    ema_decay: float = Field(0.995, gt=0.0, lt=1.0)
    head_steps: Positive = Field(1500, description="of the heads, on frozen features")
    seed: int = 0
    gallery: Positive = Field(100, description="captions among which an image has to find its own, and the other way round")
    checkpoint_every_steps: Annotated[Positive, HOW] = 50
    threads: Annotated[Positive, HOW] = 1

    @model_validator(mode="after")
    def _stages_double(self) -> ScorerTraining:
        if not self.widths or any(b != 2 * a for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"evaluation.scorer.widths={self.widths}: a Swin stage is twice as wide as the one before")
        # Patches of 4, halved between stages, in windows of 4.
        if self.image_size % (16 * 2 ** (len(self.widths) - 1)):
            least = 16 * 2 ** (len(self.widths) - 1)
            raise ValueError(f"evaluation.scorer.image_size={self.image_size} has to be a multiple of {least} for these stages")
        return self


class System(Section):
    """One thing that is drawn with and scored; all see the same captions and the same noise."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="in tables and file names")
    kind: Literal["mixture", "random_routing", "one_expert", "teacher"] = Field(
        description="mixture: each caption by its expert; random_routing: the same experts and shares, captions dealt at random; "
        "one_expert: all captions by one of them; teacher: all by the unpruned UNet"
    )
    run_dir: str | None = Field(None, description="another run on the same data whose experts draw (a baseline); null: this run")
    expert: int | None = Field(None, ge=0, description="of one_expert; null: the one whose MACs are nearest to the mixture's")
    steps: Positive | Literal["equal_compute"] | None = Field(
        None, description="denoising steps; equal_compute: as many as cost what the mixture costs; null: sampling's"
    )

    changes: list[str] = Field(
        [], description="key=value changes of this config by which jobs/compare.py makes the other run; needs run_dir"
    )
    seed_of: str | None = Field(
        None, description="name of the system of which this is another seed: the report shows the mean of both; null: of none"
    )
    against: str | None = Field(
        None, description="name of a system to which this one is compared besides this run's own mixture; null: to no other"
    )

    @model_validator(mode="after")
    def _expert_of_one(self) -> System:
        if self.expert is not None and self.kind != "one_expert":
            raise ValueError(f"system {self.name}: expert={self.expert} belongs to kind=one_expert, not to {self.kind}")
        if self.changes and self.run_dir is None:
            raise ValueError(f"system {self.name}: changes make another run: say with run_dir where it lies")
        return self


_SYSTEMS = [
    System(name="mixture", kind="mixture"),
    System(name="teacher", kind="teacher"),
    System(name="teacher-fewer-steps", kind="teacher", steps="equal_compute"),
    System(name="one-expert", kind="one_expert"),
    System(name="random-routing", kind="random_routing"),
]


class Evaluation(Section):
    """What ``jobs/evaluate.py`` draws and scores."""

    systems: list[System] = Field(_SYSTEMS, min_length=1)
    images: Annotated[int, Field(ge=2, le=10_000)] = Field(
        1000, description="validation captions that every system draws, one image each; kernel distances hold their square"
    )
    seed: int = Field(0, description="of the noise, the choice of captions, random routing and the bootstrap")
    encoder: str | None = Field(
        None,
        description="image-text model for CLIP score, CMMD and distances, a folder in transformers' layout (CLIP, "
        "VisionTextDualEncoder) or package:NAME/sub/folder; null: none",
    )
    inception: str | None = Field(
        None, description="Inception's weights for FID and KID: a path, or cache (torch's hub cache); null: without them"
    )
    replicates: Positive = Field(200, description="of the bootstrap over captions")
    batch_sizes: list[Positive] = Field([1, 2, 4, 8], min_length=1, description="at which a denoising step is timed")
    images_per_file: Annotated[Positive, HOW] = Field(64, description="of a drawing task and of the shard that it writes")
    batch_size: Annotated[Positive | None, HOW] = Field(
        None, description="images in one UNet call; null: serve.max_batch_size or 8"
    )
    actors: Annotated[Positive | None, HOW] = Field(None, description="that draw at once; null: one for each GPU, or each core")
    scorer: ScorerTraining | None = Field(
        None, description="of an image-text encoder, by jobs/train_scorer.py; null: none is trained"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Evaluation:
        names = [system.name for system in self.systems]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluation.systems: two systems have one name ({', '.join(sorted(names))})")
        firsts = {system.name for system in self.systems if system.seed_of is None}
        for system in self.systems:
            if system.seed_of is not None and system.seed_of not in firsts:
                raise ValueError(
                    f"evaluation.systems: {system.name} is said to be another seed of {system.seed_of!r}, which is not among "
                    f"the systems that are no other's seed ({', '.join(sorted(firsts))})"
                )
            if system.against is not None and (system.against not in firsts - {system.name} or system.seed_of is not None):
                raise ValueError(
                    f"evaluation.systems: {system.name} has against={system.against!r}: say it of a system that is no other's "
                    f"seed, and name another such one ({', '.join(sorted(firsts))})"
                )
        if not any(system.kind == "mixture" and system.run_dir is None for system in self.systems):
            raise ValueError(
                "evaluation.systems: this run's own mixture, with which others are compared, is missing; add kind: mixture"
            )
        return self
