"""Frames of nobody who decodes: of prefixes in the radix tree, for the turn that may follow, and of requests that wait.

The pages that were used last keep them longest.
"""

import torch

from rheoserve_sgl.cache.residency import Residency


class IdleFrames:
    """Knows when each page was used.

    Args:
        residency: Residency
        pages: of the pool
    """

    def __init__(self, residency: Residency, pages: int, device):
        self._residency = residency
        self._used = torch.zeros(pages, dtype=torch.int64, device=device)  # batch by which a page was used last
        self._running = torch.zeros(pages, dtype=torch.bool, device=device)  # of those that decoded last
        self._batches = self._decoded = 0

    def use(self, pages: torch.Tensor):
        """A batch has these pages, int64 in any shape."""
        self._batches += 1
        self._used.index_fill_(0, pages.flatten(), self._batches)

    def keep(self, wanted: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """What is wanted for the requests that decode, and of other resident blocks as many as frames are left for.

        Args:
            wanted: `[layers, pages, kv_heads]` bool
            pages: of the requests that decode, int64 in any shape
        """
        self.use(pages)
        self._decoded = self._batches
        self._running.fill_(False).index_fill_(0, pages.flatten(), True)
        idle = (self._residency.frame_of >= 0) & ~self._running[:, None]
        left = self._residency.frames - wanted.flatten(1).sum(1)
        return wanted | self._first(idle, self._used.argsort(descending=True, stable=True), left)

    def make_room(self, blocks: int, pages: torch.Tensor):
        """Free so many frames of each layer, or as many as nobody needs who decodes, or was prefilled since others did.

        Args:
            pages: of the prefill, prefixes included, int64 in any shape
        """
        residency = self._residency
        self.use(pages)
        idle = (residency.frame_of >= 0) & (~self._running & (self._used <= self._decoded))[:, None]
        missing = (blocks - residency.free).clamp(min=0)
        residency.release(self._first(idle, self._used.argsort(stable=True), missing))

    @staticmethod
    def _first(blocks: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The first `count` `[layers]` of the blocks `[layers, pages, kv_heads]`, by this order of their pages."""
        ordered = blocks[:, order]
        ordered &= (ordered.flatten(1).cumsum(1) <= count[:, None]).view_as(ordered)
        return torch.zeros_like(blocks).index_copy_(1, order, ordered)
