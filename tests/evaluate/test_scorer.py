"""The shipped encoder and heads on drawings that they have not seen; failures that are planted rank last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aptp_ray.artifacts import RunDir, resolve_source
from aptp_ray.config import ConfigError, parse_config
from aptp_ray.demo.captions import captions
from aptp_ray.demo.scenes import generator, held_out, render, sample_scene
from aptp_ray.demo.shards import sample_record
from aptp_ray.evaluate.encoders import Encoders
from aptp_ray.evaluate.facts import head_classes, numbered, questions, read_facts
from aptp_ray.evaluate.heads import Heads, fit_heads
from aptp_ray.evaluate.image_text import ImageTextModel, recall_at_1, resized
from aptp_ray.evaluate.scores import HIGHER_IS_BETTER, Sample, parts_of, questions_of, scores_of
from tests.evaluate.conftest import tiny_config

SCORER = "package:aptp_ray/demo/weights/scorer"
COUNT = 240


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders.load(tiny_config(Path("unused"), evaluation={"encoder": SCORER}))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Validation scenes of a seed that no shipped weights were made with, with their captions and records."""
    found = []
    for index in range(COUNT):
        scene = sample_scene(77, "validation", index)
        texts = captions(scene, generator(77, "validation", index, 1))
        image = np.asarray(render(scene))
        facts = read_facts(json.dumps(sample_record(scene, str(index), texts, b"", 64)))
        found.append({"scene": scene, "image": image, "caption": texts[0], "facts": facts, "group": scene.group})
    return found


def test_a_card_says_what_the_weights_are_and_they_are_small() -> None:
    folder = Path(resolve_source(SCORER))
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 6e6
    facts = json.loads((folder / "scorer.json").read_text())
    assert "not comparable" in facts["label"] and "CC BY-SA 4.0" in (folder / "README.md").read_text()
    assert not list(folder.rglob("*.bin")) and (folder / "model.safetensors").is_file()


