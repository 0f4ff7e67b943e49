"""A run directory's mixture, or one expert of it, as folders that open elsewhere; and their way to the hub and back.

A mixture: ``mixture.json``, ``routing.json``, ``router/``, ``prompt_encoder/``, ``teacher/`` (a diffusers pipeline without its
UNet), ``experts/<k>/`` (diffusers models) and a model card. An expert: a whole diffusers pipeline. Models bring the one
Python file that diffusers needs to open them without this package.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source
from aptp_ray.config import Config
from aptp_ray.core.backbones import bare
from aptp_ray.core.components import denoiser_part, load_unet
from aptp_ray.hub.card import expert_card, mixture_card
from aptp_ray.hub.places import MIXTURE_FILE, MIXTURE_FORMAT, Facts
from aptp_ray.storage import replacing_folder

# What models and tokenizers are made of; other formats of the same weights stay behind.
_MODEL_FILES = (".json", ".txt", ".model", ".safetensors")


def export_mixture(
    run: RunDir,
    config: Config,
    target: str | Path,
    *,
    licence: str | None = None,
    experts: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float32,
    repo_id: str | None = None,
    max_shard_size: str = "10GB",
) -> dict[str, Any]:
    """Writes a finished run's mixture into a folder; one that is there is replaced.

    Args:
        run: a run directory whose fine-tuning has finished.
        config: of the run.
        target: the folder.
        licence: of the teacher, as the hub names it (``creativeml-openrail-m``); the experts are derived from it.
        experts: their ids; None: all.
        dtype: of the experts' weights.
        repo_id: where the folder will be pushed; stands in the card's examples.
        max_shard_size: of a weight file.

    Returns:
        ``{"folder", "experts", "bytes"}``.

    Raises:
        RunDirError: if a part of the run is missing.
        ValueError: if there is no such expert.
    """
    facts = Facts.of(run, config)
    known = [entry["id"] for entry in facts.routing["experts"]]
    chosen = known if experts is None else sorted(set(experts))
    _check_experts(chosen, known)
    with replacing_folder(Path(target)) as folder:
        described = {key: value for key, value in vars(facts).items() if key != "routing"}
        _write_json(folder / MIXTURE_FILE, {"format": MIXTURE_FORMAT, **described})
        _write_json(folder / "routing.json", facts.routing)
        shutil.copytree(run.local("router"), folder / "router")
        _copy_model(_model_folder(config.router.prompt_encoder, config.storage_options), folder / "prompt_encoder")
        _copy_pipeline(Path(run.local("teacher")), folder / "teacher")
        for k in chosen:
            _save_expert(run, k, folder / "experts" / str(k), dtype, max_shard_size)
        for parts in (("images", "samples.png"), ("report", "report.json")):
            if run.exists(*parts):
                (folder / parts[-1]).write_bytes(run.read_bytes(*parts))
        (folder / "README.md").write_text(mixture_card(run, config, licence=licence, repo_id=repo_id), encoding="utf-8")
    return {"folder": str(target), "experts": chosen, "bytes": _bytes_in(Path(target))}


def export_expert(
    run: RunDir,
    config: Config,
    expert: int,
    target: str | Path,
    *,
    licence: str | None = None,
    dtype: torch.dtype = torch.float32,
    repo_id: str | None = None,
    max_shard_size: str = "10GB",
) -> dict[str, Any]:
    """Writes one expert as a whole pipeline: ``DiffusionPipeline.from_pretrained(target, trust_remote_code=True)``.

    Args:
        run: see :func:`export_mixture`, for the others, too.
        config: of the run.
        expert: its id.
        target: the folder.
        licence: of the teacher.
        dtype: of the expert's weights.
        repo_id: where the folder will be pushed.
        max_shard_size: of a weight file.

    Returns:
        ``{"folder", "experts", "bytes"}``.

    Raises:
        RunDirError: if a part of the run is missing.
        ValueError: if there is no such expert.
    """
    _check_experts([expert], [entry["id"] for entry in run.read_json("routing.json")["experts"]])
    with replacing_folder(Path(target)) as folder:
        teacher = Path(run.local("teacher"))
        _copy_pipeline(teacher, folder)
        index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
        part = denoiser_part(index)
        model = _save_expert(run, expert, folder / part, dtype, max_shard_size)
        index[part] = [type(model).__module__.rpartition(".")[2], type(model).__name__]
        _write_json(folder / "model_index.json", index)
        card = expert_card(run, config, expert, licence=licence, repo_id=repo_id)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return {"folder": str(target), "experts": [expert], "bytes": _bytes_in(Path(target))}


def push(folder: str | Path, repo_id: str, *, private: bool = True, revision: str | None = None, **hub: Any) -> str:
    """Uploads an exported folder to a model repository of the hub, which is made if it is not there.

    Args:
        folder: what one of the functions above wrote.
        repo_id: ``owner/name``.
        private: of a repository that is made now.
        revision: branch; None: the main one.
        hub: arguments of ``huggingface_hub.HfApi``, such as ``token`` and ``endpoint``.

    Returns:
        The commit's URL.

    Raises:
        RunDirError: if the folder is no export.
    """
    from huggingface_hub import HfApi

    root = Path(folder)
    if not ((root / MIXTURE_FILE).is_file() or (root / "model_index.json").is_file()):
        raise RunDirError(f"{root} is no export (it has neither {MIXTURE_FILE} nor model_index.json): write one first")
    api = HfApi(**hub)
    api.create_repo(repo_id, private=private, exist_ok=True)
    message = f"Upload {root.name} by aptp_ray"
    return str(api.upload_folder(repo_id=repo_id, folder_path=root, commit_message=message, revision=revision).commit_url)


def pull(repo_id: str, target: str | Path, *, revision: str | None = None, **hub: Any) -> Path:
    """Downloads a whole export from the hub into a folder.

    Raises:
        RunDirError: if the repository holds none.
    """
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(repo_id, revision=revision, local_dir=target, **hub))
    if not ((root / MIXTURE_FILE).is_file() or (root / "model_index.json").is_file()):
        raise RunDirError(f"{repo_id} on the hub is no export: it has neither {MIXTURE_FILE} nor model_index.json")
    return root


def _check_experts(chosen: list[int], known: list[int]) -> None:
    if unknown := [k for k in chosen if k not in known]:
        raise ValueError(f"there is no expert {unknown[0]}; there are {known}")


def _save_expert(run: RunDir, expert: int, target: Path, dtype: torch.dtype, max_shard_size: str) -> Any:
    """Writes an expert's model anew: in its own precision, with what opens it, without the paths of this machine."""
    source = Path(run.local("experts", str(expert)))
    model = bare(load_unet(source, dtype=dtype))
    model.register_to_config(_name_or_path="")
    model.save_pretrained(target, max_shard_size=max_shard_size)
    if (source / "expert.json").is_file():
        shutil.copyfile(source / "expert.json", target / "expert.json")
    return model


def _copy_pipeline(teacher: Path, target: Path) -> None:
    """Copies a pipeline without the part that experts replace; that part's config stays, for its shapes."""
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    part = denoiser_part(index)
    target.mkdir(parents=True, exist_ok=True)
    for entry in teacher.iterdir():
        if entry.is_dir() and entry.name != part and not entry.name.startswith("."):
            _copy_model(entry, target / entry.name)
        elif entry.name == "model_index.json" or entry.name.upper().startswith("LICENSE"):
            shutil.copyfile(entry, target / entry.name)
    (target / part).mkdir()
    shutil.copyfile(teacher / part / "config.json", target / part / "config.json")


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    files = [file for file in source.iterdir() if file.suffix in _MODEL_FILES]
    if not files:
        raise RunDirError(f"{source} holds no model (*.json, *.safetensors)")
    for file in files:
        shutil.copyfile(file, target / file.name)


def _model_folder(source: str, storage_options: dict[str, Any]) -> Path:
    """A local folder with a model, fetched from the hub where the source is a hub id."""
    resolved = resolve_source(source, storage_options)
    if os.path.isdir(resolved):
        return Path(resolved)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(resolved, allow_patterns=[f"*{suffix}" for suffix in _MODEL_FILES]))


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
