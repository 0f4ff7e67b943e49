"""Which expert draws a prompt when its own is busy: a policy without a clock or a network."""

from __future__ import annotations

import itertools
import random

from aptp_ray.serve.spill import Load, place

RATIOS = [0.9, 0.5, 0.6, 0.7]


def _load(images: int = 0, places: int = 4, step_ms: float = 10.0, room: int = 100) -> Load:
    return Load(images, places, step_ms, room)


def _place(loads: list[Load], scores: list[float], preferred: int = 0, budget_ms: float = 300.0) -> int:
    return place(preferred, images=1, steps=20, budget_ms=budget_ms, scores=scores, macs_ratios=RATIOS, loads=loads)


def test_latency_counts_the_rounds_before_a_jobs_last_image() -> None:
    assert _load(0).latency_ms(1, 20) == 200.0  # at once
    assert _load(3).latency_ms(1, 20) == 200.0  # the last free place
    assert _load(4).latency_ms(1, 20) == 400.0  # after those that are there
    assert _load(3).latency_ms(2, 20) == 400.0  # its second image waits
    assert _load(40).latency_ms(1, 20) == 2200.0
    assert _load(40, step_ms=0.0).latency_ms(1, 20) == 0.0  # nothing known: nothing claimed


def test_a_prompt_stays_where_the_budget_holds() -> None:
    assert _place([_load(3), _load(), _load(), _load()], [0.1, 0.9, 0.8, 0.7]) == 0


def test_the_nearest_cheaper_code_takes_it() -> None:
    busy, free = _load(20), _load()
    assert _place([busy, free, free, free], [0.9, 0.2, 0.5, 0.4]) == 2
    assert _place([busy, free, busy, free], [0.9, 0.2, 0.5, 0.4]) == 3  # the nearest is busy, too
    assert _place([busy, free, _load(room=0), free], [0.9, 0.2, 0.5, 0.4]) == 3  # or full
    assert _place([busy, free, _load(places=0), free], [0.9, 0.2, 0.5, 0.4]) == 3  # or has no replica


def test_never_to_a_dearer_code_and_never_in_vain() -> None:
    busy, free = _load(20), _load()
    assert _place([free, busy, free, free], [0.5, 0.9, 0.5, 0.5], preferred=1) == 1  # the cheapest has nowhere to go
    assert _place([busy] * 4, [0.9, 0.2, 0.5, 0.4]) == 0  # all late: the right one, late
    assert _place([busy, free, free, free], [0.9, 0.5, 0.5, 0.5]) == 1  # ties: the lowest number


def test_against_every_alternative() -> None:
    draw = random.Random(5)
    for _ in range(300):
        loads = [_load(draw.randrange(20), draw.randrange(5), draw.choice([0.0, 5.0, 20.0]), draw.randrange(3)) for _ in RATIOS]
        scores = [draw.random() for _ in RATIOS]
        for preferred, budget in itertools.product(range(4), (100.0, 500.0)):
            chosen = _place(loads, scores, preferred, budget)
            if chosen == preferred:
                continue
            assert loads[preferred].latency_ms(1, 20) > budget >= loads[chosen].latency_ms(1, 20)
            assert RATIOS[chosen] < RATIOS[preferred] and loads[chosen].room >= 1
            better = [k for k in range(4) if RATIOS[k] < RATIOS[preferred] and scores[k] > scores[chosen]]
            assert all(loads[k].latency_ms(1, 20) > budget or loads[k].room < 1 or loads[k].places < 1 for k in better)
