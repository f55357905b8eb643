"""Memory of a decode step that stays where it is, so that a CUDA graph can be captured over it."""

from dataclasses import dataclass

import torch
import triton

from rheoserve_sgl.ops.gpu.score import PAGES


def width_of(max_pages: int) -> int:
    """Pages of a program, a power of two."""
    return max(triton.next_power_of_2(max_pages), 16)


def warps_of(width: int) -> int:
    """Warps of a program over so many pages."""
    return min(max(width // 256, 4), 16)


@dataclass(frozen=True)
class Tables:
    """The page table of a step; rows beyond the running requests are empty.

    pages: `[batch, max_pages]` int32 logical pages
    n_pages, tail_len: `[batch]` int32
    quiet: `[batch]` int32, whether the step neither selects for a request nor records (see `mark_quiet`)
    newest, requests: `[batch]` int64
    """

    pages: torch.Tensor
    n_pages: torch.Tensor
    tail_len: torch.Tensor
    quiet: torch.Tensor
    newest: torch.Tensor
    requests: torch.Tensor

    @classmethod
    def make(cls, batch: int, max_pages: int, device: str) -> "Tables":
        def zeros(*shape, dtype):
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            zeros(batch, max_pages, dtype=torch.int32),
            *(zeros(batch, dtype=torch.int32) for _ in range(3)),
            *(zeros(batch, dtype=torch.int64) for _ in range(2)),
        )

    def rows(self, count: int) -> "Tables":
        """The first rows, in the same memory."""
        return Tables(*(getattr(self, name)[:count] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Scratch:
    """What the kernels of one layer hand to the next; shared by all layers.

    logits: `[batch, kv_heads, heads, max_pages]` float32
    tile_max, tile_sum: `[batch, kv_heads, heads, tiles]` float32
    """

    logits: torch.Tensor
    tile_max: torch.Tensor
    tile_sum: torch.Tensor

    @classmethod
    def make(cls, batch: int, kv_heads: int, heads: int, max_pages: int, device) -> "Scratch":
        tiles = triton.cdiv(max_pages, PAGES)
        shapes = ((batch, kv_heads, heads, width) for width in (max_pages, tiles, tiles))
        return cls(*(torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes))