def test_the_layout_is_transformers_own(rows: list[dict]) -> None:
    from transformers import AutoTokenizer, VisionTextDualEncoderModel

    folder = resolve_source(SCORER)
    model = VisionTextDualEncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder)([rows[0]["caption"]], return_tensors="pt")
    pixels = torch.from_numpy(rows[0]["image"].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    mine = ImageTextModel.load(folder)
    assert torch.allclose(out.image_embeds, mine.images([rows[0]["image"]]).embeddings, atol=1e-5)
    assert torch.allclose(out.text_embeds, mine.texts([rows[0]["caption"]]), atol=1e-5)


def test_stored_accuracy_is_what_is_measured_here(encoders: Encoders, rows: list[dict]) -> None:
    """On other draws than those that were measured; chance is 1 % in retrieval."""
    stored = json.loads((Path(resolve_source(SCORER)) / "scorer.json").read_text())
    model = encoders.image_text
    assert model is not None and encoders.heads is not None
    vectors, texts = model.images([r["image"] for r in rows]), model.texts([r["caption"] for r in rows])
    found = recall_at_1(vectors.embeddings, texts, gallery=80, owners=numbered([r["facts"] for r in rows]))
    assert found["queries"] == COUNT
    # Smaller galleries are easier, hence one bound: three standard errors of 240 answers are 10 points.
    for way in ("image_to_text", "text_to_image"):
        assert found[way] > stored["held_out"]["retrieval"][way] - 0.1
    answers = encoders.heads.answers(vectors.features, [r["facts"] for r in rows])
    measured = questions_of(answers, [r["facts"].held_out is not None for r in rows])
    for name, one in measured["seen"].items():
        share = stored["seen"]["heads"]["questions"][name]["right"]
        assert one["right"] == pytest.approx(share, abs=0.05 + 3 * (share * (1 - share) / one["asked"]) ** 0.5), name


def test_planted_failures_rank_last_by_every_score(encoders: Encoders, rows: list[dict]) -> None:
    assert encoders.image_text is not None
    images = [r["image"] for r in rows]
    noise = np.random.default_rng(0)
    # A fair model: the right pictures, somewhat rough.
    fair = [np.clip(image + noise.normal(0, 12, image.shape), 0, 255).astype(np.uint8) for image in images]
    shuffled = [fair[place] for place in noise.permutation(COUNT)]
    blank = [np.full_like(image, 255) for image in images]
    reference, texts = encoders.encode(images, 64), encoders.image_text.texts([r["caption"] for r in rows]).numpy()
    facts, ones = [r["facts"] for r in rows], np.ones(COUNT)
    samples = {}
    for name, some in {"fair": fair, "shuffled": shuffled, "blank": blank}.items():
        encoded = encoders.encode(some, 64)
        samples[name] = Sample(encoded, encoders.answers(encoded, facts), ones)
    found = {
        name: {score: one(ones) for score, one in scores_of(reference, sample, texts).items()} for name, sample in samples.items()
    }
    assert set(found["fair"]) == {"frechet", "kid", "cmmd", "clip_score", "facts"}
    for score in found["fair"]:
        sign = 1 if HIGHER_IS_BETTER[score] else -1
        assert sign * found["fair"][score] > sign * found["blank"][score], score
    for score in ("clip_score", "facts"):
        assert found["fair"][score] > 1.5 * max(found["shuffled"][score], found["blank"][score]), score
    # A distance between whole sets cannot see which caption an image was drawn for; between kinds of prompts it can.
    kinds = ["line" if r["scene"].style == "line" else "color" for r in rows]
    parts = {name: parts_of(reference, sample, texts, kinds, replicates=5, seed=0) for name, sample in samples.items()}
    for kind in ("line", "color"):
        for score in ("frechet", "kid", "cmmd"):
            assert parts["fair"][kind][score]["value"] < parts["shuffled"][kind][score]["value"], (kind, score)
            assert parts["fair"][kind][score]["value"] < parts["blank"][kind][score]["value"], (kind, score)


def test_references_are_encoded_once(
    encoders: Encoders, rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images = RunDir(str(tmp_path)), [r["image"] for r in rows[:4]]
    first = encoders.references(run, images, 64)
    monkeypatch.setattr(Encoders, "encode", lambda *_: pytest.fail("encoded again"))
    again = encoders.references(run, images, 64)
    assert first.features is not None and (first.features == again.features).all()
    changed = [images[0].copy(), *images[1:]]
    changed[0][0, 0] ^= 1
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        encoders.references(run, changed, 64)


def test_one_resize_for_all(encoders: Encoders, rows: list[dict]) -> None:
    image = rows[0]["image"]
    assert resized(image, 64) is image
    wide = np.zeros((64, 96, 3), np.uint8)
    wide[:, 16:80] = image
    assert (resized(wide, 64) == image).all()  # the central square
    assert resized(image, 32).shape == (32, 32, 3)


def test_heads_learn_what_is_linear_and_say_what_they_cannot(tmp_path: Path) -> None:
    text = {"kind": "single", "count": 1, "held_out": None}
    rows = [
        json.dumps(text | {"subjects": [s], "colors": [c], "style": st})
        for s in ("cat", "dog") for c in ("red", None) for st in ("color", "line")
    ]  # fmt: skip
    facts = [one for one in map(read_facts, rows) if one is not None] * 8
    features = torch.tensor([[f.subjects[0] == "cat", f.color == "red", f.style == "line", 1.0] for f in facts]).float()
    heads = fit_heads(features, facts, head_classes(facts), steps=200, batch_size=32)
    assert all(all(one.values()) for one in heads.answers(features, facts))
    heads.save(tmp_path)
    again = Heads.load(tmp_path)
    assert again.answers(features, facts) == heads.answers(features, facts)
    swapped = [read_facts(rows[0].replace("cat", "dog"))]
    assert again.answers(features[:1], swapped)[0]["subject"] is False  # type: ignore[arg-type]
    unknown = [read_facts(rows[0].replace("cat", "yak"))]
    assert again.answers(features[:1], unknown)[0]["subject"] is False  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="without heads"):
        Heads.load(tmp_path / "nowhere")


def test_questions_follow_the_kind_of_scene(rows: list[dict]) -> None:
    assert read_facts("") is None and read_facts('{"width": 3}') is None
    for row in rows:
        asked = {question.name for question in questions(row["facts"])}
        pair = row["scene"].kind == "pair"
        assert asked >= ({"pair", "style"} if pair else {"subject", "count", "style"})
        assert ("color" in asked) == (not pair and row["scene"].items[0].color is not None)
        assert row["facts"].held_out == held_out(row["scene"])


def test_retrieval_by_hand() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 2, 1, 3]]
    found = recall_at_1(images, texts, gallery=4, owners=[0, 1, 2, 3])
    assert found["image_to_text"] == found["text_to_image"] == 0.5
    assert recall_at_1(images, texts, gallery=4, owners=[0, 1, 1, 3])["image_to_text"] == 1.0
    with pytest.raises(ValueError, match="do not fill"):
        recall_at_1(images, texts, gallery=5, owners=[0, 1, 2, 3])


def test_what_is_missing_is_said_before_any_work(tmp_path: Path) -> None:
    def load(**evaluation: object) -> None:
        Encoders.load(tiny_config(tmp_path, evaluation=evaluation))

    with pytest.raises(ConfigError, match="nothing to score with"):
        load()
    with pytest.raises(ConfigError, match="no image-text model in transformers' layout"):
        load(encoder=str(tmp_path))
    with pytest.raises(ConfigError, match="evaluation.inception"):
        load(inception=str(tmp_path / "none.pth"))
    with pytest.raises(ConfigError, match="mixture"):
        parse_config(tiny_config(tmp_path).model_dump() | {"evaluation": {"systems": [{"name": "t", "kind": "teacher"}]}})
