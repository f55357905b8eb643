"""The latency model: its prior, what it learns from a machine that behaves otherwise, and the clock it learns by."""

import random

import numpy as np
import pytest

from rheoserve_sgl.runtime.latency_model import LatencyModel, Rates, StepLoad
from rheoserve_sgl.runtime.step_clock import DECODE, NOTHING, PREFILL, StepClock

GB = 1e9
GPU = Rates(device=3000 * GB, host=100 * GB, beside=True)


def loads(count: int, seed: int) -> list[StepLoad]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        requests = int(draw.choice([1, 4, 8, 16]))
        whole = requests * float(draw.choice([0.3, 2.4, 9.7])) * GB
        found.append(StepLoad(requests, min(whole, 24 * GB), whole / 64, draw.uniform(0, 0.2) * requests * 0.6 * GB))
    return found


def test_before_anything_was_measured_it_says_what_the_rates_say():
    model = LatencyModel(GPU, weight_bytes=16 * GB)
    nothing, resident = StepLoad(1, 0, 0, 0), StepLoad(1, 9 * GB, 0, 0)
    assert model.predict(nothing) == pytest.approx(0.002 + 16 / 3000, rel=0.05)
    assert model.predict(resident) - model.predict(nothing) == pytest.approx(0.003)
    # The CPU's 0.2 GB take 2 ms, which 3 ms of resident blocks hide; 0.8 GB take 5 ms longer than those.
    assert model.predict(StepLoad(1, 9 * GB, 0, 0.2 * GB)) == model.predict(resident)
    assert model.predict(StepLoad(1, 9 * GB, 0, 0.8 * GB)) - model.predict(resident) == pytest.approx(0.005)
    alone = LatencyModel(Rates(100 * GB, 100 * GB, beside=False), 0)
    assert alone.predict(StepLoad(1, 9 * GB, 0, 1 * GB)) - alone.predict(resident) == pytest.approx(0.01)


@pytest.mark.parametrize("factors", [(1.2, 3.0, 0.9, 4.0, 1.3), (0.7, 0.2, 1.2, 1.0, 0.6)])
def test_it_learns_another_machine_within_a_tenth(factors):
    model, draw = LatencyModel(GPU, weight_bytes=16 * GB), np.random.default_rng(0)

    def takes(load: StepLoad) -> float:
        return float(model.terms(load) @ np.array(factors))

    for load in loads(60, seed=1):
        model.observe(load, takes(load) * draw.normal(1.0, 0.02))
    errors = [abs(model.predict(load) / takes(load) - 1) for load in loads(200, seed=2)]
    assert np.median(errors) < 0.03 and max(errors) < 0.1
    assert model.windows == 60 and (model.factors >= 0).all()


def test_one_load_over_and_over_is_soon_predicted_and_follows_a_change():
    model, load = LatencyModel(GPU, 16 * GB), StepLoad(12, 24 * GB, 0.4 * GB, 0.4 * GB)
    for _ in range(5):
        model.observe(load, 0.020)
    assert model.predict(load) == pytest.approx(0.020, rel=0.02)
    for _ in range(60):
        model.observe(load, 0.030)
    assert model.predict(load) == pytest.approx(0.030, rel=0.05)


def test_one_long_window_says_little_of_other_loads():
    model, others = LatencyModel(GPU, 16 * GB), loads(50, seed=4)
    for load in loads(100, seed=3):
        model.observe(load, model.terms(load).sum())
    before = [model.predict(load) for load in others]
    load = StepLoad(8, 20 * GB, 0.3 * GB, 0.4 * GB)
    model.observe(load, 1.3 * model.predict(load))
    after = [model.predict(load) for load in others]
    assert max(abs(now / then - 1) for now, then in zip(after, before, strict=True)) < 0.05


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("overlap", [False, True])
def test_the_clock_gives_each_batch_its_own_time(overlap):
    """A loop as SGLang's, with or without its overlap: decode steps take 1, a chunk 10, and idling is nobody's."""
    time = Time()
    clock, took, queue = StepClock(overlap, time), {DECODE: 1.0, PREFILL: 10.0, NOTHING: 3.0}, []
    kinds = [NOTHING, PREFILL, *[DECODE] * 9, PREFILL, *[DECODE] * 7, NOTHING, NOTHING]
    for kind in kinds:
        clock.tick()
        clock.launched(kind, 512 if kind == PREFILL else 0)
        queue.append(kind)
        if not overlap or len(queue) > 1:
            time.now += took[queue.pop(0)]
    assert clock.chunk_seconds == pytest.approx(10.0) and clock.chunk_tokens == 512
    assert clock.step_seconds == pytest.approx(1.0) and clock.steps >= 10
    clock.restart()
    assert clock.steps == 0 and clock.step_seconds == 0.0 and clock.chunk_seconds == pytest.approx(10.0)


