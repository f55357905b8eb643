"""Residency: which frame holds which block, in both directions."""

import torch


class Residency:
    """The two maps between blocks and frames, kept inverse to each other.

    frame_of: `[layers, pages, kv_heads]` int32, the frame of a block, -1 when it is in the host store only.
    owner: `[layers, frames]` int64, the block (`page * kv_heads + head`) in a frame, -1 when free.

    All changes are vectorised over layers, pages and heads.
    """

    def __init__(self, layers: int, pages: int, kv_heads: int, frames: int, device: str):
        self.kv_heads = kv_heads
        self.frame_of = torch.full((layers, pages, kv_heads), -1, dtype=torch.int32, device=device)
        self.owner = torch.full((layers, frames), -1, dtype=torch.int64, device=device)

    @property
    def used(self) -> int:
        """Frames in use, over all layers."""
        return int((self.owner >= 0).sum())

    def drop_pages(self, pages: torch.Tensor) -> int:
        """Free the frames of all blocks of these pages `[n]`, in every layer; returns how many there were."""
        held = self.frame_of[:, pages]
        layer, page, head = torch.nonzero(held >= 0, as_tuple=True)
        self.owner[layer, held[layer, page, head].long()] = -1
        self.frame_of[:, pages] = -1
        return len(layer)

    def release(self, leaving: torch.Tensor):
        """Free the frames of resident blocks in `leaving`, `[layers, pages, kv_heads]` bool."""
        layer, page, head = torch.nonzero(leaving, as_tuple=True)
        self.owner[layer, self.frame_of[layer, page, head].long()] = -1
        self.frame_of[layer, page, head] = -1

    def reserve(self, arriving: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pick free frames for blocks in `arriving`, `[layers, pages, kv_heads]` bool, in page order.

        Blocks beyond a layer's free frames are left out. Nothing is recorded: `admit` does that
        once the copies are done.

        Returns:
            layer, block, frame: `[n]` int64 each, sorted by layer
        """
        layer, page, head = torch.nonzero(arriving, as_tuple=True)
        free = self.owner < 0
        per_layer = torch.bincount(layer, minlength=arriving.shape[0])
        start = torch.cumsum(per_layer, 0) - per_layer
        rank = torch.arange(len(layer), device=layer.device) - start[layer]
        fits = rank < free.sum(1)[layer]
        layer, page, head, rank = layer[fits], page[fits], head[fits], rank[fits]
        # Free frames first, in frame order.
        order = torch.argsort(free.to(torch.uint8), dim=1, descending=True, stable=True)
        return layer, page * self.kv_heads + head, order[layer, rank]

    def admit(self, layer: torch.Tensor, block: torch.Tensor, frame: torch.Tensor):
        """Record that the blocks are in the frames now."""
        self.owner[layer, frame] = block
        self.frame_of[layer, block // self.kv_heads, block % self.kv_heads] = frame.to(torch.int32)

    def clear(self):
        self.frame_of.fill_(-1)
        self.owner.fill_(-1)
