"""A published APTP checkpoint becomes a run directory that serves, exports and draws like any other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import Config, ConfigError
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from aptp_ray.hub import reference


def import_reference(checkpoint: Path, config: Config, run: RunDir) -> dict[str, Any]:
    """Writes ``teacher/``, ``router/``, ``experts/<k>/``, ``routing.json`` and ``imported.json``.

    Args:
        checkpoint: local folder of the published layout; see `reference.py`.
        config: ``teacher.source`` is the teacher that was pruned (Stable Diffusion 2.1), ``router.prompt_encoder`` the
            sentence encoder, ``data.resolution`` what MACs are counted at.
        run: where to write.

    Returns:
        What was written, and what could not be carried over exactly.

    Raises:
        FileNotFoundError: if a part of the checkpoint is missing.
        CheckpointError: if it is not of the published layout, or not of this teacher.
        ConfigError: if the config names no teacher.
    """
    source = _teacher_folder(config)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source, subfolder="unet"))
    space = ArchitectureSpace.of(unet)
    predictor_config, predictor = reference.read_folder(checkpoint / "hypernet")
    codes_config, codes = reference.read_folder(checkpoint / "quantizer")
    layout = reference.read_layout(space, unet, codes_config["structure"], codes_config.get("depth_order"))
    input_dim = int(predictor_config.get("input_dim", 768))
    weight, bias = reference.read_linear(predictor, layout.length, input_dim)
    logits = codes.get("embedding.weight")
    if logits is None or logits.shape != (codes_config["n_e"], layout.length):
        found = None if logits is None else list(logits.shape)
        raise reference.CheckpointError(f"quantizer: codes of shape {found}, not {[codes_config['n_e'], layout.length]}")
    folders = reference.expert_folders(checkpoint)
    if len(folders) != len(logits):
        raise reference.CheckpointError(f"{len(folders)} experts ({[f.name for f in folders]}) for {len(logits)} codes")
    hard = torch.stack([layout.masks(reference.read_vector(folder, layout.length)) for folder in folders])
    experts = [reference.build_expert(unet, space, code, folder) for code, folder in zip(hard, folders, strict=True)]

    vae = json.loads((Path(source) / "vae" / "config.json").read_text(encoding="utf-8"))
    side = config.data.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    macs = MacsModel.measure(unet, latent_size=(side, side), num_tokens=config.teacher.max_tokens, space=space)
    router = PromptRouter(
        space,
        z_dim=input_dim,
        num_codes=len(logits),
        hidden_dim=2 * input_dim,
        tau=float(codes_config.get("temperature", 0.4)),
        base=float(codes_config.get("base", 2)),
        centre=False,
        duals=False,
        macs=macs.to_dict(),
        generator=torch.Generator().manual_seed(0),
    )
    reference.linear_predictor(router, layout.logits(weight.T, missing=0.0).T, layout.logits(bias))
    with torch.no_grad():
        router.codes.copy_(layout.logits(logits))
    router.set_hard_codes(hard)
    router.attach(PromptEncoder.from_pretrained(resolve_source(config.router.prompt_encoder, config.storage_options)))
    return _write(run, config, Path(source), router, macs, experts, [str(f.relative_to(checkpoint)) for f in folders])


def _write(
    run: RunDir, config: Config, teacher: Path, router: PromptRouter, macs: MacsModel, experts: list[Any], origins: list[str]
) -> dict[str, Any]:
    run.prepare(config)
    with run.writing("teacher") as folder:
        shutil.copytree(teacher, folder, dirs_exist_ok=True)
    entries = []
    for k, expert in enumerate(experts):
        counted = count_macs(expert, latent_size=macs.latent_size, num_tokens=macs.num_tokens)
        entries.append({"id": k, "macs": counted, "macs_ratio": counted / macs.total, "share": 1 / len(experts)})
        with run.writing("experts", str(k)) as folder:
            expert.save_pretrained(folder)
            parameters = sum(p.numel() for p in expert.parameters())
            facts = {**entries[-1], "counted_macs": counted, "teacher_macs": macs.total, "parameters": parameters}
            (folder / "expert.json").write_text(json.dumps(facts | {"imported_from": origins[k]}, indent=2), encoding="utf-8")
    mean = sum(entry["macs_ratio"] for entry in entries) / len(entries)
    with run.writing("router") as folder:
        router.save_pretrained(folder)
    figures = {"experts": len(experts), "macs_ratio": mean, "not_exact": list(reference.NOT_EXACT)}
    run.write_json(figures, "imported.json")
    # Last: what serves and draws reads it first. The budget of the published run is not on record.
    run.write_json({"budget": mean, "macs_ratio": mean, "teacher_macs": macs.total, "experts": entries}, "routing.json")
    return figures


def _teacher_folder(config: Config) -> str:
    if config.teacher.source is None:
        raise ConfigError("teacher.source is not set: name the pipeline that the checkpoint was pruned from")
    resolved = resolve_source(config.teacher.source, config.storage_options)
    if os.path.isdir(resolved):
        return resolved
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.download(resolved, revision=config.teacher.revision, variant=config.teacher.variant))
