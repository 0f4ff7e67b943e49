"""BERT by bare operators, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from aptp_ray.core.int8 import weight_bytes
from aptp_ray.core.lean_bert import LeanBert, lean


def _bert(**changes: Any) -> BertModel:
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return BertModel(BertConfig(**{**small, **changes})).eval().requires_grad_(False)


@pytest.mark.parametrize("given", ["nothing", "a mask", "a mask of ones", "types"])
def test_it_gives_what_transformers_gives(given: str) -> None:
    model = _bert()
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(ids)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
    inputs: dict[str, Any] = {
        "nothing": {}, "a mask": {"attention_mask": mask}, "a mask of ones": {"attention_mask": ones},
        "types": {"attention_mask": mask, "token_type_ids": 1 - mask},
    }[given]  # fmt: skip
    with torch.no_grad():
        wanted = model(ids, **inputs).last_hidden_state
        found = lean(model)(ids, **inputs)
    real = inputs.get("attention_mask", ones).bool()
    torch.testing.assert_close(found.last_hidden_state[real], wanted[real], rtol=1e-5, atol=1e-5)
    assert found[0] is found.last_hidden_state  # as text encoders are read


def test_it_holds_the_same_weights_in_as_many_bytes() -> None:
    model = _bert(add_pooling_layer=False)
    without_pooler = weight_bytes(model) - weight_bytes(model.pooler)
    assert isinstance(lean(model), LeanBert) and weight_bytes(lean(model)) == without_pooler


@pytest.mark.parametrize("model", [_bert(hidden_act="relu"), _bert(is_decoder=True), torch.nn.Linear(2, 2)])
def test_what_it_does_not_know_stays_as_it_is(model: torch.nn.Module) -> None:
    assert lean(model) is model
