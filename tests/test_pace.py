"""How much prefill there is between decode steps, against a machine whose steps and chunks take what they take."""

import pytest

from rheoserve_sgl.runtime.pace import FILLED, LEAST_CHUNK, LEAST_CHUNK_GPU, MOST_BETWEEN, SAVED, STALL, Pace
from rheoserve_sgl.runtime.step_clock import BLEND


class Machine:
    """Decodes and, when the pace lets it, prefills: chunks take `fixed` seconds and `rate` tokens a second, and steps
    `slower` times as long as is predicted."""

    def __init__(self, pace: Pace, step: float, fixed: float, rate: float, slower: float = 1.0):
        self.pace, self.step, self.fixed, self.rate, self.slower = pace, step, fixed, rate, slower
        self.told = 0  # steps that the pace has been told of
        self.mean = (0.0, 0.0)  # of late, seconds and tokens of a chunk
        self.steps, self.seconds, self.between = 0, 0.0, []

    def decode(self, steps: int):
        for _ in range(steps):
            self.pace.stepped(self.step)
        self.steps, self.seconds = self.steps + steps, self.seconds + steps * self.step * self.slower

    def prefill(self, chunks: int):
        """So many chunks, each as soon as it may."""
        for _ in range(chunks):
            before = self.steps
            while self.pace.waits:
                self.decode(1)
            self.between.append(self.steps - before)
            tokens = self.pace.chunk
            self.pace.held()
            took = self.fixed + tokens / self.rate
            weight = BLEND if self.mean[1] else 1.0
            self.mean = tuple(old + weight * (new - old) for old, new in zip(self.mean, (took, tokens), strict=True))
            self.seconds += took
            new, self.told = self.steps - self.told, self.steps
            self.pace.learn(new, new * self.step * self.slower, took, *self.mean)

    def token(self, chunks: int) -> float:
        """Seconds of a token on average, while so many chunks are prefilled."""
        steps, seconds = self.steps, self.seconds
        self.prefill(chunks)
        return (self.seconds - seconds) / (self.steps - steps)


@pytest.mark.parametrize("rate", [2e3, 2e4, 2e5])
@pytest.mark.parametrize("fixed", [0.0, 0.02])
@pytest.mark.parametrize("objective", [0.01, 0.02, 0.1])
def test_tokens_keep_the_objective_and_no_chunk_holds_them_up_for_long(rate, fixed, objective):
    pace = Pace(8, 8192, objective)
    machine = Machine(pace, 0.7 * objective, fixed, rate)
    machine.prefill(60)
    took = fixed + pace.chunk / rate
    assert pace.chunk % 64 == 0 and LEAST_CHUNK <= pace.chunk <= 8192
    assert took <= 1.05 * max(STALL * objective, fixed + LEAST_CHUNK / rate)
    if pace.chunk < 8192:  # and no smaller than it must be
        assert fixed + 2 * pace.chunk / rate > 0.9 * STALL * objective
    token = machine.token(60)
    assert 8 <= min(machine.between[60:]) and max(machine.between) <= MOST_BETWEEN
    if max(machine.between[60:]) < MOST_BETWEEN:
        assert token < 1.05 * objective
        assert token > 0.9 * objective or max(machine.between[60:]) == 8  # nor does it wait in vain


def test_what_tokens_did_not_need_pays_for_the_next_prompts():
    """A prompt after a long answer is read as without an objective; many of them are not."""
    machine = Machine(Pace(8, 2048, 0.02), 0.01, 0.0, 2e4)
    assert machine.token(100) < 1.05 * 0.02
    machine.decode(3000)
    saved = SAVED * (1 - FILLED) * 0.02
    paid = int(saved / (2048 / 2e4 - 8 * 0.01)) - 2  # a chunk takes so long, and eight steps save so much
    machine.between.clear()
    machine.prefill(paid)
    assert max(machine.between) == 8
    machine.prefill(100)
    assert machine.between[-1] > 8 and machine.token(100) < 1.05 * 0.02


def test_those_that_join_have_saved_nothing():
    pace = Pace(8, 2048, 0.02)
    machine = Machine(pace, 0.01, 0.0, 2e4)
    machine.prefill(3)
    machine.decode(1000)
    few = Machine(pace, 0.01, 0.0, 2e4)
    few.mean = machine.mean
    pace.joined(9, 10)
    few.prefill(30)
    assert max(few.between) > 8
    pace.joined(1, 1)
    machine.decode(1000)
    pace.rest()
    pace.held()
    for _ in range(8):
        pace.stepped(0.01)
    assert not pace.waits
    pace.learn(8, 0.08, 0.1, 0.1, 2048)
    assert pace.waits  # what others saved is not for those that come after them


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.2, 1.4])
def test_what_is_measured_counts_and_not_what_was_predicted(slower):
    machine = Machine(Pace(8, 2048, 0.02), 0.01, 0.0, 2e4, slower)
    machine.prefill(30)
    assert 0.95 * 0.02 < machine.token(100) < 1.03 * 0.02


