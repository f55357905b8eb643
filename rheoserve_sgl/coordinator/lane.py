"""Where blocks move beside the forward pass: a stream of its own, in two phases.

Frames are reserved before, and the table learns of the blocks after, both in the forward stream. In between nobody
writes what is copied, and a step reads what a swap has brought to a layer so far (`pool.arrived`). A page that is
dropped meanwhile is not admitted (Residency.admit).
"""

from collections import deque

import torch

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.cache.residency import Moves
from rheoserve_sgl.coordinator.exchange import SWAP_BYTES

LEAST_BYTES = 1 << 20
LATE = 5e-5  # seconds that a step may wait for the copies of the step before
LESS, MORE = 0.5, 1.25  # what a swap may move after a step that waited longer, and after one that did not


class Lane:
    """One exchange at a time.

    swap_bytes: what the next step's swaps may move; a short step or a slow bus makes it less
    late_seconds: that the GPU has waited for copies, as far as it has been seen
    """

    def __init__(self, pool: TwoTierKVPool):
        self._pool = pool
        self._stream = torch.cuda.Stream()
        self._done = timed_event()
        # Of copies that a step came to: when it came, when they were done, and of swaps what they might move, else 0.
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event, int]] = deque()
        self.swap_bytes, self.late_seconds = SWAP_BYTES, 0.0
        self._moves: Moves | None = None
        self._more = torch.zeros((), dtype=torch.bool, pin_memory=True)
        self._short, self._swaps = False, 0

    @property
    def busy(self) -> bool:
        return self._moves is not None

    def start(self, moves: Moves, more: torch.Tensor | None = None, short: bool = False):
        """Begin to copy into reserved frames.

        Args:
            more: bool on the device, whether other blocks wait for their turn; None: they are a step's swaps
            short: whether they are no more than `swap_bytes`: the next step waits for their rest
        """
        self._short, self._swaps = short, self.swap_bytes if more is None else 0
        self._look()
        self._moves = moves  # also keeps them alive while the stream reads them
        forward = torch.cuda.current_stream()
        try:
            self._more.fill_(False)
            if more is not None:
                self._more.copy_(more, non_blocking=True)
            self._pool.arrived.zero_()
            self._stream.wait_stream(forward)
            with torch.cuda.stream(self._stream):
                self._pool.fill(moves, beside=True)
            self._done = timed_event()
            self._done.record(self._stream)
        except BaseException:
            forward.wait_stream(self._stream)  # what began to copy must not write to frames that are free again
            self._pool.residency.cancel(moves)
            self._moves = None
            raise

    def hurry(self):
        """What runs now takes longer than the copies: what comes after it waits in stream order for their rest."""
        self._short = True

    def finish(self) -> bool:
        """Admit what was copied, if all of it was; does not wait. Returns whether other blocks wait for their turn.

        The CPU is some steps ahead of the GPU, and sees an event late: for short copies the GPU waits in its own time.
        """
        if self._moves is None or not (self._short or self._done.query()):
            return False
        forward, came = torch.cuda.current_stream(), timed_event()
        came.record(forward)
        forward.wait_event(self._done)
        self._waits.append((came, self._done, self._swaps))
        self._pool.residency.admit(self._moves)
        self._moves = None
        return not self._short and bool(self._more)

    def _look(self):
        """How long steps waited for copies, as far as the GPU has come, and what the next may move for it."""
        while self._waits and all(event.query() for event in self._waits[0][:2]):
            came, done, swaps = self._waits.popleft()
            late = came.elapsed_time(done) / 1000  # negative: done before
            self.late_seconds += max(late, 0.0)
            # (Some of the old size follow before the first one is seen to be late: they count once.)
            if swaps and late > LATE:
                self.swap_bytes = max(min(self.swap_bytes, int(swaps * LESS)), LEAST_BYTES)
            elif swaps:
                self.swap_bytes = min(int(self.swap_bytes * MORE), SWAP_BYTES)


def timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
