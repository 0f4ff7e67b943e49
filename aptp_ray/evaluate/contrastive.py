"""An image-text dual encoder from scratch, for data that no published CLIP has seen (the demo's drawings).

A Swin transformer (Liu et al. 2021) and a small BERT under the symmetric contrastive loss of CLIP (Radford et al. 2021), in
transformers' ``VisionTextDualEncoder`` layout. Two departures, both because the data says what its images show: rows of which
the same captions are true are no negatives of one another, and heads for facts (subject, color, style, number) are trained
beside, so that the features separate them. Half of a batch is drawn from few subjects: next to other pictures of a cat, only
their looks and number tell which caption is whose.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, log_softmax, normalize, pad

from aptp_ray.core.randomness import keyed_generator
from aptp_ray.evaluate.facts import Facts, numbered
from aptp_ray.evaluate.heads import Heads, facts_loss, targets_of
from aptp_ray.evaluate_sections import ScorerTraining
from aptp_ray.storage import replacing_folder

_SHIFT = 3  # pixels, at most, by which a training image is moved
_HARD_SUBJECTS = 4  # that share the hard part of a batch
_MEAN = _STD = 0.5
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class CaptionedImages:
    """Images in memory.

    Attributes:
        images: uint8 [n, side, side, 3].
        captions: n lists, the captions that are true of each.
        facts: n.
    """

    images: np.ndarray
    captions: list[list[str]]
    facts: list[Facts]

    def __len__(self) -> int:
        return len(self.captions)


def make_tokenizer(captions: Sequence[str], vocabulary: int, max_tokens: int) -> Any:
    """Makes a lower-casing WordPiece tokenizer of the captions' characters and most frequent words.

    Other words are spelled. The ``tokenizers`` library's own trainer gives other ids each time, and a training that goes on
    would have to relearn them.
    """
    from transformers import BertTokenizer

    words = Counter(re.findall(r"\w+|[^\w\s]", " ".join(captions).lower()))
    letters = sorted({letter for word in words for letter in word})
    # "##" marks a piece that goes on with a word.
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    pieces += frequent[: max(0, vocabulary - len(pieces))]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, model_max_length=max_tokens)


def make_model(settings: ScorerTraining, vocabulary: int) -> Any:
    """Makes a VisionTextDualEncoderModel with random weights, drawn from ``settings.seed``."""
    from transformers import BertConfig, SwinConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    stages = len(settings.widths)
    vision = SwinConfig(
        image_size=settings.image_size, patch_size=4, embed_dim=settings.widths[0], depths=[settings.depth] * stages,
        num_heads=[width // 24 if width % 24 == 0 else width // 16 for width in settings.widths], window_size=4, mlp_ratio=2.0,
        drop_path_rate=0.0,
    )  # fmt: skip
    text = BertConfig(
        vocab_size=vocabulary, hidden_size=settings.text_width, num_hidden_layers=settings.text_layers,
        num_attention_heads=max(1, settings.text_width // 32), intermediate_size=2 * settings.text_width,
        max_position_embeddings=settings.max_tokens, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=settings.dimension)
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(settings.seed)
        return VisionTextDualEncoderModel(config)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves, softens and roughens images a little, as a VAE and a short denoising do; colors stay what they are.

    Args:
        images: uint8 [n, side, side, 3].
        generator: of all draws.

    Returns:
        float32 [n, 3, side, side], normalised.
    """
    n, side = images.shape[:2]
    pixels = images.permute(0, 3, 1, 2).float() / 255
    padded = pad(pixels, (_SHIFT,) * 4, mode="replicate")
    moves = torch.randint(0, 2 * _SHIFT + 1, (n, 2), generator=generator).tolist()
    pixels = torch.stack([padded[i, :, top : top + side, left : left + side] for i, (top, left) in enumerate(moves)])
    strength = torch.rand(3, n, 1, 1, 1, generator=generator)
    blurred = avg_pool2d(pad(pixels, (1,) * 4, mode="replicate"), 3, stride=1)
    pixels = pixels.lerp(blurred, (2 * strength[0] - 1).clamp_min(0))  # half of them stay sharp
    noise = torch.randn(pixels.shape, generator=generator)
    pixels = pixels + 0.08 * (2 * strength[1] - 1).clamp_min(0) * noise + 0.06 * (strength[2] - 0.5)
    return (pixels.clamp(0, 1) - _MEAN) / _STD


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, owners: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, in which rows with one owner are all right answers, with equal shares.

    Args:
        image: [n, dimension] of unit length.
        text: the same; row i is a caption of image i.
        scale: inverse temperature.
        owners: int [n].
    """
    logits = scale * image @ text.T
    same = (owners[:, None] == owners[None, :]).float()
    targets = same / same.sum(dim=1, keepdim=True)
    return -0.5 * ((targets * log_softmax(logits, 1)).sum(1).mean() + (targets * log_softmax(logits.T, 1)).sum(1).mean())


class Trainer:
    """The training loop, one step at a time; a state on disk makes a killed training go on where it was.

    Attributes:
        step: optimizer steps done.
        model: what learns; :meth:`averaged` is what is kept.
    """

    def __init__(
        self,
        rows: CaptionedImages,
        classes: dict[str, list[str]],
        settings: ScorerTraining,
        state_dir: Path,
        *,
        device: str = "cpu",
    ) -> None:
        """Begins a training on ``device``, or opens the one that ``state_dir`` holds.

        Raises:
            ValueError: if that one has other settings.
        """
        self.settings, self.step = settings, 0
        self._rows, self._device = rows, torch.device(device)
        self._state_dir = state_dir
        going_on = (state_dir / "state.json").is_file()
        if going_on:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(str(state_dir))
        else:
            texts = [text for some in rows.captions for text in some]
            self.tokenizer = make_tokenizer(texts, settings.vocabulary, settings.max_tokens)
        self.model = make_model(settings, len(self.tokenizer))
        self.heads = Heads(self.model.config.vision_config.hidden_size, classes)
        self._modules = nn.ModuleDict({"model": self.model, "heads": self.heads}).to(self._device)
        self._average = {name: value.clone() for name, value in self._modules.state_dict().items()}
        decayed = [p for p in self._modules.parameters() if p.ndim > 1]
        others = [p for p in self._modules.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.lr, betas=(0.9, 0.98),
        )  # fmt: skip
        self._owners = torch.tensor(numbered(rows.facts), device=self._device)
        self._targets = {name: target.to(self._device) for name, target in targets_of(classes, rows.facts).items()}
        by_subject: dict[str, list[int]] = {}
        for index, one in enumerate(rows.facts):
            by_subject.setdefault(one.subjects[0], []).append(index)
        self._by_subject = [torch.tensor(found) for _, found in sorted(by_subject.items())]
        if going_on:
            self._load(state_dir)

    def train(self, *, report: Callable[[int, dict[str, float]], None], until: int | None = None) -> None:
        """Trains up to step ``until`` (by default all steps), with checkpoints on the way."""
        settings = self.settings
        while self.step < min(until or settings.steps, settings.steps):
            figures = self._one_step()
            self.step += 1
            report(self.step, figures)
            if self.step % settings.checkpoint_every_steps == 0 or self.step == settings.steps:
                self._save(self._state_dir)

    def averaged(self) -> Any:
        """Returns the model with the moving average of the weights."""
        self._modules.load_state_dict(self._average)
        return self.model.eval().requires_grad_(False)

    def _one_step(self) -> dict[str, float]:
        settings = self.settings
        generator = keyed_generator(settings.seed, "scorer", self.step)
        rows = self._draw(generator)
        pixels = augmented(torch.from_numpy(self._rows.images[rows.numpy()]), generator).to(self._device)
        picks = torch.rand(len(rows), generator=generator).tolist()
        texts = [(c := self._rows.captions[row])[int(pick * len(c))] for row, pick in zip(rows.tolist(), picks, strict=True)]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=settings.max_tokens, return_tensors="pt", return_token_type_ids=False
        ).to(self._device)
        rows = rows.to(self._device)
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self._device.type, dtype=torch.bfloat16):  # twice as fast, also on CPUs that know it
            features = self.model.vision_model(pixel_values=pixels).pooler_output
            image = self.model.visual_projection(features)
            pooled = self.model.text_model(**tokens).pooler_output
            text = self.model.text_projection(pooled)
        scale = self.model.logit_scale.float().clamp(max=math.log(100.0)).exp()
        owners = self._owners[rows]
        contrastive = contrastive_loss(normalize(image.float(), dim=-1), normalize(text.float(), dim=-1), scale, owners)
        facts = facts_loss(self.heads(features.float()), {name: target[rows] for name, target in self._targets.items()})
        loss = contrastive + settings.facts_weight * facts
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._modules.parameters(), 1.0)
        self._optimizer.step()
        self._follow()
        return {"contrastive": contrastive.item(), "facts": facts.item(), "scale": scale.item(), "lr": rate}

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Rows of one batch: some from all, some from a few subjects."""
        hard = int(self.settings.hard_fraction * self.settings.batch_size)
        found = [torch.randint(len(self._rows), (self.settings.batch_size - hard,), generator=generator)]
        subjects = torch.randint(len(self._by_subject), (_HARD_SUBJECTS,), generator=generator).tolist()
        for place, subject in enumerate(subjects):
            pool = self._by_subject[subject]
            count = (hard * (place + 1)) // len(subjects) - (hard * place) // len(subjects)
            found.append(pool[torch.randint(len(pool), (count,), generator=generator)])
        return torch.cat(found)

    def _rate(self) -> float:
        """Linear warm-up, then a cosine to a hundredth of the peak."""
        settings = self.settings
        if self.step < settings.warmup_steps:
            return settings.lr * (self.step + 1) / settings.warmup_steps
        done = (self.step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
        return settings.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    @torch.no_grad()
    def _follow(self) -> None:
        # Shorter at first, or the average would hold random weights for long.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self._modules.state_dict().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, 1 - decay)

    def _save(self, folder: Path) -> None:
        tensors = {f"now.{name}": value for name, value in self._modules.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self._average.items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        with replacing_folder(folder) as new:
            save_file({name: value.contiguous() for name, value in tensors.items()}, str(new / "state.safetensors"))
            self.tokenizer.save_pretrained(new)  # its ids are what the text encoder has learned
            (new / "state.json").write_text(json.dumps({"step": self.step, "settings": _what(self.settings)}))

    def _load(self, folder: Path) -> None:
        found = json.loads((folder / "state.json").read_text())
        if found["settings"] != _what(self.settings):
            raise ValueError(f"{folder} holds a training with other settings: pass --overwrite to begin anew")
        tensors = load_file(str(folder / "state.safetensors"))

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self._modules.load_state_dict(part("now."))
        self._average = {name: value.to(self._device) for name, value in part("average.").items()}
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = value
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": states})
        self.step = found["step"]


def save_scorer(model: Any, tokenizer: Any, heads: Heads, facts: dict[str, Any], folder: Path) -> int:
    """Writes model (half precision), tokenizer, image preparation, heads and ``scorer.json``; returns the size in bytes."""
    with replacing_folder(folder) as new:
        model.to(torch.float16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        side = model.config.vision_config.image_size
        preparation = {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
            "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [_MEAN] * 3, "image_std": [_STD] * 3,
        }  # fmt: skip
        (new / "preprocessor_config.json").write_text(json.dumps(preparation, indent=1) + "\n")
        heads.save(new)
        (new / "scorer.json").write_text(json.dumps(facts, indent=1) + "\n")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _what(settings: ScorerTraining) -> dict[str, Any]:
    """What a training cannot change on its way; more steps may be asked of it later, and the learning rate rises again."""
    return settings.model_dump(mode="json", exclude={"steps", "head_steps", "gallery", "checkpoint_every_steps", "threads"})
