"""The report stage: figures of a finished run, a sheet of samples, and the page that shows both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from aptp_ray.artifacts import RunDir, RunDirError, resolve_source, versions
from aptp_ray.config import Config
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.router import PromptRouter
from aptp_ray.data.schema import CAPTION, EXPERT
from aptp_ray.evaluate import measures
from aptp_ray.evaluate.captions import read_evaluated
from aptp_ray.evaluate.cards import card_figures
from aptp_ray.evaluate.evaluation import SCORES
from aptp_ray.evaluate.gains import gains
from aptp_ray.evaluate.generate import Drawn, Sample, draw_samples
from aptp_ray.evaluate.grid import expert_color, grid_of
from aptp_ray.evaluate.hardness import hardest_images, hardness_figures
from aptp_ray.evaluate.needs import NEEDS
from aptp_ray.evaluate.page import render_page
from aptp_ray.evaluate.prompts import ALTERNATE_EXPERTS, labels_of, similarity_of, validation_rows
from aptp_ray.evaluate.tried import TRIED, with_ratios

_GRID_COLUMNS = 6


def build_report(config: Config, run: RunDir, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Writes ``report/index.html``, ``report/report.json`` and ``images/samples.png``.

    Args:
        config: the whole tree.
        run: a run directory whose stages have finished up to fine-tuning.
        prompts: what teacher and experts draw; empty: the first validation captions.

    Returns:
        The report's main figures.

    Raises:
        RunDirError: if something that the stages before should have written is not there.
    """
    router = PromptRouter.from_pretrained(
        run.local("router"), prompt_encoder=resolve_source(config.router.prompt_encoder, config.storage_options)
    )
    if router.macs is None:
        raise RunDirError(f"{run.address('router')} does not say what its codes cost: make it with jobs/prune.py")
    macs = MacsModel.from_dict(router.macs)
    rows = validation_rows(run)
    chosen = list(prompts) or list(dict.fromkeys(rows.column(CAPTION).to_pylist()))[: config.report.num_prompts]
    drawn = draw_samples(
        config,
        run,
        chosen,
        router.route(chosen).expert.tolist(),
        latent_size=macs.latent_size,
        num_tokens=macs.num_tokens,
    )
    # Of the same run, as far as jobs/evaluate.py, jobs/needs.py and jobs/benchmark.py have been there.
    scores, needs, tried = (run.read_json(*parts) if run.exists(*parts) else None for parts in (SCORES, NEEDS, TRIED))
    routed = rows.column(EXPERT).to_pylist()
    hardness = hardness_figures(read_evaluated(run), scores)
    figures = {
        "name": config.name,
        **cost_figures(config, run, router, macs, routed, drawn),
        "cards": card_figures(rows.column(CAPTION).to_pylist(), routed, similarity_of(run, rows, router)),
        "routing": routing_figures(run, rows, router, seed=config.report.seed),
        "sites": site_figures(router, macs),
        **sample_figures(drawn.samples),
        "sampling": config.sampling.model_dump(mode="json") | {"resolution": config.data.resolution},
        "evaluation": scores,
        "needs": needs,
        "gains": gains(needs, scores, config.prune.budget) if needs else None,
        "hardness": hardness,
        "tried": with_ratios(tried) if tried else None,
        "stages": [
            {"name": name, "seconds": entry.get("seconds"), "finished_at": entry["finished_at"]}
            for name, entry in sorted(run.manifest()["stages"].items(), key=lambda item: item[1]["finished_at"])
            if name != "report"  # what an earlier report took says nothing about this one
        ],
        "versions": versions(),
    }
    sheet = sample_sheet(drawn.samples, [expert["macs_ratio"] for expert in figures["experts"]])
    run.write_bytes(_png(sheet), "images", "samples.png")
    pairs = [(Image.fromarray(s.teacher_image), Image.fromarray(s.expert_image)) for s in drawn.samples]
    hardest = hardest_images(run, hardness["hardest"]) if hardness else []
    run.write_bytes(render_page(figures, pairs, hardest).encode(), "report", "index.html")
    run.write_json(figures, "report", "report.json")  # last: it says that the report is whole
    return _summary(figures)


def cost_figures(
    config: Config, run: RunDir, router: PromptRouter, macs: MacsModel, routed: Sequence[int], drawn: Drawn
) -> dict[str, Any]:
    """What the mixture and each expert cost: by the codes' formula, and counted on the UNets that were loaded."""
    traffic = measures.shares(routed, router.num_codes)
    counts = np.bincount(routed, minlength=router.num_codes)
    experts = []
    for index, (code, model) in enumerate(zip(router.hard_codes, drawn.experts, strict=True)):
        trained = run.read_json("experts", str(index), "expert.json")
        experts.append(
            {
                "id": index,
                "macs": macs.exact(code),
                "counted_macs": model.counted_macs,
                "macs_ratio": model.counted_macs / drawn.teacher.counted_macs,
                "parameters": model.parameters,
                "share": float(traffic[index]),
                "validation_prompts": int(counts[index]),
                "rows": trained["rows"],
                "steps": trained["steps"],
                "train_seconds": trained["train_seconds"],
                "kept": _kept_by_kind(router, code),
            }
        )
    teacher = drawn.teacher.counted_macs
    return {
        "budget": config.prune.budget,
        "macs_ratio": measures.mixture_ratio([e["counted_macs"] for e in experts], teacher, traffic),
        "promised_macs_ratio": run.read_json("routing.json")["macs_ratio"],
        "teacher": {
            "source": config.teacher.source or "trained from scratch by this run",
            "macs": macs.total,
            "counted_macs": teacher,
            "parameters": drawn.teacher.parameters,
        },
        "counted_at": {"latent_size": list(macs.latent_size), "num_tokens": macs.num_tokens},
        "experts": experts,
    }


