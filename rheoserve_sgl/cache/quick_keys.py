"""The quick K cache: one small gate key per block, all on the device."""

import torch

from rheoserve_sgl.gate.base import Gate


class QuickKeys:
    """Gate keys, one tensor `[pages, kv_heads, key_dim]` a layer, in the gate's dtype for them.

    On a CPU a page filled token by token has bit for bit the key of one filled at once, on a GPU up to rounding.
    """

    def __init__(
        self, layers: int, pages: int, kv_heads: int, head_dim: int, gate: Gate, dtype: torch.dtype, device: str
    ):
        shape = (pages, kv_heads, gate.key_dim(head_dim))
        key_dtype = gate.key_dtype(dtype, device)
        self.layers = [torch.zeros(shape, dtype=key_dtype, device=device) for _ in range(layers)]

    @property
    def block_bytes(self) -> int:
        """Of one block's key."""
        return self.layers[0][0, 0].nbytes

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
