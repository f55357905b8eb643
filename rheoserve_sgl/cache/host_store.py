"""The host store: every block of every page, always complete."""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.host_memory import pin_all, zeroed


class HostStore:
    """KV of all pages in host memory, one tensor a layer.

    A layer is `[pages, kv_heads, 2, 64, head_dim]` in the KV dtype, K before V, so that a block is
    contiguous and block `page * kv_heads + head` of the flat view `[blocks, 2, 64, head_dim]`.
    Page 0 takes the writes of padded tokens.

    Args:
        pin: whether a GPU will read and write it; `threads` then map it
    """

    def __init__(
        self, layers: int, pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, pin: bool, threads: int = 1
    ):
        self.pages = pages
        self.kv_heads = kv_heads
        shape = (pages, kv_heads, 2, PAGE_TOKENS, head_dim)
        self.layers = [zeroed(shape, dtype) for _ in range(layers)]
        if pin:
            pin_all(self, self.layers, threads)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def blocks(self, layer: int) -> torch.Tensor:
        """The layer as `[pages * kv_heads, 2, 64, head_dim]`."""
        return self.layers[layer].flatten(0, 1)

    def gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """Pages of one sequence as `[2, kv_heads, len(pages) * 64, head_dim]`, contiguous."""
        picked = self.layers[layer].index_select(0, pages)
        return picked.permute(2, 1, 0, 3, 4).reshape(2, self.kv_heads, -1, picked.shape[-1])
