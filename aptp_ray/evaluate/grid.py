"""Sheets of images with captions under them, as one puts into a README."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Hues that stay apart from one another, on white and on black.
_COLORS = ("#4C6FFF", "#F0872B", "#1FA187", "#D6496B", "#8E63CE", "#B8930F", "#2F9FD0", "#738A2E")
_INK, _SOFT, _GROUND, _EDGE = "#1B1F27", "#6B7280", "#FFFFFF", "#E5E7EB"
_MARGIN, _GUTTER, _STACK_GAP = 32, 20, 8
_CAPTION_SIZE, _NOTE_SIZE, _LABEL_SIZE = 15, 13, 14
_DOT = 10

Stack = Image.Image | Sequence[Image.Image]


def expert_color(expert: int) -> str:
    """Returns the color in which an expert is drawn everywhere, as #rrggbb."""
    if expert < len(_COLORS):
        return _COLORS[expert]
    hue = expert * 0.61803398875 % 1.0  # the golden ratio never repeats a hue
    return "#{:02X}{:02X}{:02X}".format(*(round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.5, 0.6)))


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Resizes an image so that its longer side has ``side`` pixels."""
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def grid_of(
    images: Sequence[Stack],
    captions: Sequence[str],
    columns: int,
    *,
    notes: Sequence[str] | None = None,
    note_colors: Sequence[str] | None = None,
    row_labels: Sequence[str] = (),
    title: str = "",
    side: int | None = None,
) -> Image.Image:
    """Lays images out in rows, each over its caption.

    Args:
        images: what stands in each cell: one image, or several that stand one above the other.
        captions: text under each cell, wrapped; "" for none.
        columns: cells of a row.
        notes: a second text under each cell, smaller.
        note_colors: of a dot before each note.
        row_labels: names of the images of a stack, at the left of every row.
        title: a line above everything.
        side: pixels of a drawn image's longer side; by default 128 for images up to 128 pixels, else 256.

    Raises:
        ValueError: if there are no images, or the lists differ in length.
    """
    stacks = [[image] if isinstance(image, Image.Image) else list(image) for image in images]
    if not stacks or columns < 1:
        raise ValueError(f"{len(stacks)} images in {columns} columns: give one of each at least")
    given = {"captions": captions, "notes": notes, "note_colors": note_colors}
    for name, values in given.items():
        if values is not None and len(values) != len(stacks):
            raise ValueError(f"{len(values)} {name} for {len(stacks)} images")
    if side is None:
        side = 128 if max(max(image.size) for stack in stacks for image in stack) <= 128 else 256
    columns = min(columns, len(stacks))
    fonts = [ImageFont.load_default(size) for size in (_CAPTION_SIZE, _NOTE_SIZE, _LABEL_SIZE)]
    left = _MARGIN + (max(_width(fonts[2], label) for label in row_labels) + 16 if row_labels else 0)
    cells = [
        _cell(stack, captions[i], notes[i] if notes else "", note_colors[i] if note_colors else None, side, fonts)
        for i, stack in enumerate(stacks)
    ]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    top = _MARGIN + (34 if title else 0)
    sheet = Image.new(
        "RGB",
        (
            left + columns * side + (columns - 1) * _GUTTER + _MARGIN,
            top + sum(heights) + _GUTTER * (len(rows) - 1) + _MARGIN,
        ),
        _GROUND,
    )
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((_MARGIN, _MARGIN - 6), title, fill=_INK, font=ImageFont.load_default(20))
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (left + column * (side + _GUTTER), top))
        for index, label in enumerate(row_labels):
            middle = top + index * (side + _STACK_GAP) + side // 2
            draw.text((left - 14, middle), label, fill=_SOFT, font=fonts[2], anchor="rm")
        top += height + _GUTTER
    return sheet


def _cell(
    stack: list[Image.Image],
    caption: str,
    note: str,
    color: str | None,
    side: int,
    fonts: Sequence[ImageFont.ImageFont | ImageFont.FreeTypeFont],
) -> Image.Image:
    """One cell: its images, framed by a hairline (their ground is often white), caption and note under them."""
    lines = wrap(caption, side, fonts[0])
    dot = _DOT + 5 if color and note else 0
    note_lines = wrap(note, side - dot, fonts[1])
    caption_step, note_step = _CAPTION_SIZE + 4, _NOTE_SIZE + 4
    images_height = len(stack) * side + (len(stack) - 1) * _STACK_GAP
    text_height = 8 * bool(lines) + len(lines) * caption_step + 6 * bool(note_lines) + len(note_lines) * note_step
    cell = Image.new("RGB", (side, images_height + text_height), _GROUND)
    draw = ImageDraw.Draw(cell)
    top = 0
    for image in stack:
        drawn = enlarge(image, side)
        place = ((side - drawn.width) // 2, top + (side - drawn.height) // 2)
        cell.paste(drawn, place)
        draw.rectangle((*place, place[0] + drawn.width - 1, place[1] + drawn.height - 1), outline=_EDGE)
        top += side + _STACK_GAP
    top = images_height + 8
    for line in lines:
        draw.text((0, top), line, fill=_INK, font=fonts[0])
        top += caption_step
    top += 6 if lines else 0
    if dot and color:
        middle = top + note_step // 2 - 1
        draw.ellipse((0, middle - _DOT // 2, _DOT, middle + _DOT // 2), fill=color)
    for line in note_lines:
        draw.text((dot, top), line, fill=_SOFT, font=fonts[1])
        top += note_step
    return cell


def wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Breaks text into lines of at most ``width`` pixels, at spaces; inside a word only where it alone is too long."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if _width(font, joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while _width(font, word) > width and len(word) > 1:
            cut = next((n for n in range(len(word) - 1, 1, -1) if _width(font, word[:n]) <= width), 1)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def _width(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> int:
    return round(font.getlength(text))
