"""Laws of interleaved timing, on a clock that the tests drive themselves."""

import gc

import numpy as np
import pytest

from kompakt.errors import InputError
from kompakt.measure.latency import MAX_REPEATS, SAMPLE_NS, interleave, ratio_interval

MS = 1_000_000


class Machine:
    """A clock and callables that move it on; ``slowdown`` maps the time to a factor."""

    def __init__(self, slowdown=lambda now: 1.0):
        self.now, self.calls, self.slowdown = 0, [], slowdown

    def clock(self) -> int:
        return self.now

    def run(self, name: str, duration_ns: float):
        def call() -> None:
            self.calls.append(name)
            self.now += round(duration_ns * self.slowdown(self.now))

        return call


def test_times_and_ratio_are_those_of_the_clock():
    machine = Machine()
    runs = {"base": machine.run("base", 10 * MS), "small": machine.run("small", 4 * MS)}
    times = interleave(runs, rounds=20, clock=machine.clock)
    assert times["base"].p50_ms == times["base"].p90_ms == 10
    assert times["small"].p50_ms == 4
    assert times["small"].ratio == pytest.approx(0.4)
    assert times["small"].ratio_ci95 == pytest.approx((0.4, 0.4))
    assert times["base"].ratio == 1


def test_a_machine_that_slows_down_favours_neither():
    machine = Machine(slowdown=lambda now: 1 + now / 1e9)
    runs = {"base": machine.run("base", 5 * MS), "same": machine.run("same", 5 * MS)}
    times = interleave(runs, rounds=200, precision=0, clock=machine.clock)
    low, high = times["same"].ratio_ci95
    assert times["base"].samples_ms[-1] > 5 * times["base"].samples_ms[0]
    assert low <= 1 <= high
    assert high - low < 0.05


def test_noise_that_hits_whole_rounds_leaves_the_ratio_alone():
    rng = np.random.default_rng(0)
    factors = rng.choice([1.0, 3.0], size=4000)
    machine = Machine(slowdown=lambda now: factors[now // (400 * MS) % 4000])
    runs = {"base": machine.run("base", 10 * MS), "half": machine.run("half", 5 * MS)}
    times = interleave(runs, rounds=300, seconds=1e6, precision=0, clock=machine.clock)
    assert times["base"].p90_ms == 30
    assert times["half"].ratio == pytest.approx(0.5, abs=1e-6)


def test_the_order_is_drawn_anew_in_each_round_and_from_the_seed():
    def order(seed: int) -> list[str]:
        machine = Machine()
        runs = {name: machine.run(name, MS) for name in "abc"}
        interleave(runs, warmup=1, rounds=20, seed=seed, clock=machine.clock)
        return machine.calls[3::2]  # after the warm-up, every second call is the timed one

    calls = order(0)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 20
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert order(0) == calls != order(1)


def test_each_sample_follows_an_untimed_call_of_its_own():
    machine = Machine()
    interleave({"a": machine.run("a", MS), "b": machine.run("b", MS)}, warmup=2, rounds=5, clock=machine.clock)
    timed = machine.calls[4:]
    assert len(timed) == 5 * 2 * 2
    assert all(timed[i] == timed[i + 1] for i in range(0, len(timed), 2))


def test_short_calls_are_repeated_until_a_sample_is_long():
    machine = Machine()
    runs = {"short": machine.run("short", 7_000), "long": machine.run("long", MS)}
    times = interleave(runs, warmup=1, rounds=1, clock=machine.clock)
    repeats = -(-SAMPLE_NS // 7_000)
    assert machine.calls.count("short") == 1 + 1 + repeats
    assert times["short"].runs == repeats
    assert times["long"].runs == 1
    assert times["short"].p50_ms == pytest.approx(0.007)


def test_a_clock_that_stands_still_does_not_hang():
    machine = Machine()
    times = interleave({"nothing": machine.run("nothing", 0)}, rounds=1, clock=machine.clock)
    assert times["nothing"].runs == MAX_REPEATS


def test_it_ends_when_the_ratio_is_narrow_enough():
    rng = np.random.default_rng(1)

    def rounds_taken(precision: float) -> int:
        machine = Machine(slowdown=lambda now: rng.lognormal(sigma=0.1))
        runs = {"base": machine.run("base", 10 * MS), "other": machine.run("other", 6 * MS)}
        found = interleave(runs, rounds=2000, seconds=1e6, precision=precision, clock=machine.clock)["other"]
        assert found.ratio == pytest.approx(0.6, rel=0.1)
        if found.runs < 2000:
            assert (found.ratio_ci95[1] - found.ratio_ci95[0]) / 2 <= precision * found.ratio
        return found.runs

    taken = [rounds_taken(precision) for precision in (0.1, 0.03, 0.01)]
    assert taken[0] < taken[1] < taken[2] < 2000


def test_it_ends_when_the_seconds_are_spent():
    machine = Machine()
    runs = {"base": machine.run("base", 100 * MS), "other": machine.run("other", 100 * MS)}
    times = interleave(runs, seconds=2, precision=0, clock=machine.clock)
    assert 2e9 <= machine.now <= 2.4e9
    assert 1 <= times["base"].runs == times["other"].runs


def test_timed_alone_it_takes_all_its_rounds():
    machine = Machine()
    assert interleave({"alone": machine.run("alone", MS)}, rounds=77, clock=machine.clock)["alone"].runs == 77


def test_one_round_is_taken_even_without_time():
    machine = Machine()
    times = interleave({"slow": machine.run("slow", 9e9)}, warmup=1, seconds=0.1, clock=machine.clock)
    assert times["slow"].p50_ms == 9000


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_timing(enabled):
    seen, machine = [], Machine()
    run = machine.run("a", MS)

    def breaks_late() -> None:
        seen.append(gc.isenabled())
        if len(seen) > 5:
            raise ValueError("broken")
        run()

    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ValueError, match="broken"):
            interleave({"a": breaks_late}, warmup=1, clock=machine.clock)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert not any(seen[1:])


def test_nothing_to_time_is_an_error():
    with pytest.raises(InputError, match="nothing to time"):
        interleave({})


def test_the_interval_of_the_ratio_covers_the_true_ratio():
    rng, covered = np.random.default_rng(2), 0
    for trial in range(300):
        machine = rng.lognormal(sigma=0.5, size=60)  # hits both of a round
        base, own = (value * machine * rng.lognormal(sigma=0.05, size=60) for value in (3.0, 2.0))
        ratio, (low, high) = ratio_interval(own, base, seed=trial)
        assert low <= ratio <= high
        covered += low <= 2 / 3 <= high
    assert 0.91 <= covered / 300 <= 0.99


def test_times_fit_the_result_schema():
    machine = Machine()
    times = interleave({"base": machine.run("base", 2 * MS)}, rounds=7, clock=machine.clock)
    latency = times["base"].latency(threads=1, batch=4)
    assert (latency.p50, latency.p90, latency.threads, latency.batch, latency.runs) == (2, 2, 1, 4, 7)
