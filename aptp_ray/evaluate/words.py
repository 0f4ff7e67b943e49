"""Words that set one group of captions apart from the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


@dataclass(frozen=True)
class WordScore:
    """How typical a word is of a group.

    Attributes:
        word: in lower case.
        score: its log-odds ratio, group to rest, in standard deviations; above 1.96, chance would rarely do it for one word.
        own: how often the group has it.
        other: how often the rest has it.
    """

    word: str
    score: float
    own: int
    other: int


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case; numbers and signs are none."""
    return [str(word) for word in _WORD.findall(caption.lower())]


def typical_words(own: Sequence[str], other: Sequence[str], *, most: int = 8, least_score: float = 1.96) -> list[WordScore]:
    """The words by which captions of a group differ most from the rest.

    Log-odds ratios with an informative Dirichlet prior (Monroe, Colaresi, Quinn 2008, "Fightin' Words: Lexical Feature Selection
    and Evaluation for Identifying the Content of Political Conflict", Political Analysis 16(4), section 3.5.1): with counts y and
    the prior's a, ``d = log((y_i + a) / (n_i + A - y_i - a)) - log((y_j + a) / (n_j + A - y_j - a))``, and
    ``score = d / sqrt(1 / (y_i + a) + 1 / (y_j + a))``. The prior is the frequencies of all these captions, A as many words as
    there are different ones: a rare word is not typical for being rare, nor a frequent one for being frequent.

    Args:
        own: captions of the group.
        other: of the rest.
        most: how many words are returned.
        least_score: words below are not.

    Returns:
        most typical first, ties by alphabet; none where either side has no words.
    """
    mine, theirs = (Counter(word for caption in captions for word in words_of(caption)) for captions in (own, other))
    if not mine or not theirs:
        return []
    vocabulary = sorted(mine | theirs)
    y = np.array([[counts[word] for word in vocabulary] for counts in (mine, theirs)], dtype=np.float64)  # [2, words]
    total = y.sum(axis=1, keepdims=True)
    prior = y.sum(axis=0) / y.sum() * len(vocabulary)
    count = y + prior
    # A single word in all captions has no odds against others.
    rest = np.maximum(total + prior.sum() - count, 1e-12)
    log_odds = np.log(count / rest)
    scores = (log_odds[0] - log_odds[1]) / np.sqrt((1 / count).sum(axis=0))
    order = sorted(range(len(vocabulary)), key=lambda index: (-scores[index], vocabulary[index]))
    return [
        WordScore(vocabulary[index], float(scores[index]), mine[vocabulary[index]], theirs[vocabulary[index]])
        for index in order[:most]
        if scores[index] >= least_score
    ]
