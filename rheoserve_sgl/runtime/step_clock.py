"""How long steps take, as the scheduler's loop sees it."""

import time
from collections import deque

DECODE, PREFILL, NOTHING = "decode", "prefill", "nothing"
TIMED_STEPS = 8  # a window has at least so many, or it tells nothing about time
BLEND = 0.3  # of a new measurement of a chunk in the running mean
# An iteration counts as at most so many times the mean: the loop may be held up by something else, a paused server or
# new weights.
FAR_OFF = 10


class StepClock:
    """Times the loop's iterations. With SGLang's overlap schedule an iteration launches a batch and waits for the one
    before; without it, for the batch itself.

    steps, seconds: decode steps since `restart`, and what they took
    prefills: batches of a prefill so far
    held_seconds: of all of those that held up others that decode
    decoded, decoded_seconds: decode steps so far, and what they took: with `held_seconds` all the time that those that
        decode waited for tokens
    chunks: those of `least` tokens or more
    chunk_seconds, chunk_tokens: of one, running means; 0.0 before the first

    Args:
        least: tokens of a prefill that tell something about larger ones
    """

    def __init__(self, overlap: bool, now=time.perf_counter, least: int = 0):
        self._lag, self._now, self._least = 2 if overlap else 1, now, least
        self._launched: deque[str] = deque(maxlen=self._lag)
        self._tokens: deque[int] = deque(maxlen=self._lag)  # of those batches
        self._began = None
        self._ahead = 0.0  # seconds of a prefill before the step in front of it was seen to have ended
        self._beside: deque[bool] = deque(maxlen=self._lag)
        self.prefills, self.held_seconds, self.decoded, self.decoded_seconds = 0, 0.0, 0, 0.0
        self.chunks, self.chunk_seconds, self.chunk_tokens, self._usual = 0, 0.0, 0.0, 0.0
        self.steps, self.seconds = 0, 0.0
        self.restart()

    def restart(self):
        """Other requests decode from now on."""
        self._usual = self.usual_seconds
        self.steps, self.seconds = 0, 0.0
        self._skip = self._lag

    def rest(self):
        """Nothing decodes any more: what is under way holds nobody up."""
        self._beside = deque([False] * len(self._beside), maxlen=self._lag)

    def tick(self):
        """An iteration begins."""
        now = self._now()
        before, self._began = self._began, now
        if before is None or len(self._launched) < self._lag or NOTHING in self._launched:
            self._ahead = 0.0
            return
        took, usual = now - before, self.usual_seconds
        if self._launched[0] == PREFILL:
            self._learn_prefill(took + self._ahead, self._tokens[0], self._beside[0])
            self._ahead = 0.0
            return
        if self._launched[-1] == PREFILL and usual:
            # It begins as soon as it is launched: what the step before it did not need is its.
            self._ahead = max(took - usual, 0.0)
            took = min(took, usual)
        elif usual:
            took = min(took, FAR_OFF * usual)
        if usual or not self._skip:  # the very first steps of a server tell nothing: kernels are compiled in them
            self.decoded, self.decoded_seconds = self.decoded + 1, self.decoded_seconds + took
        if self._skip:
            self._skip -= 1
        elif PREFILL not in self._launched:
            self.steps, self.seconds = self.steps + 1, self.seconds + took

    def _learn_prefill(self, took: float, tokens: int, beside: bool):
        blend, mean = BLEND, self.chunk_seconds
        if mean:
            took = min(took, FAR_OFF * mean * max(tokens / self.chunk_tokens, 1.0))
        else:
            blend = 1.0
        self.prefills += 1
        self.held_seconds += took if beside else 0.0
        if tokens < self._least:
            return
        self.chunks += 1
        self.chunk_seconds += blend * (took - mean)
        self.chunk_tokens += blend * (tokens - self.chunk_tokens)

    def launched(self, what: str, tokens: int = 0, beside: bool = False):
        """The iteration launches a batch.

        Args:
            tokens: of a prefill
            beside: whether others decode, which the prefill holds up
        """
        self._launched.append(what)
        self._tokens.append(tokens)
        self._beside.append(beside)

    @property
    def waited(self) -> tuple[int, float, float]:
        """decoded, decoded_seconds, held_seconds"""
        return self.decoded, self.decoded_seconds, self.held_seconds

    @property
    def step_seconds(self) -> float:
        """Of a decode step since `restart`, on average; 0.0 before the first."""
        return self.seconds / self.steps if self.steps else 0.0

    @property
    def usual_seconds(self) -> float:
        """Of a decode step, as far as is known: since `restart`, or before it while there were few since."""
        return self._usual if self.steps < TIMED_STEPS and self._usual else self.step_seconds
