"""What a picture of the demo shows, read from the metadata of its row: the labels of heads, and the questions of a prompt.

The fields are those of the demo's shards (``subjects``, ``colors``, ``style``, ``kind``, ``count``); another data set that
writes them beside its captions is judged the same way. Rows without them have no questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STYLES = ("color", "line")
ARRANGEMENTS = ("1", "2", "3", "pair")
_ONE_LOOK = ("subjects", "colors", "style", "kind", "count")


@dataclass(frozen=True)
class Facts:
    """What a row says that its image shows.

    Attributes:
        subjects: one name, or two of a pair.
        color: the word that a single subject is asked in; None: its own colors, an outline, or a pair.
        style: one of :data:`STYLES`.
        arrangement: one of :data:`ARRANGEMENTS`.
        held_out: the axis on which training never showed the combination, or None.
        key: equal for two images of which the same captions are true.
    """

    subjects: tuple[str, ...]
    color: str | None
    style: str
    arrangement: str
    held_out: str | None
    key: str


def read_facts(metadata: str) -> Facts | None:
    """Reads a row's metadata; None where it does not have the fields.

    Args:
        metadata: the row's own JSON, or "".
    """
    fields = json.loads(metadata) if metadata else {}
    if not isinstance(fields, dict) or any(name not in fields for name in _ONE_LOOK):
        return None
    subjects, colors = tuple(fields["subjects"]), tuple(fields["colors"])
    pair = len(subjects) > 1
    told = [fields.get(name) for name in (*_ONE_LOOK, "ground", "position", "size")]
    return Facts(
        subjects=subjects,
        color=None if pair else colors[0],
        style=fields["style"],
        arrangement="pair" if pair else str(fields["count"]),
        held_out=fields.get("held_out"),
        key=json.dumps(told),
    )


@dataclass(frozen=True)
class Question:
    """One thing that a prompt asks for, and a head can answer.

    Attributes:
        name: "subject", "color", "style", "count" or "pair".
        expected: {head: the classes that must be its most likely ones}; all must hold.
    """

    name: str
    expected: dict[str, tuple[str, ...]]


def questions(facts: Facts) -> list[Question]:
    """What is asked of an image, after the tasks of GenEval (Ghosh et al. 2023): object, color, counting, two objects; style."""
    asked = [Question("style", {"style": (facts.style,)})]
    if facts.arrangement == "pair":
        return [*asked, Question("pair", {"subject": facts.subjects, "arrangement": ("pair",)})]
    asked += [
        Question("subject", {"subject": facts.subjects}),
        Question("count", {"arrangement": (facts.arrangement,)}),
    ]
    return asked if facts.color is None else [*asked, Question("color", {"color": (facts.color,)})]


def head_classes(facts: Sequence[Facts]) -> dict[str, list[str]]:
    """The classes that each head tells apart: all that training rows show."""
    return {
        "subject": sorted({subject for one in facts for subject in one.subjects}),
        "color": sorted({one.color for one in facts if one.color}),
        "style": list(STYLES),
        "arrangement": list(ARRANGEMENTS),
    }


def head_labels(facts: Facts) -> dict[str, tuple[str, ...]]:
    """The right classes of each head; a head without an entry is not asked about this row."""
    labels: dict[str, tuple[str, ...]] = {
        "subject": facts.subjects,
        "style": (facts.style,),
        "arrangement": (facts.arrangement,),
    }
    return labels if facts.color is None else labels | {"color": (facts.color,)}


def numbered(facts: Sequence[Facts]) -> list[int]:
    """Numbers of equal keys: rows with one number may bear each other's captions."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(one.key, len(numbers)) for one in facts]


def summary(values: dict[str, list[bool]]) -> dict[str, Any]:
    """{question: share that is right and number asked}, and the mean over questions, as GenEval's overall score."""
    found: dict[str, Any] = {
        name: {"right": sum(right) / len(right), "asked": len(right)} for name, right in sorted(values.items()) if right
    }
    shares = [entry["right"] for entry in found.values()]
    return {"questions": found, "overall": sum(shares) / len(shares) if shares else None}
