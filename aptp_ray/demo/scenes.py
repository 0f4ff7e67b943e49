"""What an image of the demo shows: a scene is a pure function of (seed, split, index), and so are its pixels.

Kinds: one subject in its own colors ("single"), in another color ("recolor") or as an outline ("line"); two or three of
the same ("count"); two different ones side by side ("pair"); one small one at a named place ("small").
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from aptp_ray.demo.drawing import LINE, fitted, parse_color, sprite
from aptp_ray.demo.subjects import BY_NAME, COLORS, SUBJECTS, Subject

SPLITS = ("train", "validation")
KINDS = {"single": 0.20, "recolor": 0.22, "line": 0.25, "count": 0.13, "pair": 0.14, "small": 0.06}
GROUNDS = {
    "white": "#ffffff",
    "yellow": "#fdf2a0",
    "green": "#d5ebb0",
    "blue": "#cbe8f8",
    "pink": "#fbd3de",
    "gray": "#dddddd",
}
GROUND_PROBABILITY = 0.25
PLACES = {
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "center": (0.5, 0.5),
}
# Above it a single subject may be called big, below it a small one may be called tiny.
BIG = 0.87
TINY = 0.36
# Shift of neighbors; centers are 0.48 apart and drawings at most 0.44 wide, so that they never touch.
_CLEAR = 0.008

# Which combinations the train split never shows: shares of all combinations of an axis, picked by hash, the same for
# every seed.
HELD_OUT = {"style": 0.05, "color": 0.10, "pair": 0.10}
VALIDATION_HELD_OUT = 1 / 3
_HELD_OUT_MIX = {"color": 0.45, "style": 0.25, "pair": 0.30}
_HELD_OUT_SALT = "openmoji-demo-31"
_KINDS_OF_AXIS = {
    "color": ("recolor", "recolor", "count", "small"),
    "style": ("line", "line", "count", "small"),
    "pair": ("pair",),
}

# Pixels at 64: thinner strokes turn gray.
_MINIMUM_STROKE = {"line": 1.6, "color": 1.3}


@dataclass(frozen=True)
class Item:
    """A subject's name and the color word that it is painted with (None: its own colors, or an outline)."""

    subject: str
    color: str | None = None


