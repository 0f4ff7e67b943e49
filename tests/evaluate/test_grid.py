"""Sheets: every image is where it belongs, text fits, nothing is cut off."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from aptp_ray.evaluate.grid import enlarge, expert_color, grid_of, wrap

COLORS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff"]


def flat(color: str, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), color)


def where(sheet: Image.Image, color: str) -> tuple[float, float, int]:
    """Middle (x, y) and number of the pixels of a color."""
    wanted = np.array(Image.new("RGB", (1, 1), color))[0, 0]
    rows, columns = np.nonzero((np.asarray(sheet) == wanted).all(axis=2))
    return float(columns.mean()), float(rows.mean()), len(rows)


def test_cells_run_along_rows() -> None:
    sheet = grid_of([flat(color) for color in COLORS], [""] * 5, 3, side=40)
    places = [where(sheet, color) for color in COLORS]
    assert [count for _, _, count in places] == [38 * 38] * 5  # all but the hairline frame
    x, y = [place[0] for place in places], [place[1] for place in places]
    assert x[0] < x[1] < x[2] and y[0] == y[1] == y[2] < y[3] == y[4]
    assert (x[3], x[4]) == (x[0], x[1])


def test_stacks_stand_one_above_the_other() -> None:
    sheet = grid_of([(flat(COLORS[0]), flat(COLORS[1]))], ["a caption"], 6, side=40, row_labels=("teacher", "expert"))
    (upper_x, upper_y, _), (lower_x, lower_y, _) = where(sheet, COLORS[0]), where(sheet, COLORS[1])
    assert upper_x == lower_x and upper_y < lower_y


def test_text_stays_inside_the_margin() -> None:
    captions = ["a sketch of a tiny star at the bottom right in black lines", "incomprehensibilities" * 3, ""]
    sheet = grid_of([flat(color) for color in COLORS[:3]], captions, 3, notes=["expert 1, 63% MACs"] * 3, title="Samples")
    pixels = np.asarray(sheet)
    for edge in (pixels[:16], pixels[-16:], pixels[:, :16], pixels[:, -16:]):
        assert (edge == 255).all()


def test_lines_are_no_wider_than_the_cell_and_lose_no_word() -> None:
    font = ImageFont.load_default(15)
    text = "three yellow stars on a blue background and one more"
    lines = wrap(text, 128, font)
    assert " ".join(lines) == text and len(lines) > 1
    assert all(font.getlength(line) <= 128 for line in lines)
    broken = wrap("x" * 80, 128, font)
    assert "".join(broken) == "x" * 80 and all(font.getlength(line) <= 128 for line in broken)
    assert wrap("", 128, font) == []


def test_sizes() -> None:
    assert enlarge(Image.new("RGB", (32, 64)), 128).size == (64, 128)
    small, large = grid_of([flat("red", 64)], [""], 1), grid_of([flat("red", 512)], [""], 1)
    assert large.width - small.width == 128


def test_experts_have_colors_of_their_own() -> None:
    assert len({expert_color(expert) for expert in range(32)}) == 32


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        grid_of([flat("red"), flat("red")], ["one"], 2)
    with pytest.raises(ValueError, match="0 images"):
        grid_of([], [], 2)
