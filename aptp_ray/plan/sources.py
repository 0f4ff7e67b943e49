"""What a run directory tells the planner: the experts, their traffic, their MACs and the size of their files."""

from __future__ import annotations

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.plan.fleet import Fleet
from aptp_ray.plan.times import Model
from aptp_ray.section import ConfigError

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STORED = 4  # bytes a weight takes in the run directory
_LEAST_SHARE = 1e-6  # an expert without traffic still has to be there


def models_of(run: RunDir, config: Config, fleet: Fleet) -> tuple[list[Model], int]:
    """Returns the experts of a run, and the teacher's MACs.

    Raises:
        RunDirError: if the run has no routing.json yet.
        ConfigError: if the memory of a replica is neither given nor to be had from files.
    """
    routing = run.read_json("routing.json")
    found = []
    for entry in routing["experts"]:
        memory = fleet.replica.memory_gb or _memory_gb(run, config, fleet, int(entry["id"]))
        found.append(Model(f"expert-{entry['id']}", max(_LEAST_SHARE, entry["share"]), entry["macs_ratio"], memory))
    total = sum(model.share for model in found)
    return [Model(m.name, m.share / total, m.macs_ratio, m.memory_gb) for m in found], int(routing["teacher_macs"])


def _memory_gb(run: RunDir, config: Config, fleet: Fleet, expert: int) -> float:
    weights = _weights(run, "experts", str(expert))
    if not weights:
        raise ConfigError(
            f"{run.address('experts', str(expert))} holds no weights to take the memory of a replica from: "
            "run jobs/finetune.py first, or give replica.memory_gb in the fleet file"
        )
    # Each replica holds the VAE and the text encoders, too.
    weights += sum(_weights(run, "teacher", part) for part in ("vae", "text_encoder", "text_encoder_2"))
    return weights * _BYTES[config.serve.precision] / _STORED / 1e9 + fleet.replica.reserve_gb


def _weights(run: RunDir, *parts: str) -> int:
    """Bytes of the safetensors files below a folder."""
    if not run.exists(*parts):
        return 0
    files = run.fs.find(run.path(*parts), detail=True)
    return sum(int(facts["size"] or 0) for path, facts in files.items() if path.endswith(".safetensors"))
