"""Frames that no decoding request needs: of requests that wait to decode, and of prefixes in the radix tree.

Requests wait in their order, so the first of them keeps its frames longest; of what only the tree holds, what was used
last does, for the turn that may follow.
"""

from collections.abc import Callable

import torch

from rheoserve_sgl.cache.residency import Residency

LATER = 1 << 40  # than any batch


class IdleFrames:
    """Knows when each page was used.

    Args:
        residency: Residency
        pages: of the pool
    """

    def __init__(self, residency: Residency, pages: int, device):
        self._residency = residency
        self._used = torch.zeros(pages, dtype=torch.int64, device=device)  # number of the batch that used a page last
        self._batches = 0
        nobody = torch.zeros(0, dtype=torch.int64, device=device)
        # Gives the pages, int64, of all prefilled requests that have not ended; the runtime controller's.
        self.held: Callable[[], torch.Tensor] = lambda: nobody

    def use(self, pages: torch.Tensor):
        """A batch has these pages, int64 in any shape."""
        self._batches += 1
        self._used.index_fill_(0, pages.flatten(), self._batches)

    def holds(self, pages: torch.Tensor, decoding: torch.Tensor) -> torch.Tensor:
        """Which of these pages, `[n]` int64, prefilled requests have that have not ended: `[n]` bool.

        Args:
            decoding: pages of requests that decode in the same batch, int64 in any shape, or 0: the scheduler has them
                in no other batch meanwhile
        """
        return self._held().index_fill_(0, decoding.flatten(), True)[pages]

    def _held(self) -> torch.Tensor:
        return torch.zeros_like(self._used, dtype=torch.bool).index_fill_(0, self.held(), True)

    def keep(self, wanted: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """What is wanted for the requests that decode, and of other resident blocks as many as frames are left for.

        Args:
            wanted: `[layers, pages, kv_heads]` bool
            pages: of the requests that decode, int64 in any shape
        """
        self.use(pages)
        idle = (self._residency.frame_of >= 0).index_fill_(1, pages.flatten(), False)
        left = self._residency.frames - wanted.flatten(1).sum(1)
        waiting = self._held()
        worth = torch.where(waiting, LATER - self._used, self._used)
        return wanted | _first(idle, worth.argsort(descending=True, stable=True), left)

    def make_room(self, blocks: int, pages: torch.Tensor):
        """Free so many frames of each layer, or as many as only the radix tree has use for.

        Args:
            pages: of a prefill, prefixes included, int64 in any shape
        """
        residency = self._residency
        missing = (blocks - residency.free).clamp(min=0)
        if not missing.is_cuda and not missing.any():
            return
        idle = (residency.frame_of >= 0).index_fill_(1, torch.cat((pages.flatten(), self.held())), False)
        order = self._used.argsort(descending=True, stable=True).flip(0)
        residency.release(_first(idle, order, missing))


def _first(blocks: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The first `count` `[layers]` of the blocks `[layers, pages, kv_heads]`, by this order of their pages."""
    ordered = blocks[:, order]
    ordered &= (ordered.flatten(1).cumsum(1) <= count[:, None]).view_as(ordered)
    return torch.zeros_like(blocks).index_copy_(1, order, ordered)
