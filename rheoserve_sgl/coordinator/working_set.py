"""How many blocks requests select over some steps, and how much of that is resident: what admission goes by."""

import torch

from rheoserve_sgl.coordinator.exchange import layers_at_once

# A block belongs to the working set if it was selected in the last steps, this many. With more of them fewer blocks are
# missed, and fewer requests decode at once: of a recorded trace five steps select 1.8 times what one does, and frames
# for that many miss 9% of it; eight 2.1 times, and 7% (docs/LOG.md has the reckoning).
STEPS = 5
UNKNOWN = -1.0
# Blocks that are looked at at once, for which there has to be memory.
MOST_AT_ONCE = 1 << 24


class WorkingSets:
    """Measured at exchanges; on a GPU the numbers arrive later, and nobody waits for them.

    Args:
        slots: rows of SGLang's req_to_token
    """

    def __init__(self, slots: int, device):
        self._pages = torch.zeros(slots, dtype=torch.float32, device=device)
        self._on_gpu = self._pages.is_cuda
        self._room = torch.zeros(slots + 2, dtype=torch.float64, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self.measured = 0  # times

    def measure(self, importance: torch.Tensor, batch, recent: float, counts: torch.Tensor, frame_of=None):
        """Count each request's blocks of at least an importance, in stream order.

        Args:
            importance: `[layers, all_pages, kv_heads]` float32
            batch: rheoserve_sgl.runtime.batch.Batch
            recent: importance of a block that was selected STEPS steps ago and not since
            counts: `[slots, 3]` int64 of coordinator/attended.py
            frame_of: `[layers, all_pages, kv_heads]` int32, where requests whose blocks are all resident select in some
                steps only (ops/gpu/quiet.py): nothing is known of theirs; None: nobody rests
        """
        layers, _, kv_heads = importance.shape
        valid = batch.valid[None, :, :, None]
        some = layers_at_once(batch.pages, kv_heads, MOST_AT_ONCE)
        selected = sum(((part[:, batch.pages] >= recent) & valid).sum((0, 2, 3)) for part in importance.split(some))
        pages = selected.float() / (layers * kv_heads)
        if frame_of is not None:
            parts = [((part[:, batch.pages] < 0) & valid).flatten(2).any(2).any(0) for part in frame_of.split(some)]
            pages = torch.where(torch.stack(parts).any(0), pages, UNKNOWN)
        self._pages.fill_(UNKNOWN).index_copy_(0, batch.requests, pages)
        now = torch.cat((self._pages.double(), counts[:, 1:].sum(0).double()))
        self._room.copy_(now, non_blocking=self._on_gpu)
        if self._copied is not None:
            self._copied.record()
        self.measured += 1

    def read(self, wait: bool = False) -> list[float] | None:
        """What was measured last: pages of each slot, for a KV head of a layer on average, UNKNOWN for those it was not
        measured of; then the blocks that the CPU visited and those that were selected since the start. None while that
        is on its way.

        Args:
            wait: for it, so that all ranks read the same measurement
        """
        if self._copied is not None and not self._copied.query():
            if not wait:
                return None
            self._copied.synchronize()
        return self._room.tolist()
