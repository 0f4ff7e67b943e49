"""PromptRouter: captions -> experts, and its files (APTP, section 3)."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aptp_ray.core.code_router import CodeRouter, Routing
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.space import ArchitectureSpace

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"


class PromptRouter(CodeRouter):
    """A code router that, with a prompt encoder attached, maps captions to experts: `route()`.

    The encoder is frozen and stays outside the state dict: files hold its fingerprint and where it came from.
    """

    _encoder: PromptEncoder | None = None
    _encoder_record: dict[str, Any] | None = None

    @torch.no_grad()
    def route(self, prompts: Sequence[str], *, batch_size: int = 64) -> Routing:
        """Routes captions with the attached prompt encoder; the same caption goes to the same expert in any batch.

        Padding and batch shape move an embedding's last bits. A prompt that stands between two experts by less than
        that could tip over, so every near-tie is settled by encoding the prompt once more, alone.

        Raises:
            RuntimeError: no encoder is attached and none is on record.
        """
        prompts = list(prompts)
        encoder = self.prompt_encoder
        routing = self.assign(encoder.encode(prompts, batch_size=batch_size))
        if self.num_codes == 1 or not prompts:
            return routing
        best = (routing.similarity + self.prices()).topk(2, dim=1).values  # [n, 2]
        # 1000 roundings: 1e-4 of a cosine in float32; in half precision every prompt is encoded alone.
        margin = 1000 * torch.finfo(encoder.dtype).eps
        for row in (best[:, 0] - best[:, 1] < margin).nonzero().flatten().tolist():
            alone = self.assign(encoder.encode([prompts[row]]))
            routing.expert[row], routing.similarity[row] = alone.expert[0], alone.similarity[0]
        return routing

    # -- prompt encoder --------------------------------------------------------------------------------------------------

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The attached encoder; loaded from its recorded source on first use."""
        if self._encoder is None:
            record = self._encoder_record
            if record is None or record["source"] is None:
                raise RuntimeError("this router has no prompt encoder; call attach() or pass prompt_encoder=")
            self.attach(PromptEncoder.from_pretrained(record["source"], max_length=record["max_length"]))
        assert self._encoder is not None
        return self._encoder

    def attach(self, encoder: PromptEncoder) -> PromptRouter:
        """Attaches the encoder whose embeddings this router learned on.

        Raises:
            ValueError: another encoder than the one on record, or embeddings of another length.
        """
        if encoder.dim != self.z_dim:
            raise ValueError(f"the encoder's embeddings have {encoder.dim} entries, this router reads {self.z_dim}")
        record = self._encoder_record
        if record is not None and record["fingerprint"] != encoder.fingerprint:
            raise ValueError(
                f"the router learned on prompt encoder {record['source']!r} (fingerprint {record['fingerprint'][:12]}, "
                f"max_length {record['max_length']}), not on {encoder.source!r} ({encoder.fingerprint[:12]}, "
                f"max_length {encoder.max_length}); its choices would be meaningless. Pass the original encoder"
            )
        self._encoder = encoder
        source = encoder.source or (record or {}).get("source")
        self._encoder_record = {
            "source": source, "fingerprint": encoder.fingerprint, "max_length": encoder.max_length, "dim": encoder.dim,
        }  # fmt: skip
        return self

    # -- files -----------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Everything but the weights, JSON-ready."""
        return {
            "format": "aptp_ray.router/1",
            "z_dim": self.z_dim, "hidden_dim": self.hidden_dim, "num_codes": self.num_codes,
            "tau": self.tau, "base": self.base, "centre": self.centre, "duals": self.duals,
            "ordered_depth": self.ordered_depth,
            "mean_momentum": self.mean_momentum,
            "space": self.space.to_dict(), "macs": self.macs, "prompt_encoder": self._encoder_record,
        }  # fmt: skip

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`, each atomically, the config last.

        A save that was interrupted leaves no config and hence no router, never a mixture of two.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with _atomic_file(folder / WEIGHTS_NAME) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        with _atomic_file(folder / CONFIG_NAME) as temporary:
            Path(temporary).write_text(json.dumps(self.config(), indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        prompt_encoder: str | Path | PromptEncoder | None = None,
        device: str | torch.device = "cpu",
    ) -> PromptRouter:
        """Loads a router.

        Args:
            directory: where `save_pretrained` wrote.
            prompt_encoder: the encoder or its path; by default the recorded source, loaded when `route()` first
                needs it.
            device: where the predictor and codes live.

        Raises:
            FileNotFoundError: no router there.
            ValueError: files of another format, or another encoder than the router learned on.
        """
        folder = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no router at {str(folder)!r}: no {name} (did the prune stage finish?)")
        config = json.loads((folder / CONFIG_NAME).read_text())
        if config.pop("format", None) != "aptp_ray.router/1":
            raise ValueError(f"{str(folder / CONFIG_NAME)!r} is not an aptp_ray.router/1 config")
        space, record = ArchitectureSpace.from_dict(config.pop("space")), config.pop("prompt_encoder")
        # The drawn weights are overwritten at once; the generator only satisfies the constructor.
        router = cls(space, generator=torch.Generator().manual_seed(0), **config)
        router.load_state_dict(load_file(folder / WEIGHTS_NAME), strict=True)
        router._encoder_record = record
        if isinstance(prompt_encoder, PromptEncoder):
            router.attach(prompt_encoder)
        elif prompt_encoder is not None:
            length = record["max_length"] if record else 128
            router.attach(PromptEncoder.from_pretrained(prompt_encoder, max_length=length))
        return router.to(device)


@contextlib.contextmanager
def _atomic_file(path: Path):  # type: ignore[no-untyped-def]
    """Yields a temporary name beside `path` and renames it there if the block succeeds."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
