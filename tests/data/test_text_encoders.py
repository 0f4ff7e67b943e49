"""Texts of pipelines with two text encoders, or with T5: as their own pipelines encode them, stored as states or as token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from material import MINILM

from aptp_ray.core.backbones import model_inputs
from aptp_ray.core.components import load_text
from aptp_ray.data.encoder import Encoder, EncoderSpec, describe
from aptp_ray.data.rows import Framing, cropped_table, framed
from aptp_ray.data.schema import TEXT_LENGTH, TEXT_STATES, TEXT_TOKENS
from aptp_ray.encoding import unpack
from aptp_ray.train.draws import decode_encoded
from aptp_ray.train.worker import empty_text_states, load_teacher_model, text_states_of
from tests.teachers import LATENTS, MAKERS, RESOLUTION, TOKENS

CAPTIONS = ["A red apple", "a drawing of a very small green fox that runs over the hill", "A red apple"]
HALF = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module", params=MAKERS)
def pipeline_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "teacher")


def encoded(pipeline_dir: Path, text: str) -> dict[str, np.ndarray]:
    framing, pixels = Framing(RESOLUTION), np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    raw = {"image": pixels, "alternates": [], "group": "", "metadata": "", "shard": "s", "reason": ""}
    sources = [{**raw, "key": str(number), "position": number, "caption": caption} for number, caption in enumerate(CAPTIONS)]
    rows = [row for source in sources for row in framed(source, framing, [0])]
    table = Encoder(EncoderSpec(str(pipeline_dir), MINILM, text=text))(cropped_table(rows))
    assert set(table.column("reason").to_pylist()) == {""}
    return {name: np.array(table.column(name).to_pylist(), dtype=object) for name in table.column_names}


@torch.no_grad()
def test_states_are_those_of_the_pipeline(pipeline_dir: Path) -> None:
    """And what the model is given, once they are unpacked: tokens, pooled text, mask."""
    encoding = describe(EncoderSpec(str(pipeline_dir), MINILM), Framing(RESOLUTION))
    rows = encoded(pipeline_dir, "states")
    states = torch.from_numpy(unpack(rows[TEXT_STATES], encoding.text_shape).astype(np.float32))
    pipeline, model = DiffusionPipeline.from_pretrained(pipeline_dir), load_teacher_model(str(pipeline_dir))
    assert encoding.num_tokens == TOKENS and encoding.latent_shape == (4, LATENTS, LATENTS)
    given = model_inputs(model, torch.zeros(len(CAPTIONS), 4, LATENTS, LATENTS), torch.zeros(len(CAPTIONS)), states)
    if hasattr(pipeline, "text_encoder_2"):
        prompts, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        assert encoding.text_shape == (TOKENS + 1, 40) and encoding.ids_per_text == 2 * TOKENS
        torch.testing.assert_close(given["encoder_hidden_states"], prompts, **HALF)
        torch.testing.assert_close(given["added_cond_kwargs"]["text_embeds"], pooled, **HALF)
        assert "encoder_attention_mask" not in given
        # The unconditional prompt of a pipeline that was given no negative one.
        assert not torch.tensor(empty_text_states(str(pipeline_dir))).any()
    else:
        prompts, mask, _, _ = pipeline.encode_prompt(
            CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=TOKENS, clean_caption=False
        )
        assert encoding.text_shape == (TOKENS, 20) and encoding.ids_per_text == TOKENS
        torch.testing.assert_close(given["encoder_hidden_states"], prompts * mask[:, :, None], **HALF)
        assert torch.equal(given["encoder_attention_mask"], mask.bool()) and not mask.all()
        assert rows[TEXT_LENGTH].tolist() == mask.sum(1).tolist()


def test_token_ids_become_the_same_states(pipeline_dir: Path) -> None:
    spec = EncoderSpec(str(pipeline_dir), MINILM, text="tokens")
    encoding = describe(spec, Framing(RESOLUTION))
    stored, ids = encoded(pipeline_dir, "states"), encoded(pipeline_dir, "tokens")
    assert len(ids[TEXT_TOKENS][0]) == 4 * encoding.ids_per_text and TEXT_STATES not in ids
    saved = 2 * int(np.prod(encoding.text_shape)) - 4 * encoding.ids_per_text
    assert encoding.row_bytes() == encoding.row_bytes("states") - saved
    made = decode_encoded(ids, encoding, text_states_of(encoding, str(pipeline_dir), torch.device("cpu")))["text_states"]
    expected = unpack(stored[TEXT_STATES], encoding.text_shape).astype(np.float32)
    np.testing.assert_allclose(made.numpy(), expected, **HALF)


def test_a_pipeline_with_three_text_encoders_is_refused(pipeline_dir: Path, tmp_path: Path) -> None:
    index = (pipeline_dir / "model_index.json").read_text()
    extra = '{"text_encoder_2": ["transformers", "CLIPTextModel"], "text_encoder_3": ["transformers", "T5EncoderModel"],'
    (tmp_path / "model_index.json").write_text(index.replace("{", extra, 1))
    with pytest.raises(ValueError, match="'text_encoder_2', 'text_encoder_3'"):
        load_text(tmp_path)
