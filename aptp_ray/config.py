"""The one typed configuration tree: YAML in, YAML out, unknown keys refused.

Every job takes one YAML file (``jobs/configs/*.yaml``) and ``key=value`` overrides. The tree is frozen: a value is decided
once, and the stages that a finished value decides are hashed into the run's manifest (see ``artifacts.py``). What it is made
of stands in ``sections.py``; how secrets in ``storage_options`` are kept out of all that is written, in ``credentials.py``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from aptp_ray.config_files import read_tree
from aptp_ray.credentials import has_password, masked, revealed
from aptp_ray.evaluate_sections import Evaluation
from aptp_ray.sections import (
    HOW,
    YOUNG,
    Compute,
    ConfigError,
    Data,
    Encode,
    Finetune,
    Loop,
    OpenMoji,
    Optimizer,
    Prune,
    RatedLoop,
    Report,
    Router,
    Sampling,
    Schedule,
    Section,
    Serve,
    Teacher,
    Tracking,
    UserError,
)


class Config(Section):
    """Everything that a run is made from."""

    name: str = "run"
    run_dir: str = Field(description="any fsspec URI; relative paths are local")
    seed: int = Field(0, description="of the data that the demo draws; the training loops have their own")
    data: Data
    encode: Encode = Encode()
    teacher: Teacher
    router: Router = Router()
    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    report: Report = Report()
    serve: Serve = Serve()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    storage_options: Annotated[dict[str, Any], HOW] = Field(
        default_factory=dict,
        repr=False,
        description="of the run directory and of model sources, for fsspec; secrets as env:NAME (see credentials.py)",
    )

    @model_validator(mode="after")
    def _teacher_given(self) -> Config:
        teacher = self.teacher
        if teacher.source is None and (teacher.unet is None or teacher.vae is None):
            raise ValueError("teacher.source is empty: name a pipeline, or give teacher.vae and teacher.unet to train one")
        if teacher.source is not None and teacher.vae is not None:
            raise ValueError("teacher.vae trains a VAE from scratch, but teacher.source brings its own: give one of them")
        return self

    @model_validator(mode="after")
    def _one_code_by_rule(self) -> Config:
        if self.prune.codes != "learned" and self.router.experts != 1:
            raise ValueError(
                f"prune.codes={self.prune.codes} makes one code, but router.experts={self.router.experts}: set router.experts=1"
            )
        return self

    @model_validator(mode="after")
    def _work_divides(self) -> Config:
        teacher = self.teacher
        loops: dict[str, Loop | None] = {
            "teacher.vae.loop": teacher.vae.loop if teacher.vae else None,
            "teacher.unet.loop": teacher.unet.loop if teacher.unet else None,
            "prune.loop": self.prune.loop,
            "finetune.shared": self.finetune.shared,
            "finetune.apart": self.finetune.apart,
        }
        for name, loop in loops.items():
            if loop is not None:
                loop.check_division(name, loop.workers or self.compute.workers)
        return self

    @model_validator(mode="after")
    def _no_passwords_in_addresses(self) -> Config:
        addresses = {
            "run_dir": self.run_dir,
            **_addresses(self.data.source, "data.source"),
            "teacher.source": self.teacher.source,
            "teacher.text_encoder": self.teacher.text_encoder,
            "router.prompt_encoder": self.router.prompt_encoder,
        }
        for key, address in addresses.items():
            if address and has_password(address):
                raise ValueError(f"{key} holds a password, and addresses are logged: move user and password to storage_options")
        return self

    def source_options(self) -> dict[str, Any]:
        """Returns the shards' storage options, with secrets from the environment where they are references.

        Raises:
            ConfigError: if an environment variable is not set.
        """
        source = self.data.source
        return {} if isinstance(source, OpenMoji) else revealed(source.storage_options, "data.source.storage_options")

    def masked(self) -> dict[str, Any]:
        """Returns the tree as plain values fit to be written and logged: no secret is in it (see ``credentials.py``)."""
        tree = self.model_dump(mode="json")
        tree["storage_options"] = masked(self.storage_options, "storage_options")
        if not isinstance(self.data.source, OpenMoji):
            options = masked(self.data.source.storage_options, "data.source.storage_options")
            tree["data"]["source"]["storage_options"] = options
        return tree

    def to_yaml(self) -> str:
        """Returns YAML text from which :func:`load_config` makes an equal tree, but for secrets: see :meth:`masked`."""
        return yaml.safe_dump(self.masked(), sort_keys=False)


STAGES = ("teacher", "encode", "prune", "assign", "finetune", "report")

_VALIDATION = {"validation", "validation_images"}


def stage_hash(config: Config, stage: str) -> str:
    """Returns a hash of all that decides what ``stage`` writes, the stages before it included.

    Where and how fast a thing is made does not change what it is: ``compute``, ``serve``, ``tracking``, ``run_dir``,
    ``name`` (a label) and the fields marked ``HOW`` never invalidate a finished stage, nor does a field marked ``YOUNG`` that
    has its default: the stage was made before there was the field.

    Raises:
        KeyError: if ``stage`` is not one of :data:`STAGES`.
    """
    if stage not in STAGES:
        raise KeyError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
    own = _decided_by(config)
    text = json.dumps({name: own[name] for name in STAGES[: STAGES.index(stage) + 1]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _decided_by(config: Config) -> dict[str, dict[str, Any]]:
    """What each stage reads beyond what the stages before it made."""
    data = _what(config.data)
    source = data["source"]
    # The demo's shards are drawn from the seed; the training loops have seeds of their own.
    seed = {"seed": config.seed} if isinstance(config.data.source, OpenMoji) else {}
    rows = data | {"encode": _what(config.encode)} | seed
    training = rows | {"source": {key: value for key, value in source.items() if key not in _VALIDATION}}
    return {
        # A teacher that is taken as it is sees no data.
        "teacher": {"teacher": _what(config.teacher), "rows": training if config.teacher.unet is not None else None},
        "encode": {"rows": rows, "prompt_encoder": config.router.prompt_encoder},
        "prune": {"router": _what(config.router), "prune": _what(config.prune)},
        "assign": {},
        "finetune": {"finetune": _what(config.finetune)},
        "report": {"sampling": _what(config.sampling), "report": _what(config.report)},
    }


def _addresses(section: Section, name: str) -> dict[str, str]:
    """Every text value of a section and of those in it, by its key in the tree."""
    found: dict[str, str] = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            found |= _addresses(value, f"{name}.{key}")
        elif isinstance(value, str):
            found[f"{name}.{key}"] = value
    return found


def _what(section: Section) -> dict[str, Any]:
    """A section as plain values, without the fields marked ``HOW``, nor those marked ``YOUNG`` that have their default."""
    tree = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if HOW in field.metadata or (YOUNG in field.metadata and value == field.default):
            del tree[name]
        elif isinstance(value, Section):
            tree[name] = _what(value)
    return tree


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies ``key.sub=value`` overrides (values are YAML).

    A file may name another, beside it, that it changes: ``base: openmoji.yaml``. Sections are merged, lists are replaced.

    Raises:
        ConfigError: if the file is missing, is not YAML, has unknown keys or values out of range; one line, which names
            the key and what is allowed.
    """
    return parse_config(read_tree(Path(path), overrides), origin=str(path))


