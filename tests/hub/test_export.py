from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from aptp_ray.artifacts import RunDirError, load_run
from aptp_ray.core.components import load_unet
from aptp_ray.core.pruned_model import PrunedUNet2DConditionModel
from aptp_ray.hub.export import export_expert, export_mixture, pull, push
from aptp_ray.hub.mixture import MixturePipeline
from tests.hub.hub_server import Hub
from tests.serve.conftest import TRAINING_PROMPTS

REPOSITORY = Path(__file__).resolve().parents[2]

# Runs where this package cannot be imported: everything comes from diffusers and the directory alone.
WITHOUT_US = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "aptp_ray":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
try:
    import aptp_ray
except ImportError as error:
    assert "blocked" in str(error)
else:
    raise SystemExit("aptp_ray can be imported here: this proves nothing")
import json, torch
from diffusers import AutoModel, DiffusionPipeline
result = []
for name, source, subfolder in json.loads(sys.argv[1]):
    if name == "pipeline":
        pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        image = pipe("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
        result.append([type(pipe.unet).__name__, pipe.unet.num_parameters(), float(image.mean())])
    else:
        model = AutoModel.from_pretrained(source, subfolder=subfolder, trust_remote_code=True)
        result.append([type(model).__name__, model.num_parameters(), type(model).__module__])
assert not [m for m in sys.modules if m.split(".")[0] == "aptp_ray"]
print(json.dumps(result))
"""


def without_us(*what: tuple[str, str, str | None], cache: Path, endpoint: str = "http://127.0.0.1:9") -> list[list]:
    environment = {**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, json.dumps(what)],
        capture_output=True, text=True, timeout=300, cwd=cache, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def exports(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture, and its expert 1."""
    folder = tmp_path_factory.mktemp("exports")
    run, config = load_run(str(run_dir))
    figures = export_mixture(run, config, folder / "mixture", licence="openrail++", repo_id="me/mixture")
    assert figures["experts"] == [0, 1] and figures["bytes"] > 100_000
    export_expert(run, config, 1, folder / "expert", repo_id="me/expert")
    return folder


def test_the_module_that_ships_is_self_contained() -> None:
    from aptp_ray.core import pruned_model
    from tests.test_layers import imports

    path = Path(pruned_model.__file__)
    names = {name.split(".")[0] for name in imports("pruned_model", path)}
    assert names <= {"torch", "diffusers", *sys.stdlib_module_names}


def test_experts_open_without_this_package(exports: Path, hub: Hub, tmp_path: Path) -> None:
    """From a folder and from the hub; a whole pipeline, and the model alone."""
    push(exports / "expert", "me/expert", endpoint=hub.url, token="hf_none")
    expert = load_unet(exports / "mixture" / "experts" / "1")
    local, alone, remote = without_us(
        ("pipeline", str(exports / "expert"), None),
        ("model", str(exports / "mixture"), "experts/1"),
        ("pipeline", "me/expert", None),
        cache=tmp_path,
        endpoint=hub.url,
    )
    assert local[:2] == alone[:2] == remote[:2] == ["PrunedUNet2DConditionModel", expert.num_parameters()]
    assert alone[2].startswith("diffusers_modules.")
    # The same image as with the class that this package has.
    pipe = DiffusionPipeline.from_pretrained(exports / "expert", trust_remote_code=True)
    pipe.unet = expert
    pipe.set_progress_bar_config(disable=True)
    image = pipe("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    assert local[2] == remote[2] == pytest.approx(float(image.mean()), abs=1e-5)


def test_an_exported_mixture_draws_what_its_run_draws(exports: Path, run_dir: Path) -> None:
    ours, theirs = (MixturePipeline.from_pretrained(place)(TRAINING_PROMPTS, seed=3) for place in (run_dir, exports / "mixture"))
    assert ours.experts == theirs.experts and ours.similarity == theirs.similarity
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours.images, theirs.images, strict=True))