@dataclass(frozen=True)
class Place:
    """Center and greatest extent of a drawing, in fractions of the canvas."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Scene:
    """Everything that the pixels depend on, and the facts that a caption may tell.

    Attributes:
        kind: One of `KINDS`.
        style: "color" or "line".
        items: One item, or two for a pair, from left to right.
        places: Where drawings go; a count repeats its one item over them.
        ground: Key of `GROUNDS`.
        mirrored: Whether drawings are flipped left to right.
        size: "big", "tiny", "small" or None, when the word would be true.
        position: Key of `PLACES` for small subjects.
    """

    kind: str
    style: str
    items: tuple[Item, ...]
    places: tuple[Place, ...]
    ground: str = "white"
    mirrored: bool = False
    size: str | None = None
    position: str | None = None

    @property
    def count(self) -> int:
        """How many drawings of each item there are."""
        return len(self.places) if self.kind == "count" else 1

    @property
    def group(self) -> str:
        """Short label for reports: "color", "recolor", "line", or kind and style, such as "count-line"."""
        if self.kind in ("count", "pair", "small"):
            return f"{self.kind}-{self.style}"
        return "color" if self.kind == "single" else self.kind


def _is_held_out(axis: str, *words: str) -> bool:
    digest = hashlib.sha256("|".join((_HELD_OUT_SALT, axis, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT[axis] * 2**64


def held_out_axes(style: str, items: tuple[Item, ...]) -> tuple[str, ...]:
    """Axes on which a combination is kept from training: "style" (an outline), "color" (subject in a color), "pair"."""
    axes = []
    if style == "line" and any(_is_held_out("style", item.subject) for item in items):
        axes.append("style")
    # A red apple is no new combination to someone who has seen apples: own colors are never held out.
    if any(
        item.color and item.color != BY_NAME[item.subject].own and _is_held_out("color", item.subject, item.color)
        for item in items
    ):
        axes.append("color")
    if len(items) == 2 and _is_held_out("pair", *sorted(item.subject for item in items)):
        axes.append("pair")
    return tuple(axes)


def held_out(scene: Scene) -> str | None:
    """The axis on which a scene is held out of training, or None."""
    axes = held_out_axes(scene.style, scene.items)
    return axes[0] if axes else None


def generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """The generator of one image and purpose (0 content, 1 caption), independent of all others."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Draws the scene of one image.

    Train scenes are never held out; `VALIDATION_HELD_OUT` of the validation scenes are, each on exactly one axis.

    Args:
        seed: The data set's seed.
        split: "train" or "validation".
        index: Place in the split, from 0.

    Raises:
        ValueError: If the split is unknown.
    """
    rng = generator(seed, split, index, 0)
    axis = None
    if split == "validation" and rng.random() < VALIDATION_HELD_OUT:
        axis = str(rng.choice(list(_HELD_OUT_MIX), p=list(_HELD_OUT_MIX.values())))
        kind = str(rng.choice(_KINDS_OF_AXIS[axis]))
    else:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    wanted = () if axis is None else (axis,)
    # Rejection keeps the other facts' distribution; the rarest acceptance is 5 % (a held-out outline).
    while True:
        style, items = _sample_content(kind, axis, rng)
        if held_out_axes(style, items) == wanted:
            return _sample_layout(kind, style, items, rng)


def _sample_content(kind: str, axis: str | None, rng: np.random.Generator) -> tuple[str, tuple[Item, ...]]:
    if kind in ("single", "recolor"):
        style = "color"
    elif kind == "line" or axis == "style":
        style = "line"
    elif axis == "color":
        style = "color"
    else:
        style = "line" if rng.random() < 0.4 else "color"
    pool = [s for s in SUBJECTS if s.simple] if kind in ("count", "pair", "small") else list(SUBJECTS)
    recolored = kind == "recolor" or (axis == "color")
    if recolored:
        pool = [s for s in pool if s.paint]
    picked = [pool[i] for i in rng.choice(len(pool), size=2 if kind == "pair" else 1, replace=False)]
    items = []
    for subject in picked:
        painted = recolored or (style == "color" and kind != "single" and subject.paint and rng.random() < 0.6)
        items.append(Item(subject.name, str(rng.choice(COLORS)) if painted else None))
    return style, tuple(items)


def _sample_layout(kind: str, style: str, items: tuple[Item, ...], rng: np.random.Generator) -> Scene:
    ground = "white"
    if style == "color" and rng.random() < GROUND_PROBABILITY:
        worn = {item.color or BY_NAME[item.subject].own for item in items}
        ground = str(rng.choice([name for name in GROUNDS if name != "white" and name not in worn]))
    mirrored = kind in ("single", "recolor", "line") and bool(rng.random() < 0.3)
    size = position = None
    if kind == "small":
        extent = float(rng.uniform(0.30, 0.44))
        position = str(rng.choice(list(PLACES)))
        size = "tiny" if extent < TINY else "small"
        x, y = PLACES[position]
        places: tuple[Place, ...] = (Place(x + _jitter(rng, 0.02), y + _jitter(rng, 0.02), extent, extent),)
    elif kind == "count":
        places = _count_places(BY_NAME[items[0].subject], rng)
    elif kind == "pair":
        extent = float(rng.uniform(0.40, 0.44))
        places = tuple(Place(x + _jitter(rng, _CLEAR), 0.5 + _jitter(rng, 0.06), extent, 0.8) for x in (0.26, 0.74))
    else:
        extent = float(rng.uniform(0.70, 0.92))
        size = "big" if extent >= BIG else None
        slack = (0.98 - extent) / 2
        places = (Place(0.5 + _jitter(rng, slack), 0.5 + _jitter(rng, slack), extent, extent),)
    return Scene(kind, style, items, places, ground, mirrored, size, position)


def _jitter(rng: np.random.Generator, amount: float) -> float:
    return float(rng.uniform(-amount, amount))


def _count_places(subject: Subject, rng: np.random.Generator) -> tuple[Place, ...]:
    """Two side by side, or one above the other for wide subjects; three in a triangle."""
    if rng.random() < 0.5:
        outline = sprite(subject, LINE)
        extent = float(rng.uniform(0.40, 0.44))
        if outline.width > 1.25 * outline.height:
            return tuple(Place(0.5 + _jitter(rng, 0.05), y + _jitter(rng, _CLEAR), 0.8, extent) for y in (0.26, 0.74))
        return tuple(Place(x + _jitter(rng, _CLEAR), 0.5 + _jitter(rng, 0.05), extent, 0.8) for x in (0.26, 0.74))
    extent = float(rng.uniform(0.39, 0.43))
    centers = (
        ((0.5, 0.26), (0.26, 0.74), (0.74, 0.74)) if rng.random() < 0.5 else ((0.26, 0.26), (0.74, 0.26), (0.5, 0.74))
    )
    return tuple(Place(x + _jitter(rng, _CLEAR), y + _jitter(rng, _CLEAR), extent, extent) for x, y in centers)


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        image_size: Side of the square image in pixels.

    Returns:
        RGB image.
    """
    canvas = Image.new("RGB", (image_size, image_size), parse_color(GROUNDS[scene.ground]))
    items = scene.items if scene.kind == "pair" else scene.items * len(scene.places)
    for item, place in zip(items, scene.places, strict=True):
        look = LINE if scene.style == "line" else item.color
        box = (place.width * image_size, place.height * image_size)
        drawing = fitted(
            BY_NAME[item.subject], look, box, _MINIMUM_STROKE[scene.style] * image_size / 64, 2 * image_size
        )
        if scene.mirrored:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left = math.floor(place.x * image_size - drawing.width / 2 + 0.5)
        top = math.floor(place.y * image_size - drawing.height / 2 + 0.5)
        left = min(max(left, 0), image_size - drawing.width)
        top = min(max(top, 0), image_size - drawing.height)
        canvas.paste(drawing, (left, top), drawing)
    return canvas
