"""Texts to what a model attends to, as the stock pipelines' encode_prompt makes it: in one step, or by way of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# No tokenizer of a text-to-image model reads more; larger values are transformers' placeholder for "unknown".
_MAX_TOKENS = 4096


class TextEncoder:
    """Prompts to the states that the model attends to.

    Stable Diffusion's UNet gets no attention mask, and its text encoder one only where that one's config says
    ``use_attention_mask``. PixArt's transformer does not read padding: its states are zeros here.

    Attributes:
        shape: (tokens, width) of one text's states.
        ids_per_text: token ids of one text.
    """

    def __init__(self, tokenizer: Any, model: Any, *, config: Any = None, max_tokens: int | None = None) -> None:
        """Wraps loaded parts.

        Args:
            tokenizer: of transformers.
            model: the text encoder; None: texts become token ids alone.
            config: of the text encoder, where there is no model.
            max_tokens: to which texts are padded and cut; None: the tokenizer's ``model_max_length``.

        Raises:
            ValueError: if the number of tokens is not known.
        """
        config = model.config if config is None else config
        self.shape = (_num_tokens(tokenizer, max_tokens), int(config.hidden_size))
        self.ids_per_text = self.shape[0]
        self._tokenizer, self._model = tokenizer, model
        self._pixart = getattr(config, "model_type", None) == "t5"
        self._masked = self._pixart or bool(getattr(config, "use_attention_mask", False))

    @property
    def pads_on_the_right(self) -> bool:
        """Whether the number of real tokens says where they are."""
        return self._tokenizer.padding_side == "right"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns [n, tokens, width] on the model's device and in its precision."""
        return self.states(*self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns token ids int64 [n, tokens], and 1 where a token is no padding, the same shape."""
        # PixArt was trained on lower-case captions, and its pipeline lowers every prompt.
        lowered = [text.lower().strip() for text in texts] if self._pixart else texts
        return _tokenized(self._tokenizer, lowered, self.shape[0])

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encodes what :meth:`tokenize` returns, on any device."""
        device = next(self._model.parameters()).device
        given = mask.to(device) if self._masked else None
        states = self._model(ids.to(device), attention_mask=given)[0]
        return states * given[:, :, None].to(states.dtype) if self._pixart and given is not None else states


class PooledTextEncoder:
    """Prompts to the states of two text encoders side by side, and the second one's pooled text in a last row.

    As StableDiffusionXLPipeline.encode_prompt makes them (Podell et al. 2023, section 2.1); see `backbones.model_inputs`.

    Attributes:
        shape: (tokens + 1, width of all encoders) of one text's states.
        ids_per_text: token ids of one text, those of all tokenizers.
        pads_on_the_right: the encoders get no mask, so it does not matter.
    """

    pads_on_the_right = True

    def __init__(
        self,
        encoders: Sequence[tuple[Any, Any]],
        *,
        configs: Sequence[Any] = (),
        zero_empty: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        """Wraps loaded models.

        Args:
            encoders: (tokenizer, model) pairs; the last model pools. Models may be None: texts become token ids alone.
            configs: of the models, where there are none.
            zero_empty: whether an empty text's states are zeros.
            max_tokens: to which texts are padded and cut; None: the tokenizers' ``model_max_length``.

        Raises:
            ValueError: if the number of tokens is not known, or differs.
        """
        self._encoders, self._zero_empty = list(encoders), zero_empty
        lengths = [_num_tokens(tokenizer, max_tokens) for tokenizer, _ in self._encoders]
        if len(set(lengths)) > 1:
            raise ValueError(f"the tokenizers read {lengths} tokens: states stand side by side, so the numbers must be equal")
        widths = [int(config.hidden_size) for config in configs or [model.config for _, model in self._encoders]]
        self._tokens = lengths[0]
        self.shape = (self._tokens + 1, sum(widths))
        self.ids_per_text = sum(lengths)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns [n, tokens + 1, width] on the models' device and in their precision."""
        packed = self.states(*self.tokenize(texts))
        if self._zero_empty:
            packed[[index for index, text in enumerate(texts) if not text]] = 0
        return packed

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns int64 [n, tokens of all], the ids of one tokenizer after the other's, and the first one's mask [n, tokens]."""
        found = [_tokenized(tokenizer, texts, self._tokens) for tokenizer, _ in self._encoders]
        return torch.cat([ids for ids, _ in found], dim=1), found[0][1]

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encodes what :meth:`tokenize` returns, on any device; nothing is masked."""
        states, pooled = [], torch.empty(0)
        for part, (_, model) in zip(ids.split(self._tokens, dim=1), self._encoders, strict=True):
            output = model(part.to(next(model.parameters()).device), output_hidden_states=True)
            states.append(output.hidden_states[-2])  # the last layer's are tuned to the contrastive loss
            pooled = output[0]
        beside = torch.cat(states, dim=-1)  # [n, tokens, width]
        last = functional.pad(pooled, (0, beside.shape[-1] - pooled.shape[-1]))
        return torch.cat([beside, last[:, None].to(beside.dtype)], dim=1)


AnyTextEncoder = TextEncoder | PooledTextEncoder


def _num_tokens(tokenizer: Any, max_tokens: int | None) -> int:
    tokens = int(max_tokens or tokenizer.model_max_length)
    if not 1 <= tokens <= _MAX_TOKENS:
        raise ValueError(
            f"the tokenizer's model_max_length is {tokens}: set it in tokenizer_config.json to the "
            "number of tokens that the UNet was trained with (77 for Stable Diffusion), or set teacher.max_tokens"
        )
    return tokens


def _tokenized(tokenizer: Any, texts: Sequence[str], tokens: int) -> tuple[Tensor, Tensor]:
    found = tokenizer(list(texts), padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask
