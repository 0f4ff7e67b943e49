"""Typical words, against the paper's formula written out for one word, and on captions where the answer is plain."""

from __future__ import annotations

from math import log, sqrt

import pytest

from aptp_ray.evaluate.words import typical_words, words_of

OWN = ["a red apple"] * 12 + ["a red car"] * 8
OTHER = ["a blue apple"] * 10 + ["a blue bus, and a green car"] * 10


def test_words_are_lower_case_and_no_numbers_or_signs() -> None:
    assert words_of("The dog's T-shirt: 3 Äpfel & 'x2'") == ["the", "dog's", "t-shirt", "äpfel", "x"]


def test_the_score_is_the_papers() -> None:
    """For "red": 20 of 60 words here, 0 of 100 there; 8 different words, so that the prior weighs 8 words."""
    (red, *_) = typical_words(OWN, OTHER)
    prior = 8 * 20 / 160
    total = 8.0
    vocabulary = {word for caption in OWN + OTHER for word in words_of(caption)}
    assert vocabulary == {"a", "red", "apple", "car", "blue", "bus", "and", "green"}
    own, other = sum(len(words_of(c)) for c in OWN), sum(len(words_of(c)) for c in OTHER)
    assert (own, other) == (60, 100)
    here = log((20 + prior) / (60 + total - 20 - prior))
    there = log((0 + prior) / (100 + total - 0 - prior))
    assert red.word == "red" and (red.own, red.other) == (20, 0)
    assert red.score == pytest.approx((here - there) / sqrt(1 / (20 + prior) + 1 / prior))


def test_what_all_captions_hold_is_typical_of_none() -> None:
    mine, theirs = ({word.word for word in typical_words(*pair)} for pair in ((OWN, OTHER), (OTHER, OWN)))
    assert "red" in mine and "blue" in theirs
    assert "a" not in mine | theirs and not mine & theirs


def test_a_rare_word_is_not_typical_for_being_rare() -> None:
    found = [word.word for word in typical_words([*OWN, "a zebra"], OTHER)]
    assert "red" in found and "zebra" not in found


def test_there_are_no_words_where_there_is_nothing_to_compare() -> None:
    assert typical_words([], OTHER) == typical_words(OWN, []) == []
    assert typical_words(["apple"], ["apple"]) == []
    assert [word.word for word in typical_words(OWN, OTHER, most=1, least_score=-9)] == ["red"]
