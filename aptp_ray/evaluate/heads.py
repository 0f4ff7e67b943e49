"""Small classifiers on the frozen features of an image encoder: is the subject right, its color, style, number?

Stored beside the encoder as ``heads.safetensors`` and ``heads.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from aptp_ray.core.randomness import keyed_generator
from aptp_ray.evaluate.facts import Facts, Question, head_labels, questions

WEIGHTS, FACTS = "heads.safetensors", "heads.json"


class Heads(nn.Module):
    """One linear classifier a head, after a normalisation by the training features' mean and deviation.

    Attributes:
        classes: {head: its classes, in order}.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, classes: dict[str, list[str]]) -> None:
        super().__init__()
        self.classes = classes
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.linear = nn.ModuleDict({name: nn.Linear(width, len(found)) for name, found in classes.items()})
        for parameter in self.linear.parameters():  # a linear classifier may start anywhere, and zeros need no draw
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Args:
            features: [n, width], before the projection into the space that texts share.

        Returns:
            {head: logits [n, classes]}.
        """
        normal = (features - self.mean) / self.deviation
        return {name: linear(normal) for name, linear in self.linear.items()}

    def save(self, folder: str | Path) -> None:
        """Writes both files in half precision."""
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, str(Path(folder) / WEIGHTS))
        text = json.dumps({"width": len(self.mean), "classes": self.classes}, indent=1)
        (Path(folder) / FACTS).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Heads:
        """Reads them back.

        Raises:
            FileNotFoundError: if the folder has none.
        """
        if not (Path(folder) / FACTS).is_file():
            raise FileNotFoundError(f"{folder} has no {FACTS}: this image-text model comes without heads for facts")
        described = json.loads((Path(folder) / FACTS).read_text(encoding="utf-8"))
        heads = cls(described["width"], described["classes"])
        heads.load_state_dict({name: value.float() for name, value in load_file(str(Path(folder) / WEIGHTS)).items()})
        return heads.eval().requires_grad_(False)

    @torch.no_grad()
    def answers(self, features: Tensor, facts: Sequence[Facts]) -> list[dict[str, bool]]:
        """Answers what each image was asked for: n rows of {question: whether it is right}.

        A head is right when the classes expected are its most likely ones, however many they are.

        Args:
            features: [n, width].
            facts: n, of the prompts.
        """
        logits = self(features)
        found = []
        for row, each in enumerate(facts):
            mine = {name: one[row] for name, one in logits.items()}
            found.append({question.name: self._right(question, mine) for question in questions(each)})
        return found

    def _right(self, question: Question, logits: dict[str, Tensor]) -> bool:
        for head, wanted in question.expected.items():
            names = self.classes[head]
            if any(name not in names for name in wanted):
                return False
            best = logits[head].topk(len(set(wanted))).indices.tolist()
            if {names[index] for index in best} != set(wanted):
                return False
        return True


def targets_of(classes: dict[str, list[str]], facts: Sequence[Facts]) -> dict[str, Tensor]:
    """{head: [n, classes]}: each row's right classes share a mass of 1; a row of zeros is not asked."""
    index = {name: {one: place for place, one in enumerate(found)} for name, found in classes.items()}
    targets = {name: torch.zeros(len(facts), len(found)) for name, found in classes.items()}
    for row, each in enumerate(facts):
        for name, right in head_labels(each).items():
            for one in set(right):
                targets[name][row, index[name][one]] = 1 / len(set(right))
    return targets


def facts_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum over heads of the cross-entropy, averaged over the rows that are asked."""
    total = next(iter(logits.values())).new_zeros((), dtype=torch.float32)
    for name, one in logits.items():
        asked = targets[name].sum(dim=1) > 0
        if asked.any():
            total = total + cross_entropy(one[asked].float(), targets[name][asked])
    return total


def fit_heads(
    features: Tensor,
    facts: Sequence[Facts],
    classes: dict[str, list[str]],
    *,
    steps: int,
    batch_size: int = 512,
    lr: float = 1e-2,
    weight_decay: float = 0.05,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Heads:
    """Trains heads by AdamW with a cosine schedule.

    Args:
        features: [n, width], of training images.
        facts: n, of the same.
        classes: {head: classes}.
        steps: of the optimizer.
        batch_size: features of a step.
        lr: peak learning rate.
        weight_decay: of the linear maps.
        seed: of the order.
        progress: called with the number of steps done.

    Raises:
        ValueError: if features and facts differ in number.
    """
    if len(features) != len(facts):
        raise ValueError(f"{len(features)} features but facts of {len(facts)} images")
    heads = Heads(features.shape[1], classes)
    generator = keyed_generator(seed, "heads")
    heads.mean.copy_(features.mean(dim=0))
    heads.deviation.copy_(features.std(dim=0).clamp_min(1e-6))
    targets = targets_of(classes, facts)
    optimizer = torch.optim.AdamW(heads.linear.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randint(len(features), (batch_size,), generator=generator)
        loss = facts_loss(heads(features[rows]), {name: target[rows] for name, target in targets.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1)
    return heads.eval().requires_grad_(False)
