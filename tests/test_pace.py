"""How much prefill there is between decode steps, against a machine whose steps and chunks take what they take."""

import random

import pytest

from rheoserve_sgl.runtime.chunk_time import ChunkTime
from rheoserve_sgl.runtime.pace import HOPELESS, LEAST_CHUNK, MOST_BETWEEN, SAVED, STALL, USEFUL, Pace


class Machine:
    """Chunks take `fixed` seconds and `rate` tokens a second, decode steps `step` seconds."""

    def __init__(self, pace: Pace, step: float, fixed: float, rate: float):
        self.pace, self.step, self.fixed, self.rate = pace, step, fixed, rate
        self.times, self.steps, self.seconds = ChunkTime(), 0, 0.0
        self.longest = 0  # steps between two chunks

    def decode(self, steps: int):
        for _ in range(steps):
            self.pace.stepped()
        self.steps, self.seconds = self.steps + steps, self.seconds + steps * self.step

    def prefill(self, chunks: int, last: int | None = None):
        """So many chunks with their steps between, of `last` tokens the last one."""
        for number in range(chunks):
            self.pace.learn(self.step, self.times.fixed, self.times.each)
            tokens = last if last and number + 1 == chunks else self.pace.chunk
            self.pace.held(tokens)
            took = self.fixed + tokens / self.rate
            self.times.observe(took, tokens)
            self.seconds += took
            self.longest = max(self.longest, self.pace.between)
            self.decode(self.pace.between)

    @property
    def token(self) -> float:
        """Seconds of a token, on average."""
        return self.seconds / self.steps


@pytest.mark.parametrize("rate", [2e3, 2e4, 2e5])
@pytest.mark.parametrize("fixed", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("objective", [0.01, 0.02, 0.1])
def test_tokens_keep_the_objective_and_chunks_are_as_short_as_is_useful(rate, fixed, objective):
    pace = Pace(8, 8192, objective)
    machine = Machine(pace, 0.7 * objective, fixed, rate)
    for round_ in range(40):
        machine.prefill(3, last=64 + 97 * round_)
    assert pace.chunk % 64 == 0 and LEAST_CHUNK <= pace.chunk <= 8192 and 8 <= pace.between <= MOST_BETWEEN
    took = fixed + pace.chunk / rate
    useful = min(fixed / (1 - USEFUL), fixed + 8192 / rate)
    assert took <= 1.1 * max(STALL * objective, useful, fixed + LEAST_CHUNK / rate)
    if pace.chunk < 8192:  # and no shorter than it may be
        assert took + 64 / rate > 0.9 * max(STALL * objective, useful)
    if machine.longest < MOST_BETWEEN:
        assert machine.token < 1.1 * objective


def test_what_tokens_did_not_need_pays_for_the_next_prompts():
    """A prompt after a long answer is read as without an objective; many of them are not."""
    pace = Pace(8, 2048, 0.02)
    machine = Machine(pace, 0.01, 0.0, 2e4)
    machine.prefill(8)
    machine.decode(3000)
    before = machine.seconds, machine.steps
    machine.prefill(80)
    paid = SAVED * 0.01 / (0.1 - 8 * 0.01)  # chunks, of which each takes 0.1 s and its steps save 0.08 s
    assert machine.steps - before[1] < 80 * 8 + 50 and paid > 80
    machine.prefill(1000)
    late = machine.seconds, machine.steps
    machine.prefill(200)
    assert pace.between >= 10 and (machine.seconds - late[0]) / (machine.steps - late[1]) < 1.02 * 0.02


def test_an_objective_that_cannot_be_kept_leaves_no_debts():
    pace = Pace(8, 2048, 0.02)
    machine = Machine(pace, 0.03, 0.0, 2e4)
    machine.prefill(50)
    assert pace.between == HOPELESS
    machine.step = 0.005
    machine.prefill(2)
    assert pace.between == 8


def test_a_chunk_grows_again_when_chunks_become_fast():
    pace = Pace(8, 4096, 0.02)
    machine = Machine(pace, 0.01, 0.0, 5e3)
    machine.prefill(20)
    assert pace.chunk < 1024
    machine.rate = 1e6
    machine.prefill(20)
    assert pace.chunk == 4096 and pace.between == 8


@pytest.mark.parametrize("pace", [Pace(8, 4096, None), Pace(0, 4096, 0.01)])
def test_without_an_objective_or_steps_between_nothing_changes(pace):
    between = pace.between
    pace.learn(0.02, 5.0, 0.001)
    pace.held(4096)
    assert (pace.between, pace.chunk) == (between, 4096)


def test_before_the_first_chunk_there_is_nothing_to_learn_and_whole_prompts_stay_whole():
    pace = Pace(4, None, 0.02)
    pace.learn(0.01, 0.0, 0.0)
    pace.held(9000)
    assert pace.between == 4
    pace.learn(0.01, 0.02, 0.00002)
    pace.held(9000)
    assert pace.chunk is None and pace.between == 20
    pace.learn(0.03, 0.02, 0.00002)  # steps alone take longer
    pace.held(9000)
    assert pace.between == HOPELESS


def test_small_chunks_that_a_user_asked_for_stay_as_they_are():
    pace = Pace(8, 256, 0.001)
    pace.learn(0.0005, 0.0, 0.004)
    assert pace.chunk == 256


@pytest.mark.parametrize(("fixed", "each"), [(0.0, 5e-5), (0.1, 5e-5), (0.02, 1e-6)])
def test_the_parts_of_a_chunks_time_are_told_apart(fixed, each):
    draw, times = random.Random(0), ChunkTime()
    for _ in range(100):
        tokens = draw.randint(512, 8192)
        times.observe((fixed + each * tokens) * draw.uniform(0.98, 1.02), tokens)
    assert times.fixed == pytest.approx(fixed, abs=0.1 * times.seconds)
    assert times.fixed + times.each * times.tokens == pytest.approx(times.seconds)
    for _ in range(50):  # all of one size tell nothing new
        times.observe(fixed + each * 2048, 2048)
    assert times.fixed == pytest.approx(fixed, abs=0.15 * (fixed + each * 2048))


def test_chunks_of_one_size_take_so_much_for_each_token():
    times = ChunkTime()
    assert times.each == times.fixed == 0.0
    for _ in range(10):
        times.observe(0.5, 1000)
    assert times.each == pytest.approx(0.0005) and times.fixed == pytest.approx(0.0)
