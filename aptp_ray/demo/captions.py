"""Captions of scenes: many natural templates, drawn independently of what the image shows.

A caption only says what is true: "big" only of a big subject, a ground only where there is one, no color word for own
colors. The independence matters: if templates went with contents, a router could learn the wording instead of the
picture.
"""

from __future__ import annotations

import re

import numpy as np

from aptp_ray.demo.scenes import Item, Scene
from aptp_ray.demo.subjects import BY_NAME

# {x} is the noun phrase with its ground and position.
COLOR_FRAMES = (
    "{x}", "{x}", "{x}", "{x}", "{x}", "{x}", "a picture of {x}", "picture of {x}", "an emoji of {x}",
    "an icon of {x}", "a cartoon of {x}", "clip art of {x}", "a colored drawing of {x}", "a color drawing of {x}",
    "a flat illustration of {x}", "an illustration of {x}", "a sticker of {x}", "a color picture of {x}",
    "{x}, in color", "{x}, emoji style", "{x}, flat colors", "a simple picture of {x}", "an image of {x}",
    "{x}, clip art", "emoji: {x}", "a colorful icon of {x}", "{x}, filled with color", "a cute color drawing of {x}",
    "an icon showing {x}", "emoji art of {x}", "a full color drawing of {x}",
    "a cartoon drawing of {x} with flat colors", "vector art of {x}", "a full color image of {x}",
    "{x}, color illustration",
)  # fmt: skip
LINE_FRAMES = (
    "a line drawing of {x}", "a line drawing of {x}", "line drawing of {x}", "line art of {x}", "{x}, line art",
    "line art: {x}", "black outline of {x}", "the outline of {x}", "an outline drawing of {x}", "outline of {x}",
    "{x}, outline only", "{x} in outline", "a black and white sketch of {x}",
    "a simple black and white sketch of {x}", "a sketch of {x} in black lines", "{x} drawn in black lines",
    "{x} drawn with a black pen", "an ink drawing of {x}", "{x}, black and white", "a coloring page of {x}",
    "a coloring book page with {x}", "an uncolored drawing of {x}", "{x} without any color", "{x}, no color",
    "a pen drawing of {x}", "contour drawing of {x}", "a black line icon of {x}", "black and white line art of {x}",
    "minimal line drawing of {x}", "{x}, just black lines", "a doodle of {x} in black ink",
)  # fmt: skip
# {b} is the bare noun phrase, {c} the color word.
_COLOR_FORMS = (
    "{c} {b}", "{c} {b}", "{c} {b}", "{c} {b}", "{c} {b}", "{c} {b}", "{b} in {c}", "{b} colored {c}",
    "{c}-colored {b}", "{b} painted {c}", "{c} {b}", "{c} {b}",
)  # fmt: skip
_GROUND_FORMS = (
    "on a {g} background", "on a {g} background", "with a {g} background", "against a {g} background",
    "on a pale {g} background", "in front of a {g} background", "on {g}", "on a light {g} ground",
)  # fmt: skip
_PAIR_FORMS = (
    "{l} next to {r}", "{l} next to {r}", "{l} and {r}", "{l} and {r}", "{l} beside {r}", "{l} to the left of {r}",
    "{r} to the right of {l}", "{l} and {r} side by side", "{l} on the left, {r} on the right",
)  # fmt: skip
_SIZE_FORMS = {"big": ("big", "large"), "small": ("small", "little"), "tiny": ("tiny", "very small")}
_CORNER_FORMS = ("in the {p} corner", "in the {p} corner", "at the {p}", "in the {q} corner", "at {p}")
_EDGE_FORMS = {
    "top": ("at the top", "near the top", "in the top half"),
    "bottom": ("at the bottom", "near the bottom", "in the bottom half"),
    "left": ("on the left", "on the left side", "at the left edge"),
    "right": ("on the right", "on the right side", "at the right edge"),
    "center": ("in the center", "in the middle", "at the center"),
}
NUMBERS = {2: "two", 3: "three"}
# Words and punctuation marks; MiniLM's tokenizer splits words of the vocabulary into at most six more pieces a caption,
# so that 22 WordPiece tokens are never exceeded.
_MAX_WORDS = 16


def with_article(phrase: str) -> str:
    """Puts "a" or "an" before a phrase."""
    # Of the vocabulary, only the hourglass does not go by its first letter.
    return f"{'an' if phrase.startswith(('a', 'e', 'i', 'o', 'u', 'hour')) else 'a'} {phrase}"


def captions(scene: Scene, rng: np.random.Generator, number: int = 3) -> list[str]:
    """Draws captions of one scene, each by another template.

    Args:
        scene: What the image shows.
        rng: Generator that is used for nothing else.
        number: How many; the first is the sample's caption, the others are alternates.

    Returns:
        Lower-case texts, each at most 22 WordPiece tokens of MiniLM's tokenizer.
    """
    frames = LINE_FRAMES if scene.style == "line" else COLOR_FRAMES
    used: dict[str, str] = {}
    while len(used) < number:
        frame = _pick(frames, rng)
        text = frame.format(x=_phrase(scene, rng))
        if frame not in used and text not in used.values() and len(re.findall(r"\w+|[^\w\s]", text)) <= _MAX_WORDS:
            used[frame] = text
    return list(used.values())


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _phrase(scene: Scene, rng: np.random.Generator) -> str:
    if scene.kind == "pair":
        left, right = (with_article(_noun(item, 1, None, rng)) for item in scene.items)
        phrase = _pick(_PAIR_FORMS, rng).format(l=left, r=right)
    else:
        size = None
        # Small subjects nearly always say so, or one could not tell them from single ones; "big" is said now and then.
        if scene.size is not None and rng.random() < (0.5 if scene.size == "big" else 0.85):
            size = _pick(_SIZE_FORMS[scene.size], rng)
        noun = _noun(scene.items[0], scene.count, size, rng)
        phrase = with_article(noun) if scene.count == 1 else f"{NUMBERS[scene.count]} {noun}"
    if scene.position is not None:
        phrase += " " + _position(scene.position, rng)
    if scene.ground != "white":
        phrase += " " + _pick(_GROUND_FORMS, rng).format(g=scene.ground)
    return phrase


def _noun(item: Item, count: int, size: str | None, rng: np.random.Generator) -> str:
    subject = BY_NAME[item.subject]
    noun = subject.name if count == 1 else subject.plural
    if item.color is None:
        return noun if size is None else f"{size} {noun}"
    form = _pick(_COLOR_FORMS, rng)
    return (f"{size} " if size else "") + form.format(b=noun, c=item.color)


def _position(position: str, rng: np.random.Generator) -> str:
    if position in _EDGE_FORMS:
        return _pick(_EDGE_FORMS[position], rng)
    other = position.replace("top", "upper").replace("bottom", "lower")
    return _pick(_CORNER_FORMS, rng).format(p=position, q=other)
