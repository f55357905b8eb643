"""How long steps take, as the scheduler's loop sees it."""

import time
from collections import deque

DECODE, PREFILL, NOTHING = "decode", "prefill", "nothing"
BLEND = 0.3  # of a new measurement of a chunk in the running mean
# An iteration counts as at most so many times the mean: the loop may be held up by something else, a paused server or
# new weights.
FAR_OFF = 10


class StepClock:
    """Times the loop's iterations. With SGLang's overlap schedule an iteration launches a batch and waits for the one
    before; without it, for the batch itself.

    steps, seconds: decode steps since `restart`, and what they took
    chunk_seconds: of a batch of a prefill, a running mean; 0.0 before the first
    """

    def __init__(self, overlap: bool, now=time.perf_counter):
        self._lag, self._now = 2 if overlap else 1, now
        self._launched: deque[str] = deque(maxlen=self._lag)
        self._began = None
        self.chunk_seconds = self._usual = 0.0
        self.steps, self.seconds = 0, 0.0
        self.restart()

    def restart(self):
        """Other requests decode from now on."""
        self._usual = self.step_seconds or self._usual
        self.steps, self.seconds = 0, 0.0
        self._skip = self._lag

    def tick(self):
        """An iteration begins."""
        now = self._now()
        before, self._began = self._began, now
        if before is None or len(self._launched) < self._lag or NOTHING in self._launched:
            return
        took, mean = now - before, self.chunk_seconds
        if self._launched[0] == PREFILL:
            self.chunk_seconds = mean + BLEND * (min(took, FAR_OFF * mean) - mean) if mean else took
        elif self._skip:
            self._skip -= 1
        elif PREFILL not in self._launched:
            usual = self.step_seconds or self._usual
            self.steps, self.seconds = self.steps + 1, self.seconds + (min(took, FAR_OFF * usual) if usual else took)

    def launched(self, what: str):
        """The iteration launches a batch."""
        self._launched.append(what)

    @property
    def step_seconds(self) -> float:
        """Of a decode step since `restart`, on average; 0.0 before the first."""
        return self.seconds / self.steps if self.steps else 0.0
