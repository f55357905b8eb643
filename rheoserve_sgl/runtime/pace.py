"""The pace of prefill beside those that decode: how many of their steps come between its chunks, and how large a chunk
is, where there is an objective for the time that a token takes on average.

The time that tokens need less than the objective is saved up, and chunks are paid with it: while enough is saved they
follow one another as without an objective. A chunk is as small as is good for those that it holds up, but not so small
that the prompt takes much longer for it, which would hold them up more in the end.
"""

import math

from rheoserve_sgl import PAGE_TOKENS

MOST_BETWEEN = 256  # decode steps between two batches of a prefill, for an objective that steps alone keep
HOPELESS = 64  # for one that they do not
STALL = 8  # a chunk holds up those that decode for as many tokens' time, at most,
USEFUL = 0.75  # but so much of its time is for its own tokens, at least
LEAST_CHUNK = 512  # tokens
FASTEST = 2  # a chunk becomes at most so many times as large at once
FILLED, HELD = 0.85, 1.0  # of a token's time may go to a decode step, where one joins, where none does
SAVED = 1024  # decode steps whose time to spare is kept: some part of a long answer


class Pace:
    """Told the same on all ranks of a tensor-parallel group, it says the same.

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
        self._step = self._fixed = self._each = 0.0
        self._saved = 0.0  # seconds

    def learn(self, step: float, fixed: float, each: float):
        """Take in the seconds of a decode step, of a chunk beside its tokens, and of each of its tokens, of late."""
        if not self.learns or not each:
            return
        self._step, self._fixed, self._each = step, fixed, each
        if self.chunk is not None:
            short = (STALL * self._objective - fixed) / each
            useful = fixed / each * USEFUL / (1 - USEFUL)
            fits = min(max(short, useful, LEAST_CHUNK), self.chunk * FASTEST)
            self.chunk = min(int(fits) // PAGE_TOKENS * PAGE_TOKENS, self._most)

    def stepped(self):
        """A decode step is about to run."""
        if self.learns and self._step:
            spare = self._objective - self._step
            self._saved = min(self._saved + spare, SAVED * max(spare, 0.0))

    def held(self, tokens: int):
        """A batch of a prefill of so many tokens is about to hold up those that decode."""
        if not self.learns or not self._each:
            return
        spare = self._objective - self._step
        owed = self._fixed + self._each * tokens - self._saved
        # An objective that cannot be kept leaves no debts for when it can.
        self._saved = -min(owed, MOST_BETWEEN * max(spare, 0.0))
        steps = 0 if owed <= 0 else HOPELESS if spare <= 0 else min(math.ceil(owed / spare), MOST_BETWEEN)
        self.between = max(steps, self._least)
