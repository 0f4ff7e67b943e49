"""The showcase: labels that training data itself confirms."""

from __future__ import annotations

from collections import Counter

import pytest

from aptp_ray.demo.prompts import SHOWCASE
from aptp_ray.demo.scenes import sample_scene
from aptp_ray.demo.subjects import BY_NAME


@pytest.fixture(scope="module")
def shown() -> Counter:
    """Combinations in 20000 train scenes: (subject, color or "line") and unordered pairs."""
    combinations: Counter = Counter()
    for index in range(20000):
        scene = sample_scene(0, "train", index)
        for item in scene.items:
            combinations[item.subject, "line" if scene.style == "line" else item.color] += 1
        if scene.kind == "pair":
            combinations[frozenset(item.subject for item in scene.items)] += 1
    return combinations


def test_twenty_four_prompts_cover_all_kinds():
    assert len({prompt.text for prompt in SHOWCASE}) == len(SHOWCASE) == 24
    groups = {"color", "recolor", "line"} | {
        f"{kind}-{style}" for kind in ("count", "pair", "small") for style in ("color", "line")
    }
    assert {prompt.group for prompt in SHOWCASE} == groups
    assert Counter(prompt.held_out for prompt in SHOWCASE).keys() == {None, "color", "style", "pair"}
    assert 6 <= sum(prompt.held_out is not None for prompt in SHOWCASE) <= 12


@pytest.mark.parametrize("prompt", SHOWCASE, ids=lambda prompt: prompt.text)
def test_held_out_labels_are_true_of_the_train_split(prompt, shown):
    combinations = [(item.subject, "line" if prompt.style == "line" else item.color) for item in prompt.items]
    if prompt.held_out == "pair":
        assert shown[frozenset(item.subject for item in prompt.items)] == 0
    elif prompt.held_out is not None:
        assert any(shown[combination] == 0 for combination in combinations)
    else:
        assert all(shown[combination] > 0 for combination in combinations)


def test_prompts_name_their_subjects_and_colors():
    for prompt in SHOWCASE:
        for item in prompt.items:
            subject = BY_NAME[item.subject]
            assert subject.name in prompt.text or subject.plural in prompt.text
            assert item.color is None or item.color in prompt.text