def parse_config(tree: dict[str, Any], origin: str = "config") -> Config:
    """Validates a plain tree; see :func:`load_config`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(
            f"{_key(item['loc']) or 'config'}: {_message(item)}{_given(item)}" for item in error.errors()
        )
        raise ConfigError(f"{origin}: {problems}") from error


def _key(place: tuple[str | int, ...]) -> str:
    """A key as a file has it: pydantic also names the kind of ``data.source``, by which it picked the section."""
    if place[:2] == ("data", "source"):
        place = place[:2] + place[3:]
    return ".".join(str(part) for part in place)


def _message(item: Any) -> str:
    if item["type"] == "union_tag_not_found":
        return "no kind is given: add one, e.g. kind: webdataset (or conceptual_captions, coco, huggingface, image_folder)"
    return str(item["msg"])


def _given(item: Any) -> str:
    """The refused value, unless it may hold a secret: a misspelled ``storage_options`` holds them, too."""
    value = item["input"]
    if item["type"] in {"missing", "value_error", "extra_forbidden", "union_tag_not_found"} or "storage_options" in item["loc"]:
        return ""
    return f" (got a {type(value).__name__})" if isinstance(value, dict | list) else f" (got {value!r})"


__all__ = [
    "STAGES",
    "Config",
    "ConfigError",
    "Loop",
    "Optimizer",
    "RatedLoop",
    "Schedule",
    "UserError",
    "load_config",
    "parse_config",
    "stage_hash",
]
