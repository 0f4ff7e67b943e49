"""Model cards of exports, from what a run directory says of itself: nothing in them is typed by hand."""

from __future__ import annotations

from typing import Any

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config

_PAPER = "https://arxiv.org/abs/2406.12042"


def mixture_card(run: RunDir, config: Config, *, licence: str | None, repo_id: str | None) -> str:
    """The card of a mixture.

    Args:
        run: the run directory.
        config: of the run.
        licence: of the teacher, as the hub names it; None: not known here.
        repo_id: where it will lie; None: a folder.
    """
    routing = run.read_json("routing.json")
    where = repo_id or "this/folder"
    lines = [
        *_front(config, licence),
        f"# {config.name}: a mixture of {len(routing['experts'])} pruned experts",
        "",
        f"A text-to-image model pruned by prompt into physically smaller experts ([APTP]({_PAPER})). A router sends each prompt",
        f"to one of them. The experts cost {routing['macs_ratio']:.1%} of the teacher's multiply-accumulates in the mean over",
        f"validation prompts; the budget was {routing['budget']:.1%}.",
        "",
        "## Use",
        "",
        "```python",
        "import aptp_ray",
        "",
        f'pipe = aptp_ray.MixturePipeline.from_pretrained("{where}")',
        'out = pipe(["a red apple"])',
        "out.images[0], out.experts[0]",
        "```",
        "",
        "One expert, without aptp_ray (the file beside its weights is run, so read it first):",
        "",
        "```python",
        "from diffusers import AutoModel",
        "",
        f'AutoModel.from_pretrained("{where}", subfolder="experts/0", trust_remote_code=True)',
        "```",
        "",
        "## Experts",
        "",
        *_table(run, routing),
        "",
        *_data(run, config),
        *_limits(run, config),
        *_licence(config, licence),
    ]
    return "\n".join(lines)


def expert_card(run: RunDir, config: Config, expert: int, *, licence: str | None, repo_id: str | None) -> str:
    """The card of one expert's pipeline; arguments as :func:`mixture_card`'s."""
    routing = run.read_json("routing.json")
    entry = next(entry for entry in routing["experts"] if entry["id"] == expert)
    lines = [
        *_front(config, licence),
        f"# {config.name}: expert {expert} of {len(routing['experts'])}",
        "",
        f"A text-to-image pipeline whose denoising model was pruned for a part of the prompts ([APTP]({_PAPER})): it costs",
        f"{entry['macs_ratio']:.1%} of the teacher's multiply-accumulates. {entry['share']:.1%} of the validation prompts are",
        "routed to it; on others it may do worse than the mixture would.",
        "",
        "## Use",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id or "this/folder"}", trust_remote_code=True)',
        f'pipe("a red apple", num_inference_steps={config.sampling.num_inference_steps}).images[0]',
        "```",
        "",
        "`trust_remote_code` runs the one file beside the weights that cuts diffusers' class to their shapes.",
        "",
        "## Expert",
        "",
        *_table(run, {**routing, "experts": [entry]}),
        "",
        *_data(run, config),
        *_limits(run, config),
        *_licence(config, licence),
    ]
    return "\n".join(lines)


def _front(config: Config, licence: str | None) -> list[str]:
    """The YAML that the hub reads."""
    lines = ["---", f"license: {licence or 'other'}"]
    source = _teacher(config)
    if source.count("/") == 1 and ":" not in source:  # a hub id
        lines += [f"base_model: {source}"]
    return [*lines, "pipeline_tag: text-to-image", "library_name: diffusers", "tags: [aptp, pruning]", "---", ""]


def _teacher(config: Config) -> str:
    return config.teacher.source or "trained from scratch by this run"


def _table(run: RunDir, routing: dict[str, Any]) -> list[str]:
    rows = [
        "| expert | MACs | of the teacher's | parameters | prompts routed to it | trained on | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in routing["experts"]:
        trained: dict[str, Any] = {}
        if run.exists("experts", str(entry["id"]), "expert.json"):
            trained = run.read_json("experts", str(entry["id"]), "expert.json")
        parameters = f"{trained['parameters'] / 1e6:.1f} M" if "parameters" in trained else "-"
        rows.append(
            f"| {entry['id']} | {entry['macs'] / 1e9:.2f} G | {entry['macs_ratio']:.1%} | {parameters} | {entry['share']:.1%} | "
            f"{trained.get('rows', '-')} rows | {trained.get('steps', '-')} |"
        )
    rows += ["", f"The teacher has {routing['teacher_macs'] / 1e9:.2f} G MACs for one step of one image at {_at(run)}."]
    if run.exists("report", "report.json"):
        similarity = run.read_json("report", "report.json")["similarity"]
        line = f"From the same noise, an expert's image is {similarity['psnr']:.1f} dB PSNR from the teacher's"
        unrelated = similarity.get("unrelated_psnr")
        rows += ["", line + ("." if unrelated is None else f" ({unrelated:.1f} dB for an unrelated prompt's image).")]
    return rows


def _at(run: RunDir) -> str:
    macs = run.read_json("router", "config.json").get("macs")
    if macs is None:
        return "the resolution of its run"
    return f"{macs['latent_size'][0]}x{macs['latent_size'][1]} latents with {macs['num_tokens']} tokens"


def _data(run: RunDir, config: Config) -> list[str]:
    encoded = run.manifest()["stages"].get("encode", {})
    counts = [
        f"{encoded[split]['rows']} rows for {'training' if split == 'train' else 'validation'}"
        f" ({encoded[split]['rejected']} rejected)"
        for split in ("train", "validation")
        if split in encoded
    ]
    source = config.data.source.model_dump(mode="json")
    name = next((source[key] for key in ("name", "repo", "dataset") if isinstance(source.get(key), str)), None)
    what = source["kind"] + (f" `{name}`" if name else "")
    return [
        "## Data",
        "",
        f"Source: {what}, at {config.data.resolution} pixels" + (f"; {', '.join(counts)}." if counts else "."),
        "",
    ]


def _limits(run: RunDir, config: Config) -> list[str]:
    return [
        "## Limits",
        "",
        f"- Made and measured at {config.data.resolution} pixels with {config.sampling.num_inference_steps} steps of "
        f"{config.sampling.scheduler} at guidance {config.sampling.guidance_scale:g}; other settings were not.",
        "- What the teacher cannot draw, or draws with a bias, its experts do no better.",
        "- Prompts unlike those of the data above are routed as if they were like some of them.",
        "",
    ]


def _licence(config: Config, licence: str | None) -> list[str]:
    known = f"`{licence}`" if licence else "not stated when this was exported: see the teacher's own page"
    return [
        "## Licence",
        "",
        f"The weights are derived from the teacher ({_teacher(config)}), whose licence holds for them: {known}.",
        "",
    ]
