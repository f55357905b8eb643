"""Frames: device memory for resident blocks."""

import torch

from rheoserve_sgl import PAGE_TOKENS


class Frames:
    """`count` frames a layer, each `[2, 64, head_dim]` in the KV dtype.

    Every layer tensor has one row more, which no block ever owns: it takes the writes meant for blocks
    that are not resident, so that a write needs no data-dependent shape.
    """

    def __init__(self, layers: int, count: int, head_dim: int, dtype: torch.dtype, device: str):
        self.count = count
        shape = (count + 1, 2, PAGE_TOKENS, head_dim)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def fill(self, layer: int, frame: torch.Tensor, blocks: torch.Tensor):
        """Copy whole blocks `[n, 2, 64, head_dim]` (host or device) into frames `[n]`."""
        self.layers[layer][frame] = blocks.to(self.layers[layer].device)