def test_an_export_holds_nothing_of_this_machine_and_no_second_copy(exports: Path) -> None:
    mixture = exports / "mixture"
    assert not list((mixture / "teacher" / "unet").glob("*.safetensors"))  # the experts replace it
    for part in ("experts/0", "experts/1"):
        files = {file.name for file in (mixture / part).iterdir()}
        assert files >= {"config.json", "diffusion_pytorch_model.safetensors", "pruned_model.py"}
        config = json.loads((mixture / part / "config.json").read_text())
        assert config["auto_map"] == {"AutoModel": "pruned_model.PrunedUNet2DConditionModel"}
        assert str(mixture.parent) not in json.dumps(config)
    index = json.loads((exports / "expert" / "model_index.json").read_text())
    assert index["unet"] == ["pruned_model", "PrunedUNet2DConditionModel"]
    assert (exports / "expert" / "unet" / "pruned_model.py").read_text() == (
        REPOSITORY / "aptp_ray" / "core" / "pruned_model.py"
    ).read_text()


def test_the_card_says_what_the_run_says(exports: Path, run_dir: Path) -> None:
    card = (exports / "mixture" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["license"] == "openrail++" and facts["pipeline_tag"] == "text-to-image"
    routing = json.loads((run_dir / "routing.json").read_text())
    for entry in routing["experts"]:
        assert f"| {entry['id']} | {entry['macs'] / 1e9:.2f} G | {entry['macs_ratio']:.1%} |" in text
    assert f"the budget was {routing['budget']:.1%}" in text and 'from_pretrained("me/mixture")' in text
    assert "openmoji, at 16 pixels" in text and "`openrail++`" in text
    single = (exports / "expert" / "README.md").read_text()
    assert (
        "not stated" in single and "license: other" in single and 'from_pretrained("me/expert", trust_remote_code=True)' in single
    )


def test_a_mixture_goes_to_the_hub_and_comes_back(exports: Path, hub: Hub, tmp_path: Path, run_dir: Path) -> None:
    where = {"endpoint": hub.url, "token": "hf_none"}
    url = push(exports / "mixture", "me/mixture", private=True, **where)
    assert url.startswith(f"{hub.url}/me/mixture/commit/")
    assert hub.made["me/mixture"].get("private", hub.made["me/mixture"].get("visibility")) in (True, "private")
    local = {str(f.relative_to(exports / "mixture")) for f in (exports / "mixture").rglob("*") if f.is_file()}
    assert set(hub.repos["me/mixture"]) == local
    pulled = pull("me/mixture", tmp_path / "pulled", **where)
    for name in local:
        assert (pulled / name).read_bytes() == (exports / "mixture" / name).read_bytes()
    # Straight from the hub, an expert comes when it is first needed.
    hub.downloads.clear()
    pipe = MixturePipeline.from_pretrained("me/mixture", cache_dir=tmp_path / "cache", **where)
    assert not any(name.startswith("experts/") for name in hub.downloads)
    ours = MixturePipeline.from_pretrained(run_dir)("red apple", seed=3)
    theirs = pipe("red apple", seed=3)
    assert np.array_equal(np.asarray(ours.images[0]), np.asarray(theirs.images[0]))
    fetched = {name.split("/")[1] for name in hub.downloads if name.startswith("experts/")}
    assert fetched == {str(theirs.experts[0])}
    with pytest.raises(RunDirError, match="is no mixture that"):
        hub.repos["me/other"] = {"README.md": b"nothing"}
        MixturePipeline.from_pretrained("me/other", cache_dir=tmp_path / "cache", **where)


def test_mistakes_are_named(run_dir: Path, tmp_path: Path) -> None:
    run, config = load_run(str(run_dir))
    with pytest.raises(ValueError, match=r"no expert 7; there are \[0, 1\]"):
        export_expert(run, config, 7, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(RunDirError, match="is no export"):
        push(tmp_path, "me/nothing", endpoint="http://127.0.0.1:9")


def test_half_precision_halves_the_weights(run_dir: Path, tmp_path: Path) -> None:
    run, config = load_run(str(run_dir))
    export_expert(run, config, 0, tmp_path / "half", dtype=torch.bfloat16, max_shard_size="60KB")
    shards = list((tmp_path / "half" / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    model = PrunedUNet2DConditionModel.from_pretrained(tmp_path / "half" / "unet", torch_dtype=torch.bfloat16)
    whole = load_unet(run_dir / "experts" / "0")
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.slow
def test_the_job_writes_an_export_and_one_line_of_json(run_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/export.py", str(run_dir), str(tmp_path / "out"), "--expert", "0"],
        capture_output=True, text=True, timeout=300, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.strip().splitlines()[-1])
    assert line["stage"] == "export" and line["experts"] == [0] and (tmp_path / "out" / "model_index.json").is_file()
    assert "licence was not stated" in done.stderr
