"""Frames: device memory for resident blocks."""

import torch

from rheoserve_sgl import PAGE_TOKENS


class Frames:
    """`count` frames a layer, each `[2, 64, head_dim]` in the KV dtype.

    Every layer tensor has one row more, `sink`, which no block ever owns: it takes the writes meant
    for blocks that are not resident, so that a write needs no data-dependent shape.
    """

    def __init__(self, layers: int, count: int, head_dim: int, dtype: torch.dtype, device: str):
        self.count = count
        self.sink = count
        shape = (count + 1, 2, PAGE_TOKENS, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, frame: torch.Tensor, offset: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Store tokens into the frames of their blocks.

        Args:
            frame: `[tokens, kv_heads]`, -1 where the block is not resident
            offset: `[tokens]` position in the page
            k, v: `[tokens, kv_heads, head_dim]`
        """
        row = torch.where(frame < 0, self.sink, frame)
        at = offset[:, None]
        self.layers[layer][row, 0, at] = k
        self.layers[layer][row, 1, at] = v

    def fill(self, layer: int, frame: torch.Tensor, blocks: torch.Tensor):
        """Copy whole blocks `[n, 2, 64, head_dim]` (host or device) into frames `[n]`."""
        self.layers[layer][frame] = blocks.to(self.layers[layer].device)
