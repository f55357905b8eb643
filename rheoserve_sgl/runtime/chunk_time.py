"""What a chunk of a prompt takes: a part that does not depend on its tokens, and a part for each token.

A chunk's layers are launched one by one, and the prefix before it is staged again for each chunk, however few its own
tokens are: on a GPU small chunks of a long prompt are mostly that.
"""

BLEND = 0.3  # of a new measurement in the running means
FAR_OFF = 10  # a measurement counts as at most so many times the mean: the loop may be held up by something else
VARIED = 0.15  # of the mean tokens: with a smaller spread the two parts are not told apart anew
LEAST = 0.1  # of a chunk's time is for its tokens, at least


class ChunkTime:
    """Learns by least squares over recent chunks, older ones fading.

    count: chunks that were timed
    seconds, tokens: of one, running means; 0.0 before the first
    """

    def __init__(self):
        self.count, self.seconds, self.tokens = 0, 0.0, 0.0
        self._squares = self._products = 0.0  # of tokens; of tokens and seconds: means about their means
        self._each: float | None = None

    def observe(self, seconds: float, tokens: int):
        self.count += 1
        if self.count == 1:
            self.seconds, self.tokens = seconds, float(tokens)
            return
        seconds = min(seconds, FAR_OFF * self.seconds * max(tokens / self.tokens, 1.0))
        longer, more = seconds - self.seconds, tokens - self.tokens
        self.seconds += BLEND * longer
        self.tokens += BLEND * more
        self._squares = (1 - BLEND) * (self._squares + BLEND * more * more)
        self._products = (1 - BLEND) * (self._products + BLEND * more * longer)
        if self._squares > (VARIED * self.tokens) ** 2:
            self._each = self._products / self._squares

    @property
    def each(self) -> float:
        """Seconds of one more token."""
        if not self.tokens:
            return 0.0
        mean = self.seconds / self.tokens
        return mean if self._each is None else min(max(self._each, LEAST * mean), mean)

    @property
    def fixed(self) -> float:
        """Seconds of a chunk, beside those of its tokens."""
        return self.seconds - self.each * self.tokens
