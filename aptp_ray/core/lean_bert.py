"""BERT's forward pass by bare operators: for a short text on a CPU, transformers' wrappers take as long as the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel
from transformers.modeling_outputs import BaseModelOutput


def _joined(*layers: nn.Linear) -> nn.Linear:
    """Linear layers that read the same rows, as one."""
    joined = nn.utils.skip_init(nn.Linear, layers[0].in_features, sum(layer.out_features for layer in layers))
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


class _Layer(nn.Module):
    def __init__(self, layer: Any, heads: int) -> None:
        super().__init__()
        own, attended = layer.attention.self, layer.attention.output
        self._heads = heads
        self.qkv = _joined(own.query, own.key, own.value)
        self.attended, self.norm = attended.dense, attended.LayerNorm
        self.inner, self.outer, self.last_norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm

    def forward(self, x: Tensor, n: int, mask: Tensor | None) -> Tensor:
        """[n * tokens, width] -> the same."""
        q, k, v = self.qkv(x).view(n, len(x) // n, 3, self._heads, -1).permute(2, 0, 3, 1, 4)  # [n, heads, tokens, channels]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        x = self.norm(x + self.attended(y))
        return self.last_norm(x + self.outer(functional.gelu(self.inner(x))))


class LeanBert(nn.Module):
    """A frozen BertModel, called like one; returns the last hidden states alone.

    Attributes:
        config: the model's.
    """

    def __init__(self, model: BertModel) -> None:
        """Takes the model's layers over; what attention reads its rows by is copied into one.

        Args:
            model: one for which :func:`can_be_lean` holds.
        """
        super().__init__()
        self.config = model.config
        self.embeddings = model.embeddings
        self.layers = nn.ModuleList(_Layer(layer, model.config.num_attention_heads) for layer in model.encoder.layer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None) -> Any:
        """[n, tokens] -> an output with ``last_hidden_state``, [n, tokens, width]."""
        n, tokens = input_ids.shape
        x = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)  # [n, tokens, width]
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask.bool()[:, None, None, :]  # of keys
        shape, x = x.shape, x.reshape(n * tokens, -1)
        for layer in self.layers:
            x = layer(x, n, mask)
        return BaseModelOutput(last_hidden_state=x.view(shape))


def can_be_lean(model: nn.Module) -> bool:
    """Whether a model is a plain BERT encoder."""
    if type(model) is not BertModel or model.training:
        return False
    config = model.config
    plain = config.hidden_act == "gelu" and not config.is_decoder and not getattr(config, "add_cross_attention", False)
    return plain and getattr(config, "position_embedding_type", None) in (None, "absolute")


def lean(model: Any) -> Any:
    """Returns a frozen model with less between its operators: itself, where it is no plain BERT."""
    return LeanBert(model).eval() if can_be_lean(model) else model
