"""Blocks that decode steps attended to, counted by request."""

import torch

from rheoserve_sgl.ops.plan import Plan


class Attended:
    """Counts since the start, by row of SGLang's req_to_token; on a GPU its kernels add to them.

    counts: `[slots, 3]` int64: blocks that the device attended to, that the CPU visited in place, that were selected;
        over all layers and KV heads
    """

    def __init__(self, slots: int, device):
        self.counts = torch.zeros((slots, 3), dtype=torch.int64, device=device)
        self._waiting: list[tuple[torch.Tensor, ...]] = []

    def add(self, plan: Plan, requests: torch.Tensor):
        """Count one layer's plan, for the requests `[batch]` of a step without a GPU's kernels."""
        self._waiting.append((requests, plan.device.count, plan.host.count, plan.chosen))

    def settle(self):
        """Bring the counts up to date: once a step, since sums of small tensors cost more than the tensors."""
        if not self._waiting:
            return
        requests = self._waiting[0][0]
        parts = [torch.stack([layer[at] for layer in self._waiting]) for at in (1, 2, 3)]
        summed = [part.sum((0, *range(2, part.ndim))) for part in parts]
        self.counts.index_add_(0, requests, torch.stack(summed, 1).to(self.counts.dtype))
        self._waiting.clear()

    def totals(self) -> dict[str, int]:
        """Of all requests; on a GPU this waits for it."""
        self.settle()
        return named(self.counts.sum(0).tolist())

    def of(self, slot: int) -> torch.Tensor:
        """The counts of one row, `[3]` int64, as they are now; nobody waits for a GPU."""
        self.settle()
        return self.counts[slot].clone()


def named(counts: list[int]) -> dict[str, int]:
    return dict(zip(("device_blocks", "host_blocks", "selected_blocks"), counts, strict=True))
