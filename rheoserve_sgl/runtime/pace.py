"""The pace of prefill beside those that decode: how many of their steps come between its chunks, and how large a chunk
is. A chunk holds up all that decode, so an objective for the time of a token sets both."""

import math

from rheoserve_sgl import PAGE_TOKENS

MOST_BETWEEN = 64  # decode steps between two batches of a prefill, whatever the objective asks for
STALL = 8  # a chunk holds up those that decode for as many tokens' time, at most
LEAST_CHUNK = 512  # tokens: fewer take hardly less time
FASTEST = 2  # a chunk becomes at most so many times as large at once: its time does not follow its size exactly
FILLED = 0.85  # of a token's time may go to its decode step; the rest is for chunks


class Pace:
    """Learns from what steps and chunks took; all ranks of a tensor-parallel group are told the same.

    between: decode steps before the next batch of a prefill
    chunk: tokens of a chunk while others decode; None: prompts are not cut

    Args:
        between: decode steps, at least; 0: prefill never waits
        chunk: tokens, at most
        objective: seconds that a token may take on average; None: any
    """

    def __init__(self, between: int, chunk: int | None, objective: float | None):
        self._least, self._most, self._objective = between, chunk, objective
        self.between, self.chunk = between, chunk
        self.learns = objective is not None and between > 0

    def learn(self, step: float, chunk_seconds: float, chunk_tokens: float):
        """Take in the seconds of a decode step, and those and the tokens of a chunk, means of late (0.0: none yet)."""
        objective = self._objective
        if not self.learns or not chunk_seconds or not chunk_tokens:
            return
        if self.chunk is not None:
            fits = chunk_tokens * STALL * objective / chunk_seconds
            fits = min(fits, self.chunk * FASTEST)
            fits = int(max(fits, LEAST_CHUNK)) // PAGE_TOKENS * PAGE_TOKENS
            self.chunk = min(fits, self._most)
            chunk_seconds *= self.chunk / max(chunk_tokens, self.chunk)
        # A token takes its step and its part of the chunk before it.
        spare = max(objective - step, 1e-9)
        self.between = min(max(math.ceil(chunk_seconds / spare), self._least), MOST_BETWEEN)
