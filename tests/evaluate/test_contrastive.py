"""Training of an image-text encoder, tiny: the loss against its formula, a killed training that goes on, what it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from aptp_ray.config import ConfigError, parse_config
from aptp_ray.demo.captions import captions
from aptp_ray.demo.scenes import generator, render, sample_scene
from aptp_ray.demo.shards import sample_record
from aptp_ray.evaluate.contrastive import CaptionedImages, Trainer, augmented, contrastive_loss, make_tokenizer, save_scorer
from aptp_ray.evaluate.facts import head_classes, read_facts
from aptp_ray.evaluate.heads import Heads
from aptp_ray.evaluate.image_text import ImageTextModel
from aptp_ray.evaluate_sections import ScorerTraining
from tests.evaluate.conftest import tiny_config

SETTINGS = ScorerTraining(
    image_size=32, widths=[24, 48], depth=1, text_width=32, text_layers=1, dimension=16, steps=6, batch_size=16,
    warmup_steps=2, checkpoint_every_steps=2, vocabulary=200,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> CaptionedImages:
    images, texts, facts = [], [], []
    for index in range(40):
        scene = sample_scene(5, "train", index)
        some = captions(scene, generator(5, "train", index, 1))
        images.append(np.asarray(render(scene, 32)))
        texts.append(some)
        facts.append(read_facts(json.dumps(sample_record(scene, str(index), some, b"", 32))))
    return CaptionedImages(np.stack(images), texts, [one for one in facts if one is not None])


def run(rows: CaptionedImages, folder: Path, *, until: int | None = None) -> tuple[Trainer, dict[int, float]]:
    trainer, losses = Trainer(rows, head_classes(rows.facts), SETTINGS, folder), dict[int, float]()
    trainer.train(report=lambda step, found: losses.update({step: found["contrastive"]}), until=until)
    return trainer, losses


def test_a_killed_training_goes_on_as_if_it_had_not_been(rows: CaptionedImages, tmp_path: Path) -> None:
    whole, expected = run(rows, tmp_path / "whole")
    _, first = run(rows, tmp_path / "parts", until=3)  # its newest checkpoint is of step 2
    rest, second = run(rows, tmp_path / "parts")
    assert list(second) == [3, 4, 5, 6] and first | second == expected
    for name, value in whole.averaged().state_dict().items():
        assert torch.equal(value, rest.averaged().state_dict()[name]), name
    with pytest.raises(ValueError, match="other settings"):
        Trainer(rows, head_classes(rows.facts), SETTINGS.model_copy(update={"lr": 1e-4}), tmp_path / "parts")


def test_what_is_saved_is_what_was_trained(rows: CaptionedImages, tmp_path: Path) -> None:
    trainer, _ = run(rows, tmp_path / "state", until=2)
    model = trainer.averaged()
    preparation = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    before = ImageTextModel(model, trainer.tokenizer, preparation, label="")
    images, texts = before.images(list(rows.images[:5])).embeddings, before.texts(rows.captions[0])
    heads = Heads(48, head_classes(rows.facts))
    size = save_scorer(model, trainer.tokenizer, heads, {"label": "a label"}, tmp_path / "scorer")
    after = ImageTextModel.load(tmp_path / "scorer")
    assert after.label == "a label" and size < 1e6
    assert torch.allclose(after.images(list(rows.images[:5])).embeddings, images, atol=1e-2)  # half precision
    assert torch.allclose(after.texts(rows.captions[0]), texts, atol=1e-2)


def test_the_loss_is_clips_where_no_two_rows_are_alike() -> None:
    g = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(6, 8, generator=g), dim=-1) for _ in range(2))
    scale, each = torch.tensor(10.0), torch.arange(6)
    logits = scale * image @ text.T
    expected = (cross_entropy(logits, each) + cross_entropy(logits.T, each)) / 2
    assert torch.allclose(contrastive_loss(image, text, scale, each), expected)
    # Rows 0 and 1 may bear each other's captions: swapping those changes nothing.
    owners = torch.tensor([0, 0, 2, 3, 4, 5])
    swapped = text[[1, 0, 2, 3, 4, 5]]
    assert torch.allclose(contrastive_loss(image, text, scale, owners), contrastive_loss(image, swapped, scale, owners))


def test_augmentation_repeats_and_keeps_colors() -> None:
    images = torch.zeros(64, 32, 32, 3, dtype=torch.uint8)
    images[..., 0] = 200
    first, again = (augmented(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (64, 3, 32, 32)
    red, green, _ = first.mean(dim=(0, 2, 3)).tolist()
    assert red == pytest.approx(200 / 127.5 - 1, abs=0.03) and green == pytest.approx(-1, abs=0.05)


def test_the_tokenizer_knows_the_captions_words(rows: CaptionedImages) -> None:
    texts = [text for some in rows.captions for text in some]
    tokenizer = make_tokenizer(texts, 400, 32)
    assert tokenizer("a Line drawing")["input_ids"] == tokenizer("a line drawing")["input_ids"]
    assert tokenizer.get_vocab() == make_tokenizer(texts, 400, 32).get_vocab()
    assert tokenizer.unk_token_id not in tokenizer("an unheard-of hippogriff")["input_ids"]  # spelled
    found = tokenizer(texts, truncation=True)["input_ids"]
    assert max(map(len, found)) <= 32 and all(tokenizer.unk_token_id not in one for one in found)


def test_settings_that_do_not_fit_are_refused() -> None:
    tree = tiny_config(Path("unused")).model_dump()
    for wrong, message in (({"widths": [24, 32]}, "twice as wide"), ({"image_size": 40}, "multiple of 64")):
        with pytest.raises(ConfigError, match=message):
            parse_config(tree | {"evaluation": {"scorer": wrong}})