def test_a_paused_server_makes_no_long_step_and_long_chunks_are_learnt():
    time = Time()
    clock = StepClock(False, time)

    def iterations(kind: str, *seconds: float, tokens: int = 100):
        for took in seconds:
            clock.tick()
            clock.launched(kind, tokens)
            time.now += took

    iterations(DECODE, *[1.0] * 10)
    clock.restart()
    iterations(DECODE, 1.0, 500.0, *[1.0] * 20)
    assert clock.step_seconds < 1.6
    iterations(PREFILL, *[0.1] * 5, *[4.0] * 20)
    assert clock.chunk_seconds == pytest.approx(4.0, rel=0.05)
    iterations(PREFILL, *[400.0] * 3, tokens=10000)  # far longer, for as many more tokens
    assert clock.chunk_seconds / clock.chunk_tokens == pytest.approx(0.04, rel=0.05)
    iterations(PREFILL, 1e6, tokens=10000)
    assert clock.chunk_seconds < 2000


def test_a_chunk_that_begins_beside_the_step_in_front_of_it_takes_that_time_too():
    """With overlap a chunk is launched while a step runs; if that takes longer than the step, some of it has run."""
    time = Time()
    clock = StepClock(True, time)
    for kind, took in [(DECODE, 1.0)] * 12 + [
        (PREFILL, 3.0),
        (DECODE, 7.0),
        (DECODE, 1.0),
        (PREFILL, 0.5),
        (DECODE, 9.0),
    ]:
        clock.tick()
        clock.launched(kind, 512 if kind == PREFILL else 0)
        time.now += took
    assert clock.chunk_seconds == pytest.approx(2.0 + 7.0)
    clock.tick()
    assert clock.chunk_seconds == pytest.approx(9.0) and clock.step_seconds == pytest.approx(1.0)


def test_a_few_tokens_say_nothing_of_a_chunk():
    time = Time()
    clock = StepClock(False, time, least=512)
    for tokens, took in ((64, 9.0), (512, 1.0), (511, 9.0), (0, 0.0)):
        clock.tick()
        clock.launched(PREFILL, tokens)
        time.now += took
    assert (clock.chunks, clock.chunk_seconds, clock.chunk_tokens) == (1, 1.0, 512)
    assert clock.prefills == 3 and clock.held_seconds == 0.0


def test_only_what_others_wait_for_holds_them_up():
    time = Time()
    clock = StepClock(False, time, least=512)
    for tokens, took, beside in ((512, 1.0, False), (64, 2.0, True), (512, 4.0, True), (0, 0.0, False)):
        clock.tick()
        clock.launched(PREFILL, tokens, beside)
        time.now += took
    assert clock.held_seconds == 6.0


@pytest.mark.parametrize("overlap", [False, True])
def test_all_the_time_that_tokens_waited_is_counted_once(overlap):
    """Whatever is a chunk's of an iteration and what a step's: together they are all iterations but the first ones, in
    which kernels are compiled."""
    time, draw, total = Time(), random.Random(3), 0.0
    clock, first = StepClock(overlap, time, least=512), 3 if overlap else 1
    for number in range(300):
        clock.tick()
        counted = clock.decoded_seconds + clock.held_seconds + clock._ahead
        assert counted == pytest.approx(total if number > first else 0.0)
        kind = PREFILL if number > 20 and draw.random() < 0.2 else DECODE
        clock.launched(kind, 512 if kind == PREFILL else 0, beside=kind == PREFILL)
        took = draw.uniform(0.9, 1.1)
        time.now += took
        total += took if number >= first else 0.0
    assert clock.decoded + clock.prefills == 299 - first


def test_a_chunk_under_way_holds_nobody_up_when_nothing_decodes_any_more():
    time = Time()
    clock = StepClock(True, time, least=512)
    for kind, beside, took in (
        (DECODE, False, 1.0),
        (PREFILL, True, 0.5),
        (PREFILL, False, 0.5),
        (PREFILL, False, 0.5),
    ):
        clock.tick()
        clock.launched(kind, 512, beside)
        if kind == PREFILL and not beside:
            clock.rest()
        time.now += took
    clock.tick()
    assert clock.prefills == 2 and clock.held_seconds == 0.0
