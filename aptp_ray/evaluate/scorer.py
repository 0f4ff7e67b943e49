"""How well an image-text model and its heads know the data: measured on captions and combinations that training left out."""

from __future__ import annotations

from typing import Any

from aptp_ray.evaluate.contrastive import CaptionedImages
from aptp_ray.evaluate.facts import numbered, summary
from aptp_ray.evaluate.heads import Heads
from aptp_ray.evaluate.image_text import ImageTextModel, recall_at_1


def scorer_figures(model: ImageTextModel, heads: Heads, rows: CaptionedImages, *, gallery: int) -> dict[str, Any]:
    """Retrieval among ``gallery`` and the heads' accuracy, each for combinations seen in training and for held-out ones.

    Args:
        model: the dual encoder.
        heads: on its features.
        rows: validation images; the first caption of each is used.
        gallery: see :func:`~aptp_ray.evaluate.image_text.recall_at_1`.

    Returns:
        {"seen": {"retrieval", "heads"}, "held_out": {...}}.

    Raises:
        ValueError: if either part does not fill a gallery.
    """
    vectors = model.images(list(rows.images))
    texts = model.texts([captions[0] for captions in rows.captions])
    answers = heads.answers(vectors.features, rows.facts)
    owners = numbered(rows.facts)
    figures: dict[str, Any] = {}
    for name in ("seen", "held_out"):
        part = [i for i, facts in enumerate(rows.facts) if (facts.held_out is not None) == (name == "held_out")]
        right: dict[str, list[bool]] = {}
        for index in part:
            for question, value in answers[index].items():
                right.setdefault(question, []).append(value)
        figures[name] = {
            "retrieval": recall_at_1(
                vectors.embeddings[part], texts[part], gallery=gallery, owners=[owners[index] for index in part]
            ),
            "heads": summary(right),
        }
    return figures
