"""The configuration tree: shipped files load, wrong ones are refused on one line, hashes change when they should."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aptp_ray.config import STAGES, Config, ConfigError, _decided_by, load_config, parse_config, stage_hash
from aptp_ray.section import YOUNG, Section
from aptp_ray.sections import Prune

CONFIGS = Path(__file__).resolve().parents[1] / "jobs" / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def small(**changes: Any) -> dict[str, Any]:
    """The least tree that is a config."""
    data = {"source": {"kind": "webdataset", "train": "a.tar", "validation": "b.tar"}}
    return {"run_dir": "runs/x", "data": data, "teacher": {"source": "somewhere"}} | changes


def write(folder: Path, tree: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


# -- shipped files -------------------------------------------------------------------------------------------------------------


def test_the_expected_configs_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"openmoji", "openmoji_teacher", "sd21_cc3m", "sd21_coco"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_round_trips(path: Path) -> None:
    config = load_config(path)
    again = parse_config(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert {stage: stage_hash(again, stage) for stage in STAGES} == {stage: stage_hash(config, stage) for stage in STAGES}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_global_batches_divide_among_the_workers(path: Path) -> None:
    config = load_config(path)
    loops = [config.prune.loop, config.finetune.apart, config.finetune.shared]
    loops += [part.loop for part in (config.teacher.vae, config.teacher.unet) if part]
    for loop in filter(None, loops):
        loop.check_division("loop", loop.workers or config.compute.workers)


@pytest.mark.parametrize("name", ["one_code", "greedy", "norm", "random", "blocks"])
def test_a_baseline_gets_what_the_mixture_gets(name: str) -> None:
    mixture, baseline = (load_config(CONFIGS / f"openmoji{tail}.yaml") for tail in ("", f"_{name}"))
    assert stage_hash(mixture, "encode") == stage_hash(baseline, "encode")
    shared, apart = (
        [loop.steps * loop.global_batch_size for loop in (config.finetune.shared, config.finetune.apart) if loop]
        for config in (mixture, baseline)
    )
    assert baseline.router.experts == 1 and shared[1] * mixture.router.experts == apart[1] and shared[0] == apart[0]
    same = [config.finetune.model_dump(exclude={"apart": {"steps", "workers"}}) for config in (mixture, baseline)]
    assert same[0] == same[1] and mixture.prune.budget == baseline.prune.budget


# -- files on files ------------------------------------------------------------------------------------------------------------


def test_a_file_changes_its_base_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, small(prune={"budget": 0.5, "code_lr": 0.1}))
    (tmp_path / "a.yaml").write_text("base: config.yaml\nprune: {budget: 0.6}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nprune: {code_lr: 0.2}\ndata: {source: {kind: openmoji}, resolution: 64}\n")
    config = load_config(tmp_path / "b.yaml", ["prune.budget=0.7"])
    assert (config.prune.budget, config.prune.code_lr) == (0.7, 0.2)
    assert load_config(tmp_path / "a.yaml").prune.budget == 0.6
    assert config.data.source.kind == "openmoji"  # of another kind: nothing of the base's source is left


def test_bases_that_are_missing_or_go_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: No such file"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="its own base"):
        load_config(tmp_path / "a.yaml")


def test_a_rule_makes_one_code(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.experts=1"):
        parse_config(small(prune={"codes": "norm"}, router={"experts": 4}))


@pytest.mark.parametrize("name", ["sd21_cc3m", "sd21_coco"])
def test_the_reference_schedule(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    prune, finetune = config.prune, config.finetune
    assert (config.data.resolution, prune.loop.steps, finetune.apart.steps) == (256, 5000, 30_000)
    peak = 2e-4 * math.sqrt(prune.loop.global_batch_size)
    assert prune.predictor_lr == pytest.approx(peak, rel=0.01) and prune.code_lr == pytest.approx(peak, rel=0.01)
    assert finetune.apart.optimizer.lr == pytest.approx(1e-5 * math.sqrt(finetune.apart.global_batch_size), rel=0.01)
    weights = tuple(finetune.weights.model_dump().values())
    assert weights == {"sd21_cc3m": (0.01, 0.5, 0.5), "sd21_coco": (1.0, 0.2, 0.2)}[name]
    assert config.router.prompt_encoder.endswith("all-mpnet-base-v2")


@pytest.mark.parametrize("name", ["sd21_cc3m", "sd21_coco"])
def test_the_storage_estimate_is_the_formula(name: str) -> None:
    """Bytes of a row: two half-float latents, half-float text states, a float z, as data/schema.py stores them."""
    side = load_config(CONFIGS / f"{name}.yaml").data.resolution // 8  # the VAE's factor
    text, latents, z = 77 * 1024 * 2, 2 * 4 * side * side * 2, 768 * 4  # SD 2.1: 77 tokens of width 1024; z of mpnet: 768
    comment = (CONFIGS / f"{name}.yaml").read_text()
    assert f"{text / 1e3:.0f} kB" in comment and f"{(text + latents + z) / 1e3:.0f} kB" in comment


# -- refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (small(colour="red"), "colour"),
        (small(prune={"budgett": 0.5}), "prune.budgett"),
        (small(prune={"budget": 1.5}), "prune.budget"),
        (small(prune={"budget": 0}), "prune.budget"),
        (small(prune={"loop": {"steps": "many"}}), "prune.loop.steps"),
        (small(prune={"loop": {"optimizer": {"schedule": "linear"}}}), "prune.loop.optimizer.schedule"),
        # The router's parts learn at prune.predictor_lr and prune.code_lr, without decay.
        (small(prune={"loop": {"optimizer": {"lr": 1e-3}}}), "prune.loop.optimizer.lr"),
        (small(prune={"loop": {"optimizer": {"weight_decay": 0.1}}}), "prune.loop.optimizer.weight_decay"),
        (small(teacher={"source": "x", "vae": {"model": {}, "loop": {}}}), "teacher.vae"),
        (small(serve={"port": 70000}), "serve.port"),
        (small(teacher={}), "teacher.source"),
        (small(teacher={"source": None, "unet": None}), "teacher.source"),
        (small(data={"source": {"kind": "webdataset"}}), "data.source.train:"),
        (small(data={"source": {"train": "a.tar", "validation": "b.tar"}}), "data.source"),
        (small(data={"source": {"kind": "zip", "train": "a.tar", "validation": "b.tar"}}), "'webdataset'"),
        (small(data={"source": {"kind": "coco", "train": {"annotations": "a.json"}, "validation": {}}}), "source.train.images"),
        (small(data={"source": {"kind": "webdataset", "train": "s3://me:word@x/a.tar", "validation": "b"}}), "source.train"),
        (small(prune={"loop": {"global_batch_size": 12, "lanes": 8}}), "prune.loop.lanes=8"),
        (small(prune={"loop": {"global_batch_size": 8, "workers": 3}}), "prune.loop"),
        (small(compute={"workers": [4, 2]}), "compute"),
        (small(prune={"loop": {"global_batch_size": 2}}, compute={"workers": [1, 4]}), "prune.loop"),
        ({key: value for key, value in small().items() if key != "data"}, "data"),
        ({key: value for key, value in small().items() if key != "run_dir"}, "run_dir"),
        ("", "data"),
        ("- a\n- b\n", "list"),
        ("run_dir: [unclosed\n", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_on_one_line_that_names_the_key(tmp_path: Path, tree: Any, named: str) -> None:
    path = write(tmp_path, tree)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    text = one_line(error)
    assert named in text and str(path) in text


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x08\x00\xff\xfe\x80weights")
    with pytest.raises(ConfigError, match="no text file") as error:
        load_config(path)
    assert str(path) in one_line(error)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "none.yaml")
    assert "none.yaml" in one_line(error)


def test_several_mistakes_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path, small(prune={"budget": 2}, router={"experts": 0}))
    with pytest.raises(ConfigError, match=r"router\.experts.*prune\.budget|prune\.budget.*router\.experts"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("prune.budget", "key=value"),
        ("=3", "key=value"),
        ("prune.budget=lots", "prune.budget"),
        ("prune.budge=0.5", "prune.budge"),
        ("run_dir.sub=1", "run_dir"),
        ("prune.loop.steps=[1", "prune.loop.steps"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, named: str) -> None:
    path = write(tmp_path, small())
    with pytest.raises(ConfigError) as error:
        load_config(path, [override])
    assert named in one_line(error)


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, small(prune=None) | {"prune": {"budget": 0.9}})
    config = load_config(
        path, ["prune.budget=0.5", "prune.budget=0.4", "finetune.apart.workers=2", "report.prompts=[a red apple]", "serve.port=0"]
    )
    assert config.prune.budget == 0.4 and config.finetune.apart.workers == 2
    assert config.report.prompts == ["a red apple"] and config.serve.port == 0


def test_the_tree_is_frozen() -> None:
    config = parse_config(small())
    with pytest.raises(ValueError, match="frozen"):
        config.prune.budget = 0.1  # type: ignore[misc]


# -- hashes --------------------------------------------------------------------------------------------------------------------


def hashes(**changes: Any) -> dict[str, str]:
    config = parse_config(small(**changes))
    return {stage: stage_hash(config, stage) for stage in STAGES}


def changed(**changes: Any) -> set[str]:
    before, after = hashes(), hashes(**changes)
    return {stage for stage in STAGES if before[stage] != after[stage]}


def test_a_hash_is_stable_and_survives_yaml() -> None:
    config = parse_config(small())
    assert hashes() == hashes()
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in hashes().values())
    assert stage_hash(parse_config(yaml.safe_load(config.to_yaml())), "finetune") == stage_hash(config, "finetune")


def test_a_young_field_leaves_the_hashes_of_older_runs() -> None:
    young = [name for name, field in Prune.model_fields.items() if YOUNG in field.metadata]
    assert young == ["importances_at", "assignment"]
    assert not set(young) & set(_decided_by(parse_config(small()))["prune"]["prune"])
    assert changed(prune={"assignment": "transport"}) == set()
    assert changed(prune={"importances_at": []}) == set()
    assert changed(prune={"assignment": "nearest"}) == changed(prune={"importances_at": [0.8]}) == since("prune")


def test_the_order_of_keys_does_not_matter() -> None:
    tree = small(prune={"budget": 0.5, "code_lr": 0.1}, router={"experts": 2})
    turned = dict(reversed([(k, dict(reversed(v.items())) if isinstance(v, dict) else v) for k, v in tree.items()]))
    assert stage_hash(parse_config(tree), "prune") == stage_hash(parse_config(turned), "prune")


def since(stage: str) -> set[str]:
    return set(STAGES[STAGES.index(stage) :])


def test_a_change_reaches_its_stage_and_all_later_ones() -> None:
    assert changed(teacher={"source": "elsewhere"}) == set(STAGES)
    assert changed(data=small()["data"] | {"resolution": 128}) == since("encode")
    assert changed(router={"prompt_encoder": "some/other"}) == since("encode")
    assert changed(router={"experts": 2}) == changed(prune={"budget": 0.5}) == since("prune")
    assert changed(finetune={"caption_dropout": 0.2}) == since("finetune")
    assert changed(sampling={"guidance_scale": 5.0}) == since("report")


def test_a_teacher_that_is_trained_here_depends_on_the_data() -> None:
    trained = {"teacher": {"source": "somewhere", "unet": {"loop": {}}}}
    before = hashes(**trained)
    data = small()["data"]
    other = hashes(**trained, data=data | {"source": data["source"] | {"train": "c.tar"}})
    assert before["teacher"] != other["teacher"]
    validation = hashes(**trained, data=data | {"source": data["source"] | {"validation": "c.tar"}})
    assert {stage for stage in STAGES if validation[stage] != before[stage]} == since("encode")


def test_the_seed_is_the_demos_alone() -> None:
    source = small()["data"]["source"]
    assert source["kind"] == "webdataset" and changed(seed=1) == set()


# Of every field, the first stage whose outcome it decides; the longest prefix counts. Where the teacher is trained on drawn data.
DECIDES = {
    "seed": "teacher",
    "data": "teacher",
    "encode": "teacher",
    "data.source.validation_images": "encode",
    "teacher": "teacher",
    "router": "prune",
    "router.prompt_encoder": "encode",
    "prune": "prune",
    "finetune": "finetune",
    "sampling": "report",
    "report": "report",
}
DECIDES_NOTHING = {
    *("checkpoint_every_minutes", "validate_every_steps", "validation_batches"),
    *("workers", "log_every_steps", "checkpoint_every_steps", "num_checkpoints"),
    *("actors", "resources", "batch_size", "rows_per_file", "max_rejected_fraction"),
    *("storage_options", "parallel_experts", "importance_batch"),
}
FULL = {
    "run_dir": "runs/x",
    "data": {"source": {"kind": "openmoji"}},
    "teacher": {"vae": {"model": {"a": 1}, "loop": {}}, "unet": {"model": {"b": 1}, "loop": {}}},
    "finetune": {"shared": {}},
}


def leaves(section: Section, *path: str) -> Iterator[tuple[str, ...]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, *path, name)
        elif (*path, name) != ("data", "source", "kind"):  # decides what else is read: tested above
            yield (*path, name)


def with_other(section: Any, path: tuple[str, ...]) -> Any:
    """A copy with another value at a path, whatever its limits say."""
    value = getattr(section, path[0])
    if len(path) > 1:
        return section.model_copy(update={path[0]: with_other(value, path[1:])})
    return section.model_copy(update={path[0]: {"other": 1} if isinstance(value, dict) else f"other than {value}"})


@pytest.mark.parametrize("path", list(leaves(parse_config(FULL))), ids=".".join)
def test_every_field_is_in_the_hash_of_the_stages_that_it_decides_and_in_no_other(path: tuple[str, ...]) -> None:
    prefixes = [".".join(path[:length]) for length in range(len(path), 0, -1)]
    first = next((DECIDES[prefix] for prefix in prefixes if prefix in DECIDES), None)
    if path[-1] in DECIDES_NOTHING:
        first = None
    before = parse_config(FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pydantic's, of a value that is of another type
        after = with_other(before, path)
        found = {stage for stage in STAGES if stage_hash(before, stage) != stage_hash(after, stage)}
    assert found == (since(first) if first else set())


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"run_dir": "elsewhere"},
        {"compute": {"workers": 8, "gpus_per_worker": 1}},
        {"serve": {"port": 9000}},
        {"tracking": {"mode": "disabled"}},
        {"storage_options": {"anon": True}},
        {"prune": {"loop": {"workers": 4, "log_every_steps": 1, "num_checkpoints": 9}}},
        {"finetune": {"parallel_experts": 3}},
        {"encode": {"actors": 3, "batch_size": 7, "max_rejected_fraction": 0.5}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_where_and_how_fast_does_not_matter(change: dict[str, Any]) -> None:
    assert changed(**change) == set()


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(KeyError, match="unknown stage 'bake'"):
        stage_hash(parse_config(small()), "bake")


def test_defaults_alone_make_a_config() -> None:
    assert isinstance(parse_config(small()), Config)
