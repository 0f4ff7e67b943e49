"""Scores of a system: for its traffic, for each expert, for each kind of prompt, with intervals over captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aptp_ray.evaluate import distances
from aptp_ray.evaluate.bootstrap import draws, estimate, replicate
from aptp_ray.evaluate.distances import Score
from aptp_ray.evaluate.encoders import Encoded
from aptp_ray.evaluate.likeness import psnr_of

# A distance between sets of which one has fewer images than this says more about their number than about them.
LEAST_IMAGES = 50
# Which way is better, for whoever sorts systems by a score.
HIGHER_IS_BETTER = {"clip_score": True, "facts": True, "teacher_psnr": True, "frechet": False, "kid": False, "cmmd": False,
                    "fid": False, "inception_kid": False}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A system's images, as the encoders see them, row i of caption i.

    Attributes:
        encoded: of the images.
        answers: n of {question: right}, from the heads.
        weights: [n] by which the images stand for the traffic.
        errors: [n] squared errors against the teacher's images; None where the teacher drew nothing, or is the system.
    """

    encoded: Encoded
    answers: list[dict[str, bool]]
    weights: np.ndarray
    errors: np.ndarray | None = None


def scores_of(reference: Encoded, sample: Sample, texts: np.ndarray | None, rows: np.ndarray | None = None) -> dict[str, Score]:
    """The scores of some of a system's images against the references of the same captions.

    Args:
        reference: row i of caption i.
        sample: the system's.
        texts: [n, dimension] of the captions; None where there is no image-text model.
        rows: indices of captions; None: all.

    Returns:
        ``frechet`` and ``kid`` on the image-text model's features, ``cmmd`` and ``clip_score`` on its embeddings, ``facts``,
        ``teacher_psnr``, ``fid`` and ``inception_kid`` on Inception's features: those that can be had.
    """
    rows = np.arange(len(sample.answers)) if rows is None else rows
    found: dict[str, Score] = {}
    enough = len(rows) >= LEAST_IMAGES
    mine, theirs, wrong = sample.encoded, reference, sample.errors
    if enough and mine.features is not None and theirs.features is not None:
        found["frechet"] = distances.frechet(theirs.features[rows], mine.features[rows])
        found["kid"] = distances.kid(theirs.features[rows], mine.features[rows])
    if mine.embeddings is not None and theirs.embeddings is not None:
        if enough:
            found["cmmd"] = distances.cmmd(theirs.embeddings[rows], mine.embeddings[rows])
        if texts is not None:
            found["clip_score"] = distances.mean_of(distances.clip_score(mine.embeddings[rows], texts[rows]))
    right = facts_of([sample.answers[row] for row in rows])
    if right is not None:
        found["facts"] = right
    if wrong is not None:
        found["teacher_psnr"] = psnr_of(wrong[rows])
    if enough and mine.inception is not None and theirs.inception is not None:
        found["fid"] = distances.frechet(theirs.inception[rows], mine.inception[rows])
        found["inception_kid"] = distances.kid(theirs.inception[rows], mine.inception[rows])
    return found


def facts_of(answers: Sequence[dict[str, bool]]) -> Score | None:
    """The mean over questions of the share of images that are right, as GenEval's overall score; None: nothing was asked."""
    names = sorted({name for one in answers for name in one})
    if not names:
        return None
    asked = np.array([[name in one for name in names] for one in answers], dtype=np.float64)  # [n, questions]
    right = np.array([[one.get(name, False) for name in names] for one in answers], dtype=np.float64)

    def score(weights: np.ndarray) -> float:
        total = weights @ asked
        shares = np.divide(weights @ right, total, out=np.full(len(names), np.nan), where=total > 0)
        return float(np.nanmean(shares))

    return score


def replicated(scores: dict[str, Score], counts: np.ndarray, weights: np.ndarray | None) -> dict[str, tuple[float, np.ndarray]]:
    """Each score of the whole set, and of each replicate."""
    return {name: replicate(score, counts, weights) for name, score in scores.items()}


def parts_of(
    reference: Encoded,
    sample: Sample,
    texts: np.ndarray | None,
    labels: Sequence[str],
    *,
    replicates: int,
    seed: int,
) -> dict[str, Any]:
    """The same scores for each value of a label (an expert, a kind of prompt): {value: {"images", score: estimate}}.

    Parts with fewer than :data:`LEAST_IMAGES` images have no distances; a distance of a part is comparable with the same part
    of another system, not with the whole: it falls with the number of images.
    """
    found: dict[str, Any] = {}
    values = np.array(labels)
    for value in sorted(set(labels)):
        rows = np.flatnonzero(values == value)
        if len(rows) < 2:
            found[value] = {"images": len(rows)}
            continue
        counts = draws(len(rows), replicates, seed=seed)
        estimates = replicated(scores_of(reference, sample, texts, rows), counts, None)
        found[value] = {"images": len(rows)} | {name: estimate(*one).to_json() for name, one in estimates.items()}
    return found


def questions_of(answers: Sequence[dict[str, bool]], held_out: Sequence[bool]) -> dict[str, Any]:
    """The small GenEval: {"seen" or "held_out": {question: {"right", "asked"}}}."""
    found: dict[str, Any] = {}
    for name, wanted in (("seen", False), ("held_out", True)):
        rows = [one for one, held in zip(answers, held_out, strict=True) if held == wanted]
        names = sorted({question for one in rows for question in one})
        found[name] = {
            question: {
                "right": sum(one[question] for one in rows if question in one) / sum(question in one for one in rows),
                "asked": sum(question in one for one in rows),
            }
            for question in names
        }
    return found