def routing_figures(run: RunDir, rows: pa.Table, router: PromptRouter, *, seed: int) -> dict[str, Any]:
    """What decides where validation prompts go, each figure beside what chance gives."""
    experts = rows.column(EXPERT).to_pylist()
    labels = []
    for name, values in labels_of(run, rows).items():
        control = measures.shuffled_control(values, experts, seed=seed)
        labels.append(
            {
                "label": name,
                "values": len(set(values)),
                "information": measures.normalized_mutual_information(values, experts),
                "shuffled": control.mean,
                "shuffled_deviation": control.deviation,
                "counts": measures.counts_by_label(values, experts, router.num_codes),
            }
        )
    return {
        "prompts": len(experts),
        "labels": labels,
        "captions": asdict(measures.caption_agreement(experts, rows.column(ALTERNATE_EXPERTS).to_pylist())),
        "overlap": measures.code_overlap(router.hard_codes.numpy()).tolist(),
    }


def site_figures(router: PromptRouter, macs: MacsModel) -> dict[str, Any]:
    """How each expert spends its MACs: the teacher's MACs of every site in forward order, and what is kept of each.

    A site inside a closed block keeps nothing, and what a block computes outside its width sites is its depth site's:
    the MACs weighted by ``kept``, and the fixed ones, add up to the expert's MACs.
    """
    effective = router.space.effective(router.hard_codes.double())  # [K, dim]
    cost = dict(zip((site.key for site in router.space.sites), macs.site_macs, strict=True))
    last = {site.block: site.key for site in router.space.width_sites if site.block}
    blocks = {site.name: site for site in router.space.depth_sites}
    # A depth site stands behind the last of the width sites that it removes, or at the end if it removes none.
    ordered = []
    for site in router.space.width_sites:
        ordered.append(site)
        if site.block and last[site.block] == site.key:
            ordered.append(blocks.pop(site.block))
    sites = [
        {
            "name": site.name,
            "kind": site.kind,
            "macs": cost[site.key] * site.width,
            "kept": effective[:, site.slice].mean(dim=1).tolist(),
        }
        for site in [*ordered, *blocks.values()]
    ]
    return {"fixed_macs": macs.fixed, "sites": sites}


def sample_figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """How near each expert's image is to the teacher's from the same noise, and how near an unrelated image is."""
    errors = [measures.rmse(sample.teacher_image, sample.expert_image) for sample in samples]
    # Against the teacher's image of the next prompt: what two pictures have in common anyway (a white ground).
    others = [*samples[1:], samples[0]]
    unrelated = [measures.rmse(b.teacher_image, a.expert_image) for a, b in zip(samples, others, strict=True)]
    return {
        "samples": [
            {"prompt": sample.prompt, "seed": sample.seed, "expert": sample.expert, "psnr": measures.psnr([error])}
            for sample, error in zip(samples, errors, strict=True)
        ],
        "similarity": {
            "psnr": measures.psnr(errors),
            "unrelated_psnr": measures.psnr(unrelated) if len(samples) > 1 else None,
        },
    }


def sample_sheet(samples: Sequence[Sample], ratios: Sequence[float]) -> Image.Image:
    """Each prompt's two images, the teacher's above its expert's."""
    return grid_of(
        [(Image.fromarray(sample.teacher_image), Image.fromarray(sample.expert_image)) for sample in samples],
        [sample.prompt for sample in samples],
        _GRID_COLUMNS,
        notes=[f"expert {sample.expert}, {ratios[sample.expert]:.0%} MACs" for sample in samples],
        note_colors=[expert_color(sample.expert) for sample in samples],
        row_labels=("teacher", "expert"),
    )


def _kept_by_kind(router: PromptRouter, code: torch.Tensor) -> dict[str, float]:
    """Share of the entries of each kind of site that an expert keeps; those in a closed block count as closed."""
    effective = router.space.effective(code.double())
    entries: dict[str, list[float]] = {}
    for site in router.space.sites:
        entries.setdefault(site.kind, []).extend(effective[site.slice].tolist())
    return {kind: float(np.mean(values)) for kind, values in entries.items()}


def _summary(figures: dict[str, Any]) -> dict[str, Any]:
    routing = figures["routing"]
    overlaps = [value for row, values in enumerate(routing["overlap"]) for value in values[:row]]
    return {
        "macs_ratio": round(figures["macs_ratio"], 5),
        "budget": figures["budget"],
        "largest_overlap": round(max(overlaps, default=0.0), 4),
        "information": {
            label["label"]: {"value": round(label["information"], 4), "shuffled": round(label["shuffled"], 4)}
            for label in routing["labels"]
        },
        "captions_agree": routing["captions"],
        "psnr": round(figures["similarity"]["psnr"], 2),
        "experts": [
            {
                "macs_ratio": round(e["macs_ratio"], 4),
                "share": round(e["share"], 4),
                "counted": e["macs"] == e["counted_macs"],
            }
            for e in figures["experts"]
        ],
        "page": "report/index.html",
        "images": "images/samples.png",
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