def test_newcomers_have_nothing_of_what_was_saved_up_to_the_bound():
    """However long before, and though the chunk in front of them is measured after they joined."""
    pace = Pace(8, 2048, 0.02)
    for _ in range(5 * SAVED):
        pace.stepped(0.01)
    pace.learn(5 * SAVED, 5 * SAVED * 0.01, 0.0, 0.0, 0.0)
    pace.joined(9, 10)
    pace.learn(0, 0.0, 0.2, 0.2, 2048)
    pace.held()
    for _ in range(8):
        pace.stepped(0.02)
    bound = SAVED * (1 - FILLED) * 0.02
    pace.learn(8, 0.16, 0.1 * bound - 0.2 + 0.01, 0.2, 2048)  # all that a tenth had, and a little more
    assert pace.waits


def test_an_objective_that_cannot_be_kept_stops_no_prompt_for_long():
    machine = Machine(Pace(8, 2048, 0.02), 0.03, 0.0, 2e4)
    machine.prefill(20)
    assert machine.between[-1] == MOST_BETWEEN
    machine.step = 0.005
    machine.decode(SAVED)
    machine.between.clear()
    machine.prefill(2)
    assert max(machine.between) <= 8


def test_steps_that_become_fast_shorten_the_wait():
    machine = Machine(Pace(8, 2048, 0.02), 0.019, 0.0, 2e4)
    machine.prefill(10)
    machine.decode(20)
    assert machine.pace.waits
    machine.step = 0.002
    machine.decode(9)
    assert not machine.pace.waits


@pytest.mark.parametrize("between", [8, 200])
def test_a_prompt_that_must_go_on_waits_no_longer(between):
    pace = Pace(between, 2048, None)
    pace.held()
    assert pace.waits
    pace.go()
    assert not pace.waits


def test_short_prompts_are_paid_by_what_they_took():
    """As one of 200 tokens may take as long as one of 2,000."""
    pace = Pace(8, 8192, 0.02)
    steps = told = 0
    for _ in range(100):
        pace.held()
        pace.learn(steps - told, (steps - told) * 0.01, 0.2, 0.0, 0.0)
        told = steps
        while pace.waits:
            pace.stepped(0.01)
            steps += 1
    assert (steps * 0.01 + 100 * 0.2) / steps < 1.05 * 0.02


def test_a_chunk_grows_again_when_chunks_become_fast():
    machine = Machine(Pace(8, 4096, 0.02), 0.01, 0.0, 5e3)
    machine.prefill(20)
    assert machine.pace.chunk < 1024
    machine.rate = 1e6
    machine.prefill(20)
    assert machine.pace.chunk == 4096 and machine.between[-1] == 8


@pytest.mark.parametrize(("between", "objective"), [(8, None), (0, 0.01)])
def test_without_an_objective_or_steps_between_nothing_is_learnt(between, objective):
    machine = Machine(Pace(between, 4096, objective), 0.02, 1.0, 1e3)
    machine.prefill(20)
    assert set(machine.between[1:]) == {between} and machine.pace.chunk == 4096


def test_whole_prompts_stay_whole_and_small_chunks_as_a_user_asked_for_them():
    whole, small = Pace(4, None, 0.02), Pace(8, 256, 0.001)
    small.learn(0, 0.0, 1.0, 1.0, 256)
    whole.held()
    whole.learn(0, 0.0, 0.2, 0.2, 9000)
    assert whole.chunk is None and small.chunk == 256
    for steps in range(20):
        assert whole.waits == (steps < 20)
        whole.stepped(0.01)
    assert not whole.waits


def test_a_chunk_has_as_many_tokens_as_the_device_makes_worth_while():
    pace = Pace(8, 8192, 0.001, gpu=True)
    for _ in range(5):
        pace.learn(0, 0.0, 0.5, 0.5, 8192)
    assert pace.chunk == LEAST_CHUNK_GPU
    pace = Pace(8, 8192, 0.016, gpu=True)
    pace.learn(0, 0.0, 0.5, 0.5, 8192)  # as long as 31 tokens may take
    assert pace.chunk == 8192
