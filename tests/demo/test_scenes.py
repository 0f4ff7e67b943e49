"""Scenes: pure functions of (seed, split, index), held-out combinations kept apart, and pixels that show the facts."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from aptp_ray.demo.drawing import parse_color
from aptp_ray.demo.scenes import (
    BIG,
    GROUNDS,
    KINDS,
    PLACES,
    Item,
    Place,
    Scene,
    held_out,
    held_out_axes,
    render,
    sample_scene,
)
from aptp_ray.demo.subjects import BY_NAME, COLORS, SUBJECTS

NUMBER = 6000


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return [sample_scene(0, "train", index) for index in range(NUMBER)]


@pytest.fixture(scope="module")
def validation() -> list[Scene]:
    return [sample_scene(0, "validation", index) for index in range(1500)]


def _hash_share(*words: str) -> float:
    """The documented rule, written again: sha256 of salt and words, its first 64 bits as a fraction."""
    digest = hashlib.sha256("|".join(("openmoji-demo-31", *words)).encode()).hexdigest()
    return int(digest[:16], 16) / 2**64


def _oracle_axes(scene: Scene) -> set[str]:
    axes = set()
    for item in scene.items:
        if scene.style == "line" and _hash_share("style", item.subject) < 0.05:
            axes.add("style")
        if (
            item.color not in (None, BY_NAME[item.subject].own)
            and _hash_share("color", item.subject, item.color) < 0.10
        ):
            axes.add("color")
    if len(scene.items) == 2 and _hash_share("pair", *sorted(item.subject for item in scene.items)) < 0.10:
        axes.add("pair")
    return axes


def _ink(scene: Scene, size: int = 64) -> np.ndarray:
    ground = np.array(parse_color(GROUNDS[scene.ground]))
    return np.abs(np.asarray(render(scene, size)).astype(int) - ground).max(-1) > 30


def test_a_scene_depends_on_seed_split_and_index_alone(train):
    assert sample_scene(0, "train", 4321) == train[4321]
    different = [sample_scene(1, "train", 5), sample_scene(0, "validation", 5), sample_scene(0, "train", 6)]
    assert all(scene != train[5] for scene in different)
    assert render(train[7]).tobytes() == render(sample_scene(0, "train", 7)).tobytes()
    with pytest.raises(ValueError, match="'test'"):
        sample_scene(0, "test", 0)


def test_train_never_shows_a_held_out_combination(train):
    assert all(not _oracle_axes(scene) and held_out(scene) is None for scene in train)


def test_a_third_of_validation_is_held_out_each_on_one_axis(validation):
    axes = [_oracle_axes(scene) for scene in validation]
    assert all(len(found) <= 1 for found in axes)
    assert [held_out(scene) for scene in validation] == [next(iter(found), None) for found in axes]
    counts = Counter(held_out(scene) for scene in validation)
    assert set(counts) == {None, "color", "style", "pair"}
    # Four standard deviations of a binomial share of 1/3 over 1500.
    assert abs(1 - counts[None] / len(validation) - 1 / 3) < 4 * np.sqrt(2 / 9 / 1500)


def test_about_the_stated_shares_of_combinations_are_held_out():
    outlines = np.mean([bool(held_out_axes("line", (Item(s.name),))) for s in SUBJECTS])
    colors = np.mean([bool(held_out_axes("color", (Item(s.name, c),))) for s in SUBJECTS for c in COLORS if c != s.own])
    names = [s.name for s in SUBJECTS]
    pairs = np.mean([bool(held_out_axes("color", (Item(a), Item(b)))) for a in names for b in names if a < b])
    assert 0.03 <= outlines <= 0.08
    assert colors == pytest.approx(0.10, abs=0.03)
    assert pairs == pytest.approx(0.10, abs=0.01)


def test_pairs_are_held_out_in_either_order():
    for a in SUBJECTS[:20]:
        for b in SUBJECTS[20:40]:
            assert held_out_axes("line", (Item(a.name), Item(b.name))) == held_out_axes(
                "line", (Item(b.name), Item(a.name))
            )


def test_kinds_have_their_weights(train):
    counts = Counter(scene.kind for scene in train)
    for kind, weight in KINDS.items():
        assert abs(counts[kind] / NUMBER - weight) < 4 * np.sqrt(weight * (1 - weight) / NUMBER), kind


def test_facts_agree_with_the_kind(train):
    for scene in train:
        assert len(scene.items) == (2 if scene.kind == "pair" else 1)
        assert (scene.position is not None) == (scene.kind == "small")
        assert scene.style == "line" or scene.kind != "line"
        if scene.style == "line":
            assert scene.ground == "white" and all(item.color is None for item in scene.items)
        if scene.kind == "count":
            assert scene.count in (2, 3)
        if scene.size == "big":
            assert scene.places[0].width >= BIG
        if scene.kind in ("count", "pair", "small"):
            assert all(BY_NAME[item.subject].simple for item in scene.items)
        assert all(scene.ground != (item.color or BY_NAME[item.subject].own) for item in scene.items)


def test_ground_is_the_named_color(train):
    for scene in [scene for scene in train if scene.ground != "white"][:60]:
        pixels = np.asarray(render(scene)).reshape(-1, 3)
        colors, counts = np.unique(pixels, axis=0, return_counts=True)
        ground = parse_color(GROUNDS[scene.ground])
        share = counts[(colors == ground).all(1)].sum() / len(pixels)
        assert share > 0.1, scene


def test_as_many_drawings_as_the_count_says(train):
    # Hearts, stars and balloons are one connected shape each, so that labelling components is an independent count.
    checked = 0
    for scene in train:
        if scene.kind == "count" and scene.items[0].subject in (
            "heart",
            "star",
            "balloon",
            "pumpkin",
            "envelope",
            "door",
        ):
            labels, _ = ndimage.label(ndimage.binary_fill_holes(_ink(scene)), structure=np.ones((3, 3)))
            sizes = np.bincount(labels.ravel())[1:]
            assert (sizes > 60).sum() == scene.count, scene
            checked += 1
    assert checked >= 15


@pytest.mark.parametrize("position", PLACES)
def test_small_subjects_are_where_they_are_said_to_be(position, train):
    scenes = [scene for scene in train if scene.position == position][:10]
    assert scenes
    for scene in scenes:
        y, x = (c / 64 for c in ndimage.center_of_mass(_ink(scene)))
        assert ("left" in position) == (x < 0.42) and ("right" in position) == (x > 0.58), (scene, x)
        assert ("top" in position) == (y < 0.42) and ("bottom" in position) == (y > 0.58), (scene, y)


def test_the_two_of_a_pair_are_left_and_right(train):
    for scene in [scene for scene in train if scene.kind == "pair"][:40]:
        left, right = (
            Scene("single", scene.style, (item,), (place,))
            for item, place in zip(scene.items, scene.places, strict=True)
        )
        whole = _ink(scene)
        assert not (_ink(left) & _ink(right)).any()
        if scene.ground == "white":
            assert (whole == (_ink(left) | _ink(right))).mean() > 0.999
        assert ndimage.center_of_mass(_ink(left))[1] < 30 and ndimage.center_of_mass(_ink(right))[1] > 34


def test_nothing_is_cut_off_at_the_border():
    item = Item("heart", "red")
    inside = Scene("single", "color", (item,), (Place(0.5, 0.5, 0.5, 0.5),))
    shifted = Scene("single", "color", (item,), (Place(0.98, 0.02, 0.5, 0.5),))
    assert _ink(shifted).sum() == _ink(inside).sum()


def test_mirroring_flips_the_drawing():
    place = (Place(0.5, 0.5, 0.75, 0.75),)
    plain, mirrored = (render(Scene("single", "color", (Item("cat"),), place, mirrored=flag)) for flag in (False, True))
    assert np.array_equal(np.asarray(plain)[:, ::-1], np.asarray(mirrored))


def test_larger_images_show_the_same_scene(train):
    for scene in train[:20]:
        small, large = render(scene, 64), render(scene, 128).resize((64, 64))
        assert np.abs(np.asarray(small).astype(int) - np.asarray(large).astype(int)).mean() < 20
