"""What a server tells of itself while it runs: counts since the start and frames in use, never waiting for a GPU."""

import torch

from rheoserve_sgl.coordinator.attended import named
from rheoserve_sgl.coordinator.coordinator import Coordinator


class Figures:
    """Reads one coordinator's counts.

    On a GPU they are copied to pinned memory when asked for, and told when asked for the next time.
    """

    def __init__(self, coordinator: Coordinator):
        self._coordinator, self._pool = coordinator, coordinator.pool
        self._room = torch.zeros(6, dtype=torch.int64, pin_memory=True) if self._pool.importance.is_cuda else None

    def read(self) -> dict:
        """Counts by name: blocks, bytes, seconds, frames."""
        coordinator, pool, gpu = self._coordinator, self._pool, self._coordinator.gpu
        if gpu is None:
            seconds = coordinator.seconds
            blocks = coordinator.attended.totals()
            moved, used = int(pool.moved), pool.residency.used
        else:
            *blocks, moved, used, waited = self._room.tolist()
            blocks = named(blocks)
            seconds = gpu.times(waited)
            held = (pool.residency.owner >= 0).sum()
            parts = (coordinator.attended.counts.sum(0), pool.moved[None], held[None], gpu.asker.waited)
            self._room.copy_(torch.cat(parts), non_blocking=True)
        own = {
            "resident_hits": blocks["selected_blocks"] - blocks["host_blocks"],
            "exchanged_bytes": moved * pool.block_bytes,
            "frames": pool.frame_count * pool.layer_num,
            "frames_used": used,
            "host_pages": pool.host.pages - 1,
        }
        return seconds | blocks | own | coordinator.counts | coordinator.load
