"""What a plan starts from: the load, the objective, and the devices that can be had (``clusters/fleet.yaml``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from aptp_ray.section import ConfigError, Fraction, Positive, Section


class Load(Section):
    """The traffic that the service has to carry."""

    images_per_s: float = Field(gt=0.0, description="target, at the busiest time that the objective must hold")
    steps: dict[Positive, float] = Field({25: 1.0}, min_length=1, description="share of the images by their denoising steps")
    quiet: Fraction = Field(0.25, description="least load, as a fraction of the target: decides min_replicas")
    surge: float = Field(1.5, ge=1.0, description="largest load, as a multiple of the target: decides max_replicas")

    @model_validator(mode="after")
    def _shares_are_shares(self) -> Load:
        if min(self.steps.values()) < 0 or sum(self.steps.values()) <= 0:
            raise ValueError(f"load.steps={self.steps}: the shares of step counts must not be negative, and not all 0")
        return self

    def mix(self) -> dict[int, float]:
        """Returns the steps' shares, summing to one."""
        total = sum(self.steps.values())
        return {count: share / total for count, share in sorted(self.steps.items()) if share > 0}


class Objective(Section):
    """What the service promises."""

    p95_s: float = Field(gt=0.0, description="from a request's arrival to its image, for 95 % of the requests of every expert")
    utilisation: Fraction = Field(0.8, description="most load of a device, as a fraction of what full batches would carry")


class Replica(Section):
    """What a replica costs beside its denoising steps."""

    least: Positive = Field(1, description="of an expert, whatever its load: 2, and the loss of one is not felt")
    cpus: float = Field(1.0, gt=0.0, description="logical CPUs (serve.cpus_per_expert)")
    memory_gb: float | None = Field(None, gt=0.0, description="of the device, for one replica; null: from the files of the run")
    reserve_gb: float = Field(3.0, ge=0.0, description="added to the files' size: the device's context, activations, VAE decodes")
    overhead_ms: float = Field(60.0, ge=0.0, description="of a request outside of its steps: HTTP, routing, text, decoding")
    side_ms: float = Field(0.0, ge=0.0, description="of that, what takes the device from other images' steps; on a CPU, cores")
    requests_per_router: float = Field(100.0, gt=0.0, description="a second, of one router replica (jobs/benchmark.py serve)")
    requests_per_ingress: float = Field(50.0, gt=0.0, description="a second, of one ingress replica")


class Device(Section):
    """A kind of GPU (or a CPU host) with its share of the node that holds it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    gpu: bool = Field(True, description="false: a CPU host; its fractions are then of its CPUs")
    accelerator_type: str | None = Field(None, description="Ray's name of it, e.g. L40S; needed where there are several")
    memory_gb: float = Field(gt=0.0)
    cpus: float = Field(gt=0.0, description="logical CPUs that come with one")
    lanes: Positive = Field(1, description="replicas that it runs at full speed side by side: 1 for a GPU, its cores for a CPU")
    refill_ms: float = Field(0.0, ge=0.0, description="added to a step while more replicas are at work than there are lanes")
    price_per_hour: float = Field(gt=0.0)
    available: Positive = Field(1, description="how many can be had")
    # -- how fast: measured, or estimated
    profiles: dict[str, str] = Field(
        default_factory=dict,
        description="model (teacher, expert-0, ...) -> file with its BatchProfile, as replicas leave them below APTP_CACHE; "
        "an expert without one is estimated from the teacher's by its MACs",
    )
    tflops: float | None = Field(
        None, gt=0.0, description="that a UNet reaches here (not the data sheet's peak), where there is no profile of the teacher"
    )
    launch_ms: float = Field(15.0, ge=0.0, description="of a step, whatever the batch: kernel launches; with tflops")

    @model_validator(mode="after")
    def _fast_somehow(self) -> Device:
        if "teacher" not in self.profiles and self.tflops is None:
            raise ValueError(f"device {self.name}: how fast is it? give profiles: {{teacher: FILE}}, or tflops for an estimate")
        return self


class Fleet(Section):
    """The whole file."""

    load: Load
    objective: Objective
    replica: Replica = Replica()
    max_batch_size: Annotated[int, Field(ge=1, le=32)] = Field(8, description="serve.max_batch_size")
    devices: list[Device] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Fleet:
        names = [device.name for device in self.devices]
        if len(set(names)) < len(names):
            raise ValueError(f"devices: two have one name ({', '.join(sorted(names))})")
        gpus = [device for device in self.devices if device.gpu]
        if len(gpus) > 1 and any(device.accelerator_type is None for device in gpus):
            raise ValueError("devices: of several kinds of GPUs, each needs its accelerator_type, or Ray cannot tell them apart")
        return self


def load_fleet(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Fleet:
    """Reads a fleet file; ``key.sub=value`` overrides are YAML; paths of profiles are relative to the file.

    Raises:
        ConfigError: on one line, which names the key.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the fleet file {path}: {error.strerror}; clusters/fleet.yaml is an example") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a fleet is a mapping with load, objective and devices")
    for override in overrides:
        _apply(tree, override)
    for device in tree.get("devices") or []:
        if isinstance(device, dict) and isinstance(device.get("profiles"), dict):
            device["profiles"] = {k: str(Path(path).parent / str(v)) for k, v in device["profiles"].items()}
    try:
        return Fleet.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'fleet'}: {item['msg']}" for item in error.errors(include_url=False)
        )
        raise ConfigError(f"{path}: {problems}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not key=value, e.g. load.images_per_s=20")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}=...: {parent} is no section")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {key}=...: the value {value!r} is not YAML; put it in quotes") from None
