"""Who draws what: systems of the config become a list of UNets, and for every caption the one that draws it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.config import Config, ConfigError
from aptp_ray.core.randomness import key_seed
from aptp_ray.data.schema import CAPTION, EXPERT, GROUP, KEY, METADATA, POSITION, SHARD, VIEW
from aptp_ray.evaluate.facts import Facts, read_facts
from aptp_ray.evaluate_sections import System


@dataclass(frozen=True)
class Caption:
    """A validation caption.

    Attributes:
        key: unique among the captions of a run: name of the source's unit and key in it.
        text: the prompt.
        group: a label of its kind, "" where the source has none.
        facts: what its image shows, where the source says so.
        shard: the source's unit, by its short name.
        position: of the row in it.
    """

    key: str
    text: str
    group: str
    facts: Facts | None
    shard: str
    position: int


@dataclass(frozen=True)
class Painter:
    """A UNet and how many steps it takes; what is drawn by the same painter from the same caption is the same image.

    Attributes:
        run_uri: whose UNet.
        expert: None: the run's teacher.
        steps: denoising steps.
    """

    run_uri: str
    expert: int | None
    steps: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The folder below the run that holds its UNet."""
        return ("teacher",) if self.expert is None else ("experts", str(self.expert))

    def name(self, home: str) -> str:
        """Its folder's name, unique among the painters of an evaluation at ``home``."""
        whose = "teacher" if self.expert is None else f"expert-{self.expert}"
        elsewhere = "" if self.run_uri == home else f"{key_seed('run', self.run_uri):016x}"[:8] + "-"
        return f"{elsewhere}{whose}-{self.steps}"


@dataclass(frozen=True)
class Cast:
    """One system, ready to be drawn.

    Attributes:
        system: of the config.
        painters: [captions] who draws each.
        shares: {painter: share of the traffic}; adds up to one.
    """

    system: System
    painters: list[Painter]
    shares: dict[Painter, float] = field(hash=False)


def short_names(units: Iterable[str]) -> dict[str, str]:
    """Names of units without the folder that they share, so that keys and seeds outlive a move; whole where that is ambiguous.

    A unit of shards is named by its address: another copy of the data, or of the run directory, has other ones.
    """
    whole = sorted(set(units))
    short = {name: name.rsplit("/", 1)[-1] for name in whole}
    return short if len(set(short.values())) == len(whole) else {name: name for name in whole}


def unique_key(shard: str, key: str) -> str:
    """Keys are unique in their unit only; names of units may hold slashes and dots, keys of a WebDataset may not."""
    return f"{shard}-{key}".replace("/", "_").replace(".", "_")


def read_captions(run: RunDir, *, images: int, seed: int) -> list[Caption]:
    """Picks validation captions at random, one an image, and puts them into the source's order.

    Args:
        run: a run whose validation split is encoded.
        images: how many; fewer where there are not as many.
        seed: of the choice; the smaller of two choices is a part of the larger.

    Raises:
        RunDirError: if the split is not there.
    """
    index = run.read_json("encoded", "validation", "index.json")["files"]
    columns = [KEY, SHARD, POSITION, VIEW, CAPTION, GROUP, METADATA]
    tables = [pq.read_table(io.BytesIO(run.read_bytes("encoded", "validation", name)), columns=columns) for name, _ in index]
    rows = [row for row in pa.concat_tables(tables).to_pylist() if row[VIEW] == 0]
    if len(rows) < 2:
        raise RunDirError(f"{run.address('encoded', 'validation')} has {len(rows)} captions: encode more validation rows")
    short = short_names(row[SHARD] for row in rows)
    order = np.random.default_rng(key_seed(seed, "captions")).permutation(len(rows))[:images]
    return [
        Caption(
            key=unique_key(short[row[SHARD]], row[KEY]),
            text=row[CAPTION],
            group=row[GROUP],
            facts=read_facts(row[METADATA]),
            shard=short[row[SHARD]],
            position=row[POSITION],
        )
        for row in (rows[place] for place in sorted(order.tolist()))
    ]


def cast_systems(config: Config, run: RunDir, captions: Sequence[Caption]) -> list[Cast]:
    """Says for every system who draws each caption.

    Raises:
        ConfigError: if a system names an expert that is not there, or two runs have different captions.
        RunDirError: if a run has not been fine-tuned and assigned.
    """
    runs: dict[str, RunDir] = {}

    def whose(system: System) -> RunDir:
        uri = system.run_dir or run.uri
        return runs.setdefault(uri, run if uri == run.uri else RunDir(uri, config.storage_options))

    found = []
    own = run.read_json("routing.json")
    for system in config.evaluation.systems:
        of = whose(system)
        routing = of.read_json("routing.json")
        if routing["teacher_macs"] != own["teacher_macs"]:
            raise ConfigError(f"system {system.name}: the teacher of {of.uri} costs other MACs than this run's")
        found.append(_cast(config, of, system, captions, routing, mixture_ratio=float(own["macs_ratio"])))
    return found


def _cast(
    config: Config, run: RunDir, system: System, captions: Sequence[Caption], routing: dict[str, Any], *, mixture_ratio: float
) -> Cast:
    steps = config.sampling.num_inference_steps
    if system.steps == "equal_compute":
        # Against what one step of this system costs, not only the teacher: a large expert may take fewer steps, too.
        own = 1.0 if system.kind == "teacher" else float(routing["macs_ratio"])
        steps = max(1, round(steps * mixture_ratio / own))
    elif system.steps is not None:
        steps = system.steps
    experts = sorted(routing["experts"], key=lambda one: one["id"])
    shares = [float(one["share"]) for one in experts]
    if system.kind == "teacher":
        only = Painter(run.uri, None, steps)
        return Cast(system, [only] * len(captions), {only: 1.0})
    if system.kind == "one_expert":
        nearest = min(experts, key=lambda one: abs(one["macs_ratio"] - routing["macs_ratio"]))["id"]
        expert = nearest if system.expert is None else system.expert
        if expert >= len(experts):
            raise ConfigError(f"system {system.name}: {run.uri} has experts 0 to {len(experts) - 1}, not {expert}")
        only = Painter(run.uri, expert, steps)
        return Cast(system, [only] * len(captions), {only: 1.0})
    routes = _routes(run, captions, system.name)
    if system.kind == "random_routing":
        order = np.random.default_rng(key_seed(config.evaluation.seed, "random routing")).permutation(len(routes))
        routes = [routes[place] for place in order]
    painters = [Painter(run.uri, expert, steps) for expert in range(len(experts))]
    used = sorted(set(routes))
    mass = sum(shares[expert] for expert in used)
    return Cast(system, [painters[expert] for expert in routes], {painters[expert]: shares[expert] / mass for expert in used})


def _routes(run: RunDir, captions: Sequence[Caption], name: str) -> list[int]:
    """The expert of each caption, from the run's own routing of its validation split."""
    content = run.read_bytes("assigned", "validation.parquet")
    rows = pq.read_table(io.BytesIO(content), columns=[CAPTION, EXPERT])
    # The table has no unit names; a router is a function of the caption alone.
    expert = dict(zip(rows.column(CAPTION).to_pylist(), rows.column(EXPERT).to_pylist(), strict=True))
    missing = [one.text for one in captions if one.text not in expert]
    if missing:
        raise ConfigError(
            f"system {name}: {run.uri} has not routed {len(missing)} of the captions, e.g. {missing[0]!r}; "
            "compare runs on the same data, and assign after encoding"
        )
    return [expert[one.text] for one in captions]
