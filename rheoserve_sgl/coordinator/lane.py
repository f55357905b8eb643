"""Where blocks move beside the forward pass: a stream of its own, in two phases.

Frames are reserved before, and the table learns of the blocks after, both in the forward stream. In between nobody
writes what is copied, and a step reads what a swap has brought to a layer so far (`pool.arrived`). A page that is
dropped meanwhile is not admitted (Residency.admit).
"""

import torch

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.cache.residency import Moves


class Lane:
    """One exchange at a time."""

    def __init__(self, pool: TwoTierKVPool):
        self._pool = pool
        self._stream = torch.cuda.Stream()
        self._done = torch.cuda.Event()
        self._moves: Moves | None = None
        self._more = torch.zeros((), dtype=torch.bool, pin_memory=True)
        self._short = False

    @property
    def busy(self) -> bool:
        return self._moves is not None

    def start(self, moves: Moves, more: torch.Tensor | None = None, short: bool = False):
        """Begin to copy into reserved frames.

        Args:
            more: bool on the device, whether other blocks wait for their turn
            short: whether the copies take no longer than a step
        """
        self._moves = moves  # also keeps them alive while the stream reads them
        self._short = short
        forward = torch.cuda.current_stream()
        try:
            self._more.fill_(False)
            if more is not None:
                self._more.copy_(more, non_blocking=True)
            self._pool.arrived.zero_()
            self._stream.wait_stream(forward)
            with torch.cuda.stream(self._stream):
                self._pool.fill(moves, beside=True)
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
        torch.cuda.current_stream().wait_event(self._done)
        self._pool.residency.admit(self._moves)
        self._moves = None
        return not self._short and bool(self._more)
