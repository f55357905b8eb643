"""The pace and the door under a simulated load: every request's tokens keep the objective on average.

Times are roughly those of an 8B model with 12 GB of frames on one H200 (docs/results.md, "Under load").
"""

import random
from dataclasses import dataclass

import pytest

from rheoserve_sgl.runtime.pace import FILLED, Pace
from rheoserve_sgl.runtime.step_clock import BLEND


@dataclass
class Request:
    arrives: float
    prompt: int
    answer: int
    read: int = 0
    told: int = 0
    first: float = 0.0
    ended: float = 0.0

    @property
    def token(self) -> float:
        """Seconds of each further token."""
        return (self.ended - self.first) / (self.answer - 1)


def step_seconds(requests: int) -> float:
    return 0.006 + 0.00072 * requests


def chunk_seconds(tokens: int, prefix: int) -> float:
    """Its layers multiply, or wait for the prefix to be staged."""
    return max(0.03 + 47e-6 * tokens * (1 + prefix / 200_000), 0.02 + 2.9e-6 * prefix)


def serve(
    objective: float | None, seed: int, rate: float = 0.2, seconds: float = 150.0, slower: float = 1.0
) -> list[Request]:
    """What a server makes of a random load, one prompt at a time beside those that decode.

    Args:
        slower: steps take so many times what is predicted
    """
    draw, at, load = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        load.append(Request(at, draw.randint(16384, 65536), draw.randint(2048, 6144)))
    pace, now, mean, steps, stepping = Pace(8, 8192, objective, gpu=True), 0.0, (0.0, 0.0), 0, 0.0
    waiting, running, begun = list(load), [], None
    while waiting or running or begun:
        arrived = bool(waiting) and waiting[0].arrives <= now
        opens = not running or objective is None or step_seconds(len(running) + 1) <= FILLED * objective
        if (begun or (arrived and opens)) and not (running and pace.waits):
            begun = begun or waiting.pop(0)
            tokens = min(pace.chunk if running else 8192, begun.prompt - begun.read)
            took = chunk_seconds(tokens, begun.read)
            if not running:
                pace.rest()
            pace.held()
            now, begun.read = now + took, begun.read + tokens
            weight = BLEND if mean[1] else 1.0
            mean = tuple(old + weight * (new - old) for old, new in zip(mean, (took, tokens), strict=True))
            pace.learn(steps, stepping, took if running else 0.0, *mean)
            steps, stepping = 0, 0.0
            if begun.read == begun.prompt:
                begun.first, begun.told = now, 1
                running.append(begun)
                begun = None
                pace.joined(1, len(running))
        elif running:
            predicted = step_seconds(len(running))
            pace.stepped(predicted)
            steps, stepping, now = steps + 1, stepping + slower * predicted, now + slower * predicted
            for request in running:
                request.told += 1
                request.ended = now
            running = [request for request in running if request.told < request.answer]
            if not running:
                pace.rest()
                steps, stepping = 0, 0.0
        else:
            now = waiting[0].arrives
    return load


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("objective", [0.01, 0.012, 0.014, 0.016])
def test_tokens_keep_an_objective_that_the_load_would_break(objective, seed):
    served = serve(objective, seed)
    assert max(one.token for one in served) < 1.03 * objective
    assert max(one.token for one in serve(None, seed)) > 1.03 * objective  # else this could not tell
    assert all(one.told == one.answer for one in served)


@pytest.mark.parametrize("slower", [0.95, 1.1])
def test_tokens_keep_an_objective_where_steps_do_not_take_what_is_predicted(slower):
    served = serve(0.016, 1, slower=slower)
    assert max(one.token for one in served) < 1.05 * 0.016  # the door goes by what is predicted


def test_an_objective_that_the_load_keeps_by_itself_delays_little():
    free, served = serve(None, 1), serve(0.06, 1)
    later = [mine.first - theirs.first for mine, theirs in zip(served, free, strict=True)]
    assert max(one.token for one in served) < 0.04 and sum(later) / len(later) < 1.0
