"""The frozen sentence encoder that turns captions into prompt embeddings z (APTP, section 3.1).

The sentence-transformers recipe, with transformers alone: the mean of the last hidden states over real tokens, then
L2-normalised. The router's predictor learned on one encoder's embeddings and is meaningless on another's, hence the
fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from aptp_ray.core.lean_bert import lean
from aptp_ray.core.packed import can_pack, pack_linears

# Token ids of this line tell tokenizers apart that share a vocabulary but not their normalisation.
_PROBE = "An Écru-coloured teapot, 3/4 view -- “naïve” style; 日本 x²"


class PromptEncoder:
    """Captions in, unit vectors out.

    Attributes:
        dim: length of an embedding.
        source: where the weights came from (path or hub id); None when a loaded model was handed in.
        max_length: tokens read of a caption; the rest is cut.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_length: int = 128,
        source: str | None = None,
    ) -> None:
        """Wraps a loaded transformers encoder and its tokenizer; the model is frozen, moved, and on a CPU packed: it is ours now.

        Args:
            model: an encoder whose output has `last_hidden_state`.
            tokenizer: its tokenizer.
            device: where to run.
            dtype: precision of the forward pass; embeddings are float32 whatever it is.
            max_length: tokens read of a caption. The diffusion model's own text encoder reads 77.
            source: path or hub id to remember.

        Raises:
            ValueError: `max_length` is more than the model has positions for.
        """
        positions = getattr(model.config, "max_position_embeddings", None)
        if max_length < 1 or (positions is not None and max_length > positions):
            raise ValueError(f"max_length {max_length} is outside 1..{positions}, the positions this model has")
        self.source = source
        self.max_length = max_length
        self.dim = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        # Before the cast: the precision of the forward pass is no part of an encoder's identity.
        self.fingerprint = _fingerprint(model, tokenizer, max_length)
        self._tokenizer = tokenizer
        self._model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        if can_pack(self._model):  # a text on a CPU
            self._model = lean(self._model)
            pack_linears(self._model)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_length: int = 128,
        revision: str | None = None,
    ) -> PromptEncoder:
        """Loads a sentence encoder from a directory or the Hugging Face hub.

        Raises:
            FileNotFoundError: the directory or model does not exist or cannot be reached.
        """
        source = str(path_or_id)
        if source.startswith(("/", ".", "~")):
            source = str(Path(source).expanduser())
            if not (Path(source) / "config.json").is_file():
                raise FileNotFoundError(f"no sentence encoder at {source!r}: it has no config.json")
        try:
            # The stock attention path keeps one prompt's result as independent of its neighbours as the library can.
            model = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        except OSError as error:
            raise FileNotFoundError(
                f"cannot load the prompt encoder {source!r}: {error}. Give the path of a downloaded copy, "
                "or check the hub id and the network"
            ) from error
        return cls(model, tokenizer, device=device, dtype=dtype, max_length=max_length, source=source)

    @property
    def device(self) -> torch.device:
        """Where the forward pass runs."""
        return next(self._model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the forward pass."""
        return next(self._model.parameters()).dtype

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, batch_size: int = 64) -> Tensor:
        """Embeds captions.

        Args:
            prompts: n captions; an empty list is fine.
            batch_size: captions to a forward pass.

        Returns:
            [n, dim] float32 on the CPU, rows of length 1, in the order of `prompts`.

        Raises:
            TypeError: a bare string instead of a list, or an element that is no string.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string; wrap it in a list")
        for position, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompts[{position}] is {type(prompt).__name__}, not str: {prompt!r}")
        result = torch.empty(len(prompts), self.dim)
        # Batches of similar lengths waste little on padding.
        order = sorted(range(len(prompts)), key=lambda position: (len(prompts[position]), position))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            result[rows] = self._encode_batch([prompts[row] for row in rows])
        return result

    def _encode_batch(self, prompts: list[str]) -> Tensor:
        tokens = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        hidden = self._model(**tokens).last_hidden_state.float()  # [n, tokens, dim]
        mask = tokens["attention_mask"].unsqueeze(-1).float()  # [n, tokens, 1]
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
        return torch.nn.functional.normalize(mean, dim=1).cpu()


def _fingerprint(model: torch.nn.Module, tokenizer: Any, max_length: int) -> str:
    """sha256 over what decides an embedding: weights, vocabulary, a probe of the tokenizer's rules, the cut.

    From memory rather than from files, so that a hub id, a copied directory and a loaded model agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values.long()
        digest.update(values.contiguous().numpy().data)
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{token}\t{number}\n".encode())
    digest.update(repr((list(tokenizer(_PROBE)["input_ids"]), max_length)).encode())
    return digest.hexdigest()
