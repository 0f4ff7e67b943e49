"""The simulator against queueing theory, arithmetic and itself."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aptp_ray.plan.simulate import Arrivals, Host, Policy, poisson, simulate

ONE_STEP = {1: 1.0}


def requests(*rows: tuple[float, int], model: int = 0) -> Arrivals:
    """(arrival, steps) of one model."""
    return Arrivals(np.array([at for at, _ in rows]), np.full(len(rows), model), np.array([steps for _, steps in rows]))


def central_queue_wait(rate: float, service: float, servers: int, states: int = 400) -> float:
    """Mean wait of M/D/c: the distribution of customers one service time later (Crommelin, 1932), solved as linear equations."""
    load = rate * service
    arrived = np.exp(np.arange(states) * math.log(load) - load - np.array([math.lgamma(j + 1) for j in range(states)]))
    transition = np.zeros((states, states))
    for i in range(states):
        left = max(0, i - servers)  # those in service leave, others come
        transition[i, left:] = arrived[: states - left]
    balance = (transition.T - np.eye(states))[:-1]
    solution = np.linalg.lstsq(np.vstack([balance, np.ones(states)]), np.append(np.zeros(states - 1), 1.0), rcond=None)[0]
    return float(np.maximum(0, np.arange(states) - servers) @ solution) / rate


# -- single engines, by hand -----------------------------------------------------------------------------------------------------


def test_one_request_takes_its_steps() -> None:
    result = simulate([Host((0,))], [(0.5, 0.7)], requests((3.0, 4)), overhead_s=0.25)
    assert result.latency_s.tolist() == [4 * 0.5 + 0.25] and result.wait_s.tolist() == [0.0] and result.batch_size == 1


@pytest.mark.parametrize("hosts", [[Host((0,))], [Host((0, 1))]], ids=["alone", "shared"])
def test_a_request_joins_at_the_next_step_and_slows_the_batch_down(hosts: list[Host]) -> None:
    # Alone a step takes 1, together 2. The second arrives within the third step, joins at 3; both step at 3-5, 5-7, 7-9: the
    # first has its six steps at 9, the other its fourth alone until 10.
    result = simulate(hosts, [(1.0, 2.0), (1.0,)], requests((0.0, 6), (2.5, 4)))
    assert result.wait_s.tolist() == pytest.approx([0.0, 0.5]) and result.latency_s.tolist() == pytest.approx([9.0, 7.5])


@pytest.mark.parametrize("hosts", [[Host((0,))], [Host((0, 1))]], ids=["alone", "shared"])
def test_a_full_batch_is_first_come_first_served(hosts: list[Host]) -> None:
    result = simulate(hosts, [(1.0, 1.0), (1.0,)], requests((0.0, 2), (0.0, 5), (0.5, 3), (0.6, 1)))
    # Places are free at 2 (the first ends) and, for the fourth, when the second and third end together at 5.
    assert (result.arrivals.at + result.latency_s).tolist() == pytest.approx([2, 5, 5, 6])


def test_two_tenants_share_a_device_while_both_have_work() -> None:
    arrivals = Arrivals(np.array([0.0, 0.0]), np.array([0, 1]), np.array([2, 5]))
    shared = simulate([Host((0, 1))], [(1.0,), (1.0,)], arrivals)
    assert shared.latency_s.tolist() == pytest.approx([4, 7])  # halves until 4, then the second alone
    lanes = simulate([Host((0, 1), lanes=2)], [(1.0,), (1.0,)], arrivals)
    assert lanes.latency_s.tolist() == pytest.approx([2, 5])


# -- against theory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.7, 0.85])
def test_one_place_is_an_m_d_1_queue(load: float) -> None:
    result = simulate([Host((0,))], [(0.1,)], poisson(load / 0.1, 6000, [1], ONE_STEP, seed=1))
    wait = load * 0.1 / (2 * (1 - load))  # Pollaczek-Khinchine
    assert np.mean(result.wait_s[result.settled()]) == pytest.approx(wait, rel=0.06)
    assert result.busy[0] == pytest.approx(load, rel=0.02)


def test_random_dispatch_is_one_m_d_1_queue_each() -> None:
    arrivals = poisson(4 * 0.6, 30_000, [1], ONE_STEP, seed=2)
    result = simulate([Host((0,))] * 4, [(1.0,)], arrivals, policy="random")
    assert np.mean(result.wait_s) == pytest.approx(0.6 / (2 * 0.4), rel=0.05)


@pytest.mark.parametrize(("servers", "load"), [(2, 0.7), (4, 0.8), (8, 0.9)])
def test_round_robin_of_constant_service_is_an_m_d_c_queue(servers: int, load: float) -> None:
    # With constant service, servers of one line become free in turn.
    arrivals = poisson(servers * load, 200_000 / servers, [1], ONE_STEP, seed=3)
    result = simulate([Host((0,))] * servers, [(1.0,)], arrivals, policy="round_robin")
    wait = central_queue_wait(servers * load, 1.0, servers)
    assert np.mean(result.wait_s[result.settled()]) == pytest.approx(wait, rel=0.1)  # waits are correlated: so much is noise


def test_two_choices_lie_between_one_line_and_blind_dispatch() -> None:
    arrivals = poisson(8 * 0.85, 8_000, [1], ONE_STEP, seed=4)
    waits = {
        policy: float(np.mean(simulate([Host((0,))] * 8, [(1.0,)], arrivals, policy=policy).wait_s))
        for policy in ("round_robin", "two_choices", "random")
    }
    assert waits["round_robin"] < waits["two_choices"] < 0.5 * waits["random"]


def test_many_tenants_of_one_device_are_a_processor_sharing_queue() -> None:
    # M/G/1-PS: mean time in the system is the service over the idle part, whatever the distribution of service.
    steps = {1: 0.5, 3: 0.5}
    arrivals = poisson(0.5 / 2, 40_000, [1.0] * 200, steps, seed=5)
    result = simulate([Host(tuple(range(200)))], [(1.0,)] * 200, arrivals)
    assert np.mean(result.latency_s) == pytest.approx(2 / 0.5, rel=0.05)


@pytest.mark.parametrize("hosts", [[Host((0,))], [Host((0, 1))]], ids=["alone", "shared"])
def test_a_saturated_engine_draws_full_batches(hosts: list[Host]) -> None:
    times = (0.010, 0.015, 0.019, 0.022)
    result = simulate(hosts, [times, (1.0,)], poisson(1000, 10, [1], {20: 0.5, 40: 0.5}, seed=6))
    rate = len(result.latency_s) / result.seconds
    assert rate == pytest.approx(4 / (30 * 0.022), rel=0.01)
    assert result.batch_size == pytest.approx(4, rel=0.01) and result.busy[0] == pytest.approx(1, rel=1e-6)


# -- always ----------------------------------------------------------------------------------------------------------------------

HOSTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(HOSTS, st.integers(0, 99), st.floats(0.1, 30), st.sampled_from(["two_choices", "random", "round_robin"]))
def test_every_request_is_drawn_once_and_no_sooner_than_its_steps_allow(
    tenants: list[tuple[int, ...]], seed: int, rate: float, policy: Policy
) -> None:
    hosts = [Host(one, lanes=1 + seed % 2) for one in [*tenants, (0, 1, 2)]]
    times = [(0.05, 0.06, 0.08), (0.1,), (0.02, 0.05)]
    arrivals = poisson(rate, 200 / rate, [0.5, 0.3, 0.2], {3: 0.5, 7: 0.5}, seed)
    result = simulate(hosts, times, arrivals, seed=seed, policy=policy)
    assert result.done.all() and np.all(result.wait_s >= 0)
    least = arrivals.steps * np.array([of[0] for of in times])[arrivals.model]
    assert np.all(result.latency_s - result.wait_s >= least - 1e-9)
    assert np.all(result.busy <= 1 + 1e-9)
    again = simulate(hosts, times, arrivals, seed=seed, policy=policy)
    assert np.array_equal(again.latency_s, result.latency_s)


def test_what_has_no_room_is_refused_and_nothing_is_lost() -> None:
    arrivals = poisson(50, 20, [1], {10: 1.0}, seed=7)
    result = simulate([Host((0,))] * 2, [(0.05, 0.06)], arrivals, room=5)
    taken = result.latency_s[result.done]
    assert 0 < len(taken) < len(result.latency_s)
    # Nobody has more than four before itself, in a batch of two.
    assert taken.max() <= 10 * 0.06 * 3 + 0.06
    assert result.quantile(0.99) == math.inf and result.attainment(10.0) == pytest.approx(len(taken) / len(arrivals.at), abs=0.05)


def test_a_model_without_a_replica_is_refused() -> None:
    with pytest.raises(ValueError, match="no replica of model 1"):
        simulate([Host((0,))], [(1.0,), (1.0,)], requests((0.0, 1), model=1))


def test_arrivals_have_to_be_in_order() -> None:
    with pytest.raises(ValueError, match="order of time"):
        requests((1.0, 1), (0.5, 1))


def test_poisson_arrivals_have_their_rate_shares_and_steps() -> None:
    arrivals = poisson(40, 500, [0.7, 0.3], {10: 0.25, 30: 0.75}, seed=8)
    gaps = np.diff(arrivals.at)
    assert len(arrivals.at) == pytest.approx(20_000, rel=0.03)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.03)  # exponential
    assert np.mean(arrivals.model == 0) == pytest.approx(0.7, abs=0.02)
    assert np.mean(arrivals.steps == 30) == pytest.approx(0.75, abs=0.02)


def test_a_large_fleet_is_simulated_in_reasonable_time() -> None:
    times = [tuple(0.02 + 0.007 * n for n in range(1, 9))] * 4
    rate = 1024 * 0.75 * 8 / (25 * times[0][-1])
    arrivals = poisson(rate, 40_000 / rate, [1] * 4, {25: 1.0}, seed=9)
    hosts = [Host((gpu % 4,)) for gpu in range(1024)]
    begun = time.process_time()
    simulate(hosts, times, arrivals)
    # A quarter of what is asked of a free core: machines that run tests are busy.
    assert len(arrivals.at) / (time.process_time() - begun) > 25_000


# -- cores -----------------------------------------------------------------------------------------------------------------------


def test_errands_take_cores_from_steps_and_steps_from_errands() -> None:
    times = [(1.0,)] * 3
    both = Arrivals(np.zeros(2), np.arange(2), np.full(2, 4))
    # As long as there are cores for all, nobody waits, and errands are overhead.
    assert simulate([Host((0, 1), lanes=2, errand_s=1.0)], times, both).latency_s.tolist() == pytest.approx([4, 4])
    # On one core: both errands' first halves until 1; the engines in halves until 9; the second halves until 10.
    one = simulate([Host((0, 1), errand_s=1.0)], times, both)
    assert one.latency_s.tolist() == pytest.approx([9, 9]) and one.busy[0] == pytest.approx(1.0)
    # The second comes while the first steps: until 3.5, its errand and the steps have half of the core each.
    later = simulate([Host((0, 1), errand_s=1.0)], times, Arrivals(np.array([0.0, 2.5]), np.arange(2), np.array([4, 1])))
    assert later.wait_s.tolist() == pytest.approx([0.5, 1.0])


def test_engines_that_take_turns_get_time_by_their_steps() -> None:
    arrivals = Arrivals(np.zeros(2), np.arange(2), np.full(2, 4))
    times = [(1.0,), (3.0,)]
    # A round is a second of the one and three of the other: both need four rounds.
    assert simulate([Host((0, 1), turns=True)], times, arrivals).latency_s.tolist() == pytest.approx([16, 16])
    assert simulate([Host((0, 1))], times, arrivals).latency_s.tolist() == pytest.approx([8, 16])
    # On two lanes the long one never waits, and the two short ones share what is left.
    three = Arrivals(np.zeros(3), np.arange(3), np.full(3, 4))
    found = simulate([Host((0, 1, 2), lanes=2, turns=True)], [(1.0,), (1.0,), (4.0,)], three)
    assert found.latency_s.tolist() == pytest.approx([8, 8, 16])


def test_engines_that_alternate_refill_the_caches() -> None:
    arrivals = Arrivals(np.zeros(2), np.arange(2), np.array([2, 4]))
    result = simulate([Host((0, 1), turns=True, refill_s=0.5)], [(1.0,), (1.0,)], arrivals)
    assert result.latency_s.tolist() == pytest.approx([6, 8])  # two rounds of 1.5 each; then two steps alone
    enough = simulate([Host((0, 1), lanes=2, turns=True, refill_s=0.5)], [(1.0,), (1.0,)], arrivals)
    assert enough.latency_s.tolist() == pytest.approx([2, 4])


def test_an_engine_with_errands_is_one_with_less_of_a_core() -> None:
    # One engine, one core: the work of steps and errands is one queue's, whatever their order.
    arrivals = poisson(1.0, 20_000, [1], {1: 1.0}, seed=11)
    result = simulate([Host((0,), errand_s=0.2)], [(0.5,)], arrivals)
    assert result.busy[0] == pytest.approx(0.7, rel=0.02)
