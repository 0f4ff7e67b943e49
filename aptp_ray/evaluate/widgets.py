"""Small pieces of the report page: marks, figures, tables, images inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from aptp_ray.evaluate.grid import enlarge, expert_color

# A page shows images at this size; larger ones are scaled down and stored as JPEG, which keeps the file small.
_SIDE = 256


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, narrow: bool = False, last: str = "") -> str:
    """Returns a table whose first column holds names; ``last`` is a whole row of HTML."""
    heads = "".join(f"<th{'' if i else ' class=name'}>{text}</th>" for i, text in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{'' if i else ' class=name'}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    kind = " class=narrow" if narrow else ""
    return f"<div class=wide><table{kind}><thead><tr>{heads}</tr></thead><tbody>{body}{last}</tbody></table></div>"


def section(title: str, note: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{f'<p class=note>{note}</p>' if note else ''}\n{body}\n</section>\n"


def inline(image: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(image.size) > _SIDE:
        enlarge(image, _SIDE).save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    else:
        image.convert("RGB").save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def dot(expert: int) -> str:
    return f'<i class=dot style="background:{expert_color(expert)}"></i>'


def bar(share: float, color: str = "currentColor") -> str:
    return f'<i class=bar><i style="width:{min(share, 1.0):.2%};background:{color}"></i></i>'


def span(values: list[float]) -> str:
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low.rstrip('%')} to {high}"


def si(count: int) -> str:
    """1,234,567 -> 1.23 M."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
