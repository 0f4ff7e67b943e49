"""The report's section on what the router learned: whether hard prompts get more MACs, and which are the hardest."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from aptp_ray.evaluate.widgets import dot, inline, section, table


def learned(found: dict[str, Any], images: Sequence[dict[str, Image.Image]]) -> str:
    """Returns the section.

    Args:
        found: from :func:`~aptp_ray.evaluate.hardness.hardness_figures`.
        images: of its hardest captions, {system: image}; may be empty.
    """
    rows = [[_what(one), _value(one["correlation"])] for one in found["measures"]]
    note = (
        f"Rank correlation (Spearman's), over {found['captions']:,} held-out captions, of the MACs of the expert that a caption "
        "is routed to with how hard it is; in brackets, 95 % intervals by bootstrap over captions. Above zero, hard prompts get "
        "more."
    )
    cells = "".join(_hard(one, drawn) for one, drawn in zip(found["hardest"], images, strict=True))
    body = table(["how hard a caption is", "correlation"], rows, narrow=True)
    return section(
        "Do hard prompts get more MACs?",
        f"{note} {_verdict(found['measures'][0])}",
        f"<div class=wrapped>{body}</div><h3>The hardest captions</h3><div class='gallery hard'>{cells}</div>",
    )


def _what(one: dict[str, Any]) -> str:
    system = escape(one["system"])
    return {
        "one_code": f"error of {system}, one pruned UNet for all captions, against the teacher's image",
        "random_routing": f"error of {system}, experts dealt at random, against the teacher's image",
        "one_expert": f"error of {system} against the teacher's image; it was fine-tuned on its own captions, so these look easy",
        "image_text": f"image-text score of the image by {system}, low is hard",
    }[one["kind"]]


def _value(correlation: dict[str, float] | None) -> str:
    if correlation is None:
        return "<small>all experts cost the same</small>"
    return f"{correlation['value']:.2f} <small>[{correlation['low']:.2f}, {correlation['high']:.2f}]</small>"


def _verdict(first: dict[str, Any]) -> str:
    correlation = first["correlation"]
    if correlation is None:
        return "<strong>No: all experts cost the same.</strong>"
    if correlation["low"] > 0:
        return "<strong>By the first measure they do.</strong>"
    if correlation["high"] < 0:
        return "<strong>By the first measure it is the easy ones that get more.</strong>"
    return "<strong>By the first measure, this cannot be told from chance.</strong>"


def _hard(one: dict[str, Any], drawn: dict[str, Image.Image]) -> str:
    prompt = escape(one["prompt"])
    images = "".join(
        f'<img src="{inline(image)}" alt="{prompt}, {escape(name)}" title="{escape(name)}">' for name, image in drawn.items()
    )
    cost = "" if one["macs_ratio"] is None else f", {one['macs_ratio']:.0%} MACs"
    if "image_text" in one:
        hard = f"image-text score {one['image_text']:.1f}"
    else:
        hard = "identical" if one["psnr"] is None else f"{one['psnr']:.1f} dB"
    pictures = f'<div class="pair" style="grid-template-columns:repeat({len(drawn)},1fr)">{images}</div>' if drawn else ""
    names = f"<small>{', '.join(escape(name) for name in drawn)}</small>" if drawn else ""
    return (
        f"<figure>{pictures}<figcaption>{prompt}<small>{dot(one['expert'])}expert {one['expert']}{cost}; {hard}</small>{names}"
        "</figcaption></figure>"
    )
