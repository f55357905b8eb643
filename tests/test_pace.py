"""How much prefill there is between decode steps, against a machine whose steps and chunks take what they take."""

import pytest

from rheoserve_sgl.runtime.pace import LEAST_CHUNK, MOST_BETWEEN, STALL, Pace
from rheoserve_sgl.runtime.step_clock import BLEND


def settle(pace: Pace, step: float, fixed: float, rate: float, rounds: int = 40) -> float:
    """Let it learn from chunks of so many seconds and tokens a second; returns what its last chunk took."""
    seconds = tokens = 0.0
    for _ in range(rounds):
        took = fixed + pace.chunk / rate
        weight = BLEND if tokens else 1.0
        seconds, tokens = seconds + weight * (took - seconds), tokens + weight * (pace.chunk - tokens)
        pace.learn(step, seconds, tokens)
    return fixed + pace.chunk / rate


@pytest.mark.parametrize("rate", [2e3, 2e4, 2e5])
@pytest.mark.parametrize("fixed", [0.0, 0.02])
@pytest.mark.parametrize("objective", [0.01, 0.02, 0.1])
def test_a_token_takes_no_longer_than_it_may_and_waits_no_longer_than_a_few_of_them(rate, fixed, objective):
    pace, step = Pace(8, 8192, objective), 0.7 * objective
    took = settle(pace, step, fixed, rate)
    assert pace.chunk % 64 == 0 and LEAST_CHUNK <= pace.chunk <= 8192 and 8 <= pace.between <= MOST_BETWEEN
    least = fixed + LEAST_CHUNK / rate
    assert took <= max(1.05 * STALL * objective, 1.05 * least)
    if pace.between < MOST_BETWEEN:
        assert step + took / pace.between <= 1.05 * objective
    if pace.chunk < 8192:  # and no smaller than it must be
        assert fixed + 2 * pace.chunk / rate > 0.9 * STALL * objective


def test_a_chunk_grows_again_when_chunks_become_fast():
    pace = Pace(8, 4096, 0.02)
    settle(pace, 0.01, 0.0, 5e3)
    assert pace.chunk < 1024
    settle(pace, 0.01, 0.0, 1e6)
    assert pace.chunk == 4096 and pace.between == 8


@pytest.mark.parametrize("pace", [Pace(8, 4096, None), Pace(0, 4096, 0.01)])
def test_without_an_objective_or_steps_between_nothing_changes(pace):
    between = pace.between
    pace.learn(0.02, 5.0, 4096)
    assert (pace.between, pace.chunk) == (between, 4096)


def test_before_the_first_chunk_there_is_nothing_to_learn_and_whole_prompts_stay_whole():
    pace = Pace(4, None, 0.02)
    pace.learn(0.01, 0.0, 0.0)
    assert pace.between == 4
    pace.learn(0.01, 0.2, 9000)
    assert pace.chunk is None and pace.between == 20
    pace.learn(0.03, 0.2, 9000)  # steps alone take longer
    assert pace.between == MOST_BETWEEN


def test_small_chunks_that_a_user_asked_for_stay_as_they_are():
    pace = Pace(8, 256, 0.001)
    pace.learn(0.0005, 1.0, 256)
    assert pace.chunk == 256
