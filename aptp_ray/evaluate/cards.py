"""A card for each expert: what it costs and keeps, which prompts come to it, and what it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from aptp_ray.evaluate.grid import expert_color
from aptp_ray.evaluate.widgets import bar, dot, inline, section
from aptp_ray.evaluate.words import typical_words

KINDS = {
    "resnet": "ResNet groups",
    "attention": "attention heads",
    "feed_forward": "feed-forward chunks",
    "depth": "whole blocks",
}
_PROMPTS, _IMAGES = 5, 6


def card_figures(captions: Sequence[str], experts: Sequence[int], similarity: Tensor) -> list[dict[str, Any]]:
    """What a card tells beyond what an expert costs.

    Args:
        captions: held-out ones.
        experts: where each is routed.
        similarity: of each caption with each code, [captions, K].

    Returns:
        of each expert its typical ``words`` against the captions of all others, and the ``prompts`` nearest to its code of those
        routed to it (a caption may be near to this code and nearer to another), with their ``similarity``.
    """
    found = []
    for expert in range(similarity.shape[1]):
        own = [index for index, routed in enumerate(experts) if routed == expert]
        rest = [caption for caption, routed in zip(captions, experts, strict=True) if routed != expert]
        near = {captions[index]: float(similarity[index, expert]) for index in own}
        nearest = sorted(near.items(), key=lambda item: (-item[1], item[0]))[:_PROMPTS]
        found.append(
            {
                "id": expert,
                "words": [asdict(word) for word in typical_words([captions[index] for index in own], rest)],
                "prompts": [{"prompt": prompt, "similarity": round(value, 4)} for prompt, value in nearest],
            }
        )
    return found


def cards(figures: dict[str, Any], pairs: Sequence[tuple[Image.Image, Image.Image]]) -> str:
    """Returns the section.

    Args:
        figures: what ``report/report.json`` holds.
        pairs: the teacher's and the expert's image of each sample.
    """
    drawn: dict[int, list[tuple[str, Image.Image]]] = {}
    for sample, (_, image) in zip(figures["samples"], pairs, strict=True):
        drawn.setdefault(sample["expert"], []).append((sample["prompt"], image))
    body = "".join(
        _card(expert, card, drawn.get(expert["id"], [])[:_IMAGES])
        for expert, card in zip(figures["experts"], figures["cards"], strict=True)
    )
    note = (
        "Typical words: those that an expert's held-out captions have more often than all others (log-odds with a prior from all "
        "captions, in standard deviations; at least 1.96). Prompts: the nearest to its code of those routed to it, with their "
        "similarity. Images: the samples above that are its own."
    )
    return section("Each expert", note, f"<div class=cards>{body}</div>")


def _card(expert: dict[str, Any], card: dict[str, Any], drawn: Sequence[tuple[str, Image.Image]]) -> str:
    number, color = expert["id"], expert_color(expert["id"])
    kept = "".join(
        f"<li><span>{KINDS.get(kind, escape(kind))}</span><span>{bar(share, color)}{share:.0%}</span></li>"
        for kind, share in expert["kept"].items()
    )
    words = ", ".join(
        f'<span title="{word["own"]} times here, {word["other"]} elsewhere"><b>{escape(word["word"])}</b> '
        f"<small>{word['score']:.1f}</small></span>"
        for word in card["words"]
    )
    prompts = "".join(f"<li>{escape(one['prompt'])} <small>{one['similarity']:.2f}</small></li>" for one in card["prompts"])
    images = "".join(
        f'<img src="{inline(image)}" alt="{escape(prompt)}, expert {number}" title="{escape(prompt)}">' for prompt, image in drawn
    )
    words = words or _none("none stands out")
    prompts = f"<ul class=prompts>{prompts}</ul>" if prompts else f"<p>{_none('none is routed to it')}</p>"
    images = f"<div class=thumbs>{images}</div>" if images else f"<p>{_none('no sample is its own')}</p>"
    return (
        f'<article class=card style="border-top-color:{color}"><h3>{dot(number)}expert {number}</h3>'
        f"<p class=figures><span><b>{expert['share']:.1%}</b> of the prompts</span>"
        f"<span><b>{expert['macs_ratio']:.1%}</b> of the teacher's MACs</span></p>"
        f"<h4>Keeps</h4><ul class=kept>{kept}</ul>"
        f"<h4>Typical words</h4><p class=words>{words}</p><h4>Nearest prompts</h4>{prompts}<h4>Draws</h4>{images}</article>"
    )


def _none(text: str) -> str:
    return f"<small>{text}</small>"
