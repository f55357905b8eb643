"""The quick K cache: one small gate key per block, all on the device."""

import torch

from rheoserve_sgl.gate.base import Gate


class QuickKeys:
    """Gate keys, one tensor `[pages, kv_heads, key_dim]` float32 a layer.

    On a CPU a page filled token by token has bit for bit the key of one filled at once, on a GPU up to rounding.
    """

    def __init__(self, layers: int, pages: int, kv_heads: int, head_dim: int, gate: Gate, device: str):
        shape = (pages, kv_heads, gate.key_dim(head_dim))
        self.layers = [torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
