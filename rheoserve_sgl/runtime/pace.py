"""The pace of prefill beside those that decode, where there is an objective for the time that a token takes on average:
when the next chunk may hold them up, and how large it is.

The time that tokens need less than the objective is saved up, and chunks are paid with it: while enough is saved they
follow one another as without an objective.
"""

from rheoserve_sgl import PAGE_TOKENS

MOST_BETWEEN = 128  # decode steps between two batches of a prefill, whatever the objective asks for
# A chunk holds up those that decode for as many tokens' time, at most, but has so many tokens at least. On a GPU what
# a chunk takes besides (launching its layers, staging the prefix) is as much as some thousand tokens take, so that
# smaller ones would hold the others up for longer in the end.
STALL, STALL_GPU = 8, 32
LEAST_CHUNK, LEAST_CHUNK_GPU = 512, 4096
FASTEST = 2  # a chunk becomes at most so many times as large at once: its time does not follow its size exactly
FILLED = 0.85  # of a token's time may go to a decode step where one joins; the rest is for chunks
SAVED = 1024  # tokens whose time for chunks is kept, at most: some part of a long answer


class Pace:
    """Told the same on all ranks of a tensor-parallel group, it says the same.

    chunk: tokens of a chunk while others decode; None: prompts are not cut

    Args:
        between: decode steps between two batches of a prefill, at least; 0: prefill never waits
        chunk: tokens, at most
        objective: seconds that a token may take on average; None: any
        gpu: whether chunks are a GPU's
    """

    def __init__(self, between: int, chunk: int | None, objective: float | None, gpu: bool = False):
        self._between, self._most, self._objective = between, chunk, objective
        self._stall, self._least = (STALL_GPU, LEAST_CHUNK_GPU) if gpu else (STALL, LEAST_CHUNK)
        self.chunk = chunk
        self.learns = objective is not None and between > 0
        self._bound = SAVED * (1 - FILLED) * objective if self.learns else 0.0
        self._saved = 0.0  # seconds; below zero: owed
        self._known = 0.0  # of it, what is measured; the rest are steps that were predicted since
        self._steps = between  # since the last batch of a prefill

    @property
    def waits(self) -> bool:
        """Whether those that decode go on before the next batch of a prefill."""
        return self._steps < self._between or (self._saved < 0.0 and self._steps < MOST_BETWEEN)

    def learn(self, steps: float, took: float, held: float, seconds: float, tokens: float):
        """Take in what was measured since the last call, which replaces what was predicted.

        Args:
            steps, took: decode steps and their seconds
            held: seconds for which batches of a prefill held up those that decode
            seconds, tokens: of a chunk, means of late; 0.0: none yet
        """
        if not self.learns:
            return
        saved = self._bounded(self._known + steps * self._objective - took)
        self._saved = self._known = self._bounded(saved - held)
        if seconds and tokens and self.chunk is not None:
            fits = min(tokens * self._stall * self._objective / seconds, self.chunk * FASTEST)
            self.chunk = min(int(max(fits, self._least)) // PAGE_TOKENS * PAGE_TOKENS, self._most)

    def stepped(self, seconds: float):
        """A decode step is about to run, and is predicted to take so long."""
        self._steps += 1
        if self.learns:
            self._saved = self._bounded(self._saved + (self._objective - seconds))

    def held(self):
        """A batch of a prefill is about to run."""
        self._steps = 0

    def go(self):
        """The next batch of a prefill waits no longer."""
        self._steps = max(self._between, MOST_BETWEEN)

    def joined(self, new: int, count: int):
        """Of those that decode, so many are new: they have saved nothing. (`learn` goes before: what is predicted to be
        saved may not have been.)"""
        lost = max(self._saved, 0.0) * new / count
        self._saved, self._known = self._saved - lost, self._known - lost

    def rest(self):
        """Nothing decodes any more."""
        self._saved, self._known, self._steps = 0.0, 0.0, self._between

    def _bounded(self, saved: float) -> float:
        return min(max(saved, -self._bound), self._bound)
