"""Prompts for grids and reports: every kind of scene, seen in training and held out of it."""

from __future__ import annotations

from dataclasses import dataclass

from aptp_ray.demo.scenes import Item, held_out_axes


@dataclass(frozen=True)
class ShowcasePrompt:
    """A prompt and what it asks for.

    Attributes:
        text: The prompt.
        group: The label that a scene of this kind carries, see `Scene.group`.
        style: "color" or "line".
        items: Subjects, and the colors they are asked in.
    """

    text: str
    group: str
    style: str
    items: tuple[Item, ...]

    @property
    def held_out(self) -> str | None:
        """Axis on which training never showed this combination, or None; from the same hash that keeps it out."""
        axes = held_out_axes(self.style, self.items)
        return axes[0] if axes else None


def _prompt(text: str, group: str, style: str, *items: str | tuple[str, str]) -> ShowcasePrompt:
    parsed = tuple(Item(item) if isinstance(item, str) else Item(*item) for item in items)
    return ShowcasePrompt(text, group, style, parsed)


SHOWCASE: tuple[ShowcasePrompt, ...] = (
    _prompt("a cat", "color", "color", "cat"),
    _prompt("an emoji of a rocket", "color", "color", "rocket"),
    _prompt("a picture of a strawberry", "color", "color", "strawberry"),
    _prompt("a house on a yellow background", "color", "color", "house"),
    _prompt("a blue cat", "recolor", "color", ("cat", "blue")),
    _prompt("a green heart on a pink background", "recolor", "color", ("heart", "green")),
    _prompt("an umbrella colored red", "recolor", "color", ("umbrella", "red")),
    _prompt("a purple cat", "recolor", "color", ("cat", "purple")),
    _prompt("a blue octopus", "recolor", "color", ("octopus", "blue")),
    _prompt("a red horse on a blue background", "recolor", "color", ("horse", "red")),
    _prompt("a line drawing of an umbrella", "line", "line", "umbrella"),
    _prompt("black outline of a house", "line", "line", "house"),
    _prompt("a simple black and white sketch of a dog", "line", "line", "dog"),
    _prompt("a line drawing of a banana", "line", "line", "banana"),
    _prompt("line art of a whale", "line", "line", "whale"),
    _prompt("two purple fish", "count-color", "color", ("fish", "purple")),
    _prompt("three yellow stars on a blue background", "count-color", "color", ("star", "yellow")),
    _prompt("line art: three mushrooms", "count-line", "line", "mushroom"),
    _prompt("three blue lemons", "count-color", "color", ("lemon", "blue")),
    _prompt("a cat next to a green car", "pair-color", "color", "cat", ("car", "green")),
    _prompt("a line drawing of a moon and a rocket", "pair-line", "line", "moon", "rocket"),
    _prompt("a dog next to a house", "pair-color", "color", "dog", "house"),
    _prompt("a small red heart in the top left corner", "small-color", "color", ("heart", "red")),
    _prompt("a sketch of a tiny star at the bottom right in black lines", "small-line", "line", "star"),
)
