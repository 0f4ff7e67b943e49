"""The report as one HTML file: no script, no file beside it, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from aptp_ray.evaluate.cards import KINDS, cards
from aptp_ray.evaluate.comparison import comparison, tailoring
from aptp_ray.evaluate.grid import expert_color
from aptp_ray.evaluate.learned import learned
from aptp_ray.evaluate.style import CSS
from aptp_ray.evaluate.tried import tried
from aptp_ray.evaluate.widgets import bar, dot, duration, inline, section, si, span

Pairs = Sequence[tuple[Image.Image, Image.Image]]


def render_page(figures: dict[str, Any], pairs: Pairs, hardest: Sequence[dict[str, Image.Image]] = ()) -> str:
    """Returns the page of a report's figures.

    Args:
        figures: what ``report/report.json`` holds, see ``evaluate/report.py``.
        pairs: the teacher's and the expert's image of each sample.
        hardest: images of the hardest captions, {system: image}.
    """
    sections = [
        _header(figures),
        section("Samples", _samples_note(figures), _samples(figures, pairs)),
        comparison(figures["evaluation"]) if figures.get("evaluation") else "",
        tailoring(figures["needs"], figures.get("gains")) if figures.get("needs") else "",
        section("Experts", _experts_note(figures), _experts(figures)),
        cards(figures, pairs),
        learned(figures["hardness"], hardest) if figures.get("hardness") else "",
        section("What decides the route", _routing_note(figures), _routing(figures)),
        section("Where the compute goes", _sites_note(), _sites(figures)),
        section("How alike the experts are", "Share of entries in which two experts' codes agree.", _overlap(figures)),
        tried(figures.get("tried") or []),
        section("How it was made", "", _made(figures)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(figures['name'])}: report</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body><main>\n{''.join(sections)}</main></body>\n</html>\n"
    )


def _header(figures: dict[str, Any]) -> str:
    count, label = len(figures["experts"]), figures["routing"]["labels"][0]
    agree = figures["routing"]["captions"]["all_agree"]
    tiles = [
        (
            f"{figures['macs_ratio']:.1%}",
            f"of the teacher's MACs per image, by traffic (budget {figures['budget']:.0%})",
        ),
        (
            str(count),
            f"expert{'s' * (count != 1)}, {span([e['macs_ratio'] for e in figures['experts']])} of the teacher each",
        ),
        (
            f"{label['information']:.2f}",
            f"mutual information of expert and {escape(label['label'])} (shuffled: {label['shuffled']:.2f})",
        ),
    ]
    if agree is not None:
        tiles.append((f"{agree:.0%}", "of images have all their captions routed to one expert"))
    boxes = "".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in tiles)
    return (
        f"<header>\n<p class=eyebrow>APTP report</p>\n<h1>{escape(figures['name'])}</h1>\n"
        f"<p class=lead>A mixture of {count} pruned expert{'s' * (count != 1)} in place of one teacher "
        f"({escape(figures['teacher']['source'])}, {si(figures['teacher']['counted_macs'])} MACs, "
        f"{si(figures['teacher']['parameters'])} parameters). Every prompt goes to one expert.</p>\n"
        f"<div class=tiles>{boxes}</div>\n</header>\n"
    )


# -- samples ---------------------------------------------------------------------------------------------------------------


def _samples_note(figures: dict[str, Any]) -> str:
    sampling, similar = figures["sampling"], figures["similarity"]
    near = ""
    if similar["psnr"] is not None:
        near = f" Over these prompts, an expert's image is {similar['psnr']:.1f} dB (PSNR) from the teacher's"
        near += f"; an unrelated one is {similar['unrelated_psnr']:.1f} dB away." if similar["unrelated_psnr"] else "."
    return (
        f"Left the teacher, right the routed expert, from the same noise: {sampling['num_inference_steps']} steps of "
        f"{escape(sampling['scheduler'])}, guidance {sampling['guidance_scale']:g}, {sampling['resolution']} pixels.{near}"
    )


def _samples(figures: dict[str, Any], pairs: Pairs) -> str:
    cards = []
    for sample, (teacher, expert) in zip(figures["samples"], pairs, strict=True):
        prompt, index = escape(sample["prompt"]), sample["expert"]
        distance = "identical" if sample["psnr"] is None else f"{sample['psnr']:.1f} dB"
        cards.append(
            f'<figure title="seed {sample["seed"]}, {distance}"><div class=pair><img src="{inline(teacher)}" alt="{prompt}, teacher">'
            f'<img src="{inline(expert)}" alt="{prompt}, expert {index}"></div>'
            f"<figcaption>{prompt}<small>{dot(index)}expert {index}, {figures['experts'][index]['macs_ratio']:.0%} MACs</small>"
            "</figcaption></figure>"
        )
    return f"<div class=gallery>{''.join(cards)}</div>"


# -- experts ---------------------------------------------------------------------------------------------------------------


def _experts_note(figures: dict[str, Any]) -> str:
    height, width = figures["counted_at"]["latent_size"]
    equal = all(expert["macs"] == expert["counted_macs"] for expert in figures["experts"])
    verdict = (
        "The two agree to the integer for every expert." if equal else "<strong>They do not agree for every expert.</strong>"
    )
    return (
        f"MACs of one step for one image, at {height} &times; {width} latents and {figures['counted_at']['num_tokens']} tokens: "
        f"by the formula from the expert's code, and counted on the UNet in the run directory. {verdict}"
    )


def _experts(figures: dict[str, Any]) -> str:
    teacher = figures["teacher"]
    head = "".join(
        f"<th{'' if i else ' class=name'}>{text}</th>"
        for i, text in enumerate(
            [
                "",
                "MACs, formula",
                "MACs, counted",
                "of the teacher",
                "parameters",
                "validation prompts",
                "training rows",
            ]
        )
    )
    rows = [_expert_row("teacher", teacher, [f"{1:.1%}", si(teacher["parameters"]), "", ""])]
    for expert in figures["experts"]:
        cells = [
            f"{bar(expert['macs_ratio'], expert_color(expert['id']))}{expert['macs_ratio']:.1%}",
            si(expert["parameters"]),
            f"{expert['share']:.1%} <small>({expert['validation_prompts']:,})</small>",
            f"{expert['rows']:,}",
        ]
        rows.append(_expert_row(f"{dot(expert['id'])}expert {expert['id']}", expert, cells))
    mixture = f"<td colspan=2></td><td>{figures['macs_ratio']:.1%}</td><td></td><td>100%</td><td></td>"
    return (
        f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}"
        f"<tr class=total><td class=name>mixture</td>{mixture}</tr></tbody></table></div>"
    )


def _expert_row(name: str, facts: dict[str, Any], cells: list[str]) -> str:
    same = "&check;" if facts["macs"] == facts["counted_macs"] else "&cross;"
    macs = f"<td>{facts['macs']:,}</td><td>{facts['counted_macs']:,} <span class=mark>{same}</span></td>"
    return f"<tr><td class=name>{name}</td>{macs}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


# -- routing ---------------------------------------------------------------------------------------------------------------


def _routing_note(figures: dict[str, Any]) -> str:
    captions = figures["routing"]["captions"]
    text = f"{figures['routing']['prompts']:,} validation prompts, by the labels that the data carries (routing never sees them)."
    if captions["images"]:
        text += (
            f" Of {captions['images']:,} images with several captions, {captions['all_agree']:.1%} have all of them routed to one "
            f"expert; of pairs of captions of one image, {captions['pairs_agree']:.1%} "
            f"(pairs drawn at random: {captions['by_chance']:.1%})."
        )
    return text


def _routing(figures: dict[str, Any]) -> str:
    labels = figures["routing"]["labels"]
    rows = "".join(
        f"<tr><td class=name>{escape(label['label'])}</td><td>{label['values']}</td><td>{bar(label['information'])}{label['information']:.3f}</td>"
        f"<td>{label['shuffled']:.3f} <small>&plusmn; {label['shuffled_deviation']:.3f}</small></td></tr>"
        for label in labels
    )
    table = (
        "<div class=wide><table class=narrow><thead><tr><th class=name>label</th><th>values</th><th>mutual information with the expert, "
        f"normalized</th><th>labels shuffled</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
    legend = "".join(f"<span>{dot(expert['id'])}expert {expert['id']}</span>" for expert in figures["experts"])
    bars = "".join(
        f"<div class=stack><span>{escape(str(value)) or '(none)'}</span><div>{_stacked(counts)}</div><small>{sum(counts):,}</small></div>"
        for value, counts in [
            *labels[0]["counts"].items(),
            ("all", [e["validation_prompts"] for e in figures["experts"]]),
        ]
    )
    return f"{table}<h3>Where each {escape(labels[0]['label'])} goes</h3><p class=legend>{legend}</p>{bars}"


def _stacked(counts: list[int]) -> str:
    total = sum(counts)
    return "".join(
        f'<i style="width:{count / total:.4%};background:{expert_color(expert)}" title="expert {expert}: {count / total:.1%} ({count})"></i>'
        for expert, count in enumerate(counts)
        if count
    )


def _overlap(figures: dict[str, Any]) -> str:
    matrix = figures["routing"]["overlap"]
    head = "".join(f"<th>{dot(i)}{i}</th>" for i in range(len(matrix)))
    rows = "".join(
        f"<tr><td class=name>{dot(i)}expert {i}</td>"
        + "".join("<td>&ndash;</td>" if i == j else f"<td>{value:.1%}</td>" for j, value in enumerate(row))
        + "</tr>"
        for i, row in enumerate(matrix)
    )
    return f"<div class=wide><table class=narrow><thead><tr><th class=name></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


# -- where the compute goes ---------------------------------------------------------------------------------------------------


def _sites_note() -> str:
    return (
        "The UNet from input (left) to output (right). Each bar is a site; its width is its share of the teacher's MACs, and it is "
        "filled as far as the expert keeps it. The filled area of a strip is the expert's MACs ratio."
    )


def _sites(figures: dict[str, Any]) -> str:
    sites, fixed = figures["sites"]["sites"], figures["sites"]["fixed_macs"]
    total = fixed + sum(site["macs"] for site in sites)
    blocks: dict[str, int] = {}
    for site in sites:
        blocks[_block(site["name"])] = blocks.get(_block(site["name"]), 0) + site["macs"]
    blocks["not prunable"] = fixed
    axis = "".join(f'<span style="width:{macs / total:.4%}" title="{name}">{name}</span>' for name, macs in blocks.items())
    strips = "".join(
        f"<div class=strip><span>{dot(expert['id'])}expert {expert['id']}<small>{expert['macs_ratio']:.1%}</small></span>"
        f"{_strip(sites, fixed, total, expert['id'])}</div>"
        for expert in figures["experts"]
    )
    legend = "".join(f"<span><i class='dot {kind}'></i>{name}</span>" for kind, name in KINDS.items())
    legend += "<span><i class='dot fixed'></i>not prunable</span>"
    return f"<p class=legend>{legend}</p>{strips}<div class='strip axis'><span></span><div>{axis}</div></div>"


def _strip(sites: list[dict[str, Any]], fixed: int, total: int, expert: int) -> str:
    bars, x = [], 0.0
    everything = [*sites, {"name": "not prunable", "kind": "fixed", "macs": fixed, "kept": None}]
    for site in everything:
        width, kept = 1000 * site["macs"] / total, 1.0 if site["kept"] is None else site["kept"][expert]
        name = escape(f"{site['name']} ({KINDS.get(site['kind'], 'always there')}): {kept:.0%} kept")
        bars.append(
            f'<g class={site["kind"]}><title>{name}</title><rect class=all x="{x:.2f}" width="{width:.2f}" height="40"/>'
            f'<rect x="{x:.2f}" y="{40 * (1 - kept):.2f}" width="{width:.2f}" height="{40 * kept:.2f}"/></g>'
        )
        x += width
    label = f"expert {expert}: what is kept of every site"
    return f'<svg viewBox="0 0 1000 40" preserveAspectRatio="none" role="img" aria-label="{label}">{"".join(bars)}</svg>'


def _block(name: str) -> str:
    """``up_blocks.1.resnets.0`` -> ``up 1``."""
    stage, number = name.split(".")[:2]
    return "mid" if stage == "mid_block" else f"{stage.removesuffix('_blocks')} {number}"


# -- how it was made -----------------------------------------------------------------------------------------------------------


def _made(figures: dict[str, Any]) -> str:
    stages = "".join(
        f"<tr><td class=name>{escape(stage['name'])}</td><td>{duration(stage['seconds'])}</td><td>{escape(stage['finished_at'])}</td></tr>"
        for stage in figures["stages"]
    )
    stages = stages or "<tr><td class=name>no stage is recorded in manifest.json</td><td></td><td></td></tr>"
    packages = ", ".join(f"{escape(name)} {escape(version)}" for name, version in figures["versions"].items())
    return (
        "<div class=wide><table class=narrow><thead><tr><th class=name>stage</th><th>took</th><th>finished</th></tr></thead>"
        f"<tbody>{stages}</tbody></table></div><p class=note>{packages}</p>"
    )
