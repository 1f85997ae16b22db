"""Statistics, rounds, and what counts as faster."""

import random
import time

import pytest

from portattn.errors import TuningError
from portattn.tuner import measure, timers
from portattn.tuner.search import Search


def test_statistics():
    timing = measure.summarise([5, 1, 3, 2, 4])
    assert (timing.median_ns, timing.p20_ns, timing.p80_ns, timing.mean_ns, timing.n) == (
        3,
        1,
        5,
        3,
        5,
    )
    assert (timing.ci95_lo_ns, timing.ci95_hi_ns) == (1, 5)
    assert measure.summarise([7]).ci95_hi_ns == 7


def test_the_interval_holds_the_median_95_times_in_100():
    generator = random.Random(0)
    hits = 0
    for _ in range(500):
        timing = measure.summarise([int(1000 * generator.expovariate(1)) for _ in range(21)])
        hits += timing.ci95_lo_ns <= 693 <= timing.ci95_hi_ns
    assert hits >= 470


class Scripted(timers.Timer):
    def __init__(self):
        self.order = []

    def sample(self, run, repeats):
        self.order.append(run())
        return 10**7 * (1 + run())


def test_rounds_turn_round():
    timer = Scripted()
    runs = [lambda: 0, lambda: 1, lambda: 2]
    found = measure.interleave(timer, runs, [10**7] * 3, deadline=0, min_rounds=2)
    assert found == [[10**7] * 2, [2 * 10**7] * 2, [3 * 10**7] * 2]
    assert timer.order == [0, 1, 2, 2, 1, 0]  # there and back


def test_rounds_end_at_the_deadline_or_the_bound():
    later = time.monotonic() + 60
    many = measure.interleave(Scripted(), [lambda: 0], [10**7], deadline=later, max_rounds=9)
    assert len(many[0]) == 9


def test_a_hopeless_candidate_is_sampled_less():
    run = lambda: 0  # noqa: E731
    assert len(measure.screen(Scripted(), run, best_ns=None)) == 5
    assert len(measure.screen(Scripted(), run, best_ns=6 * 10**6)) == 2
    assert len(measure.screen(Scripted(), run, best_ns=10**6)) == 1


def test_faster_means_beyond_noise_and_by_one_percent():
    base = [1000, 1010, 990, 1005, 995, 1000, 1002]
    assert measure.is_faster([time * 9 // 10 for time in base], base)
    assert not measure.is_faster([time - 5 for time in base], base)
    assert not measure.is_faster([500, 500, 1500, 1500, 500, 1500, 1500], base)
    drift = [time * (1 + index) for index, time in enumerate(base)]
    assert measure.is_faster([time * 95 // 100 for time in drift], drift)  # drift hits both


def test_the_cpu_timer_tells_time():
    assert 4_000_000 < timers.timer_for("cpu").sample(lambda: time.sleep(0.005), 2) < 500_000_000
    with pytest.raises(TuningError, match="'mps'"):
        timers.timer_for("mps")


def test_a_search_proposes_each_config_once_default_and_known_first(fake_config):
    configs = [
        fake_config(),
        *(fake_config(q, k, u) for q in (16, 32) for k in (16, 32, 48) for u in (False, True)),
    ]
    known = fake_config(32, 48, True)
    courses = []
    for _ in range(2):
        search = Search(configs, [known, fake_config(7, 7)], seed=3)
        course = []
        while not search.exhausted:
            proposal = search.ask()
            config = proposal.config
            course.append(config)
            search.tell(proposal, None if config.unroll else config.block_q + config.block_k)
        courses.append(course)
    assert courses[0][:2] == [fake_config(), known]
    assert len(courses[0]) == len(set(courses[0])) == len(configs)
    assert courses[0] == courses[1]  # same seed, same course


def test_a_search_finds_the_optimum_of_a_smooth_space_early(fake_config):
    sizes = (16, 32, 48, 64, 80, 96, 112, 128)
    configs = [
        fake_config(q, k, u, f)
        for q in sizes
        for k in sizes
        for u in (False, True)
        for f in ("a", "b", "c")
    ]

    def cost(config):
        return (
            1000
            + abs(config.block_q - 112)
            + abs(config.block_k - 32)
            + 50 * config.unroll
            + 70 * (config.fault != "b")
        )

    found = []
    for seed in range(5):
        search = Search(configs, [], seed)
        best = 10**9
        for _ in range(60):  # of 384
            proposal = search.ask()
            best = min(best, cost(proposal.config))
            search.tell(proposal, cost(proposal.config))
        found.append(best)
    assert sorted(found)[2] <= 1010
