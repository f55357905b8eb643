"""Blocks from the pinned host store into frames, by one kernel that reads over PCIe: any list, no copy in between."""

import triton
import triton.language as tl

ELEMENTS = 2048  # of a block to a program


@triton.jit
def _fill(host, frames, blocks, targets, SIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    block = tl.load(blocks + tl.program_id(0)).to(tl.int64)
    frame = tl.load(targets + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    used = at < SIZE
    tl.store(frames + frame * SIZE + at, tl.load(host + block * SIZE + at, mask=used), mask=used)


def fill_frames(host, frames, blocks, targets):
    """Copy host blocks `[n]` of one layer into frames `[n]`, in stream order.

    Args:
        host: `[all_blocks, 2, 64, head_dim]`, pinned
        frames: `[frames + 1, 2, 64, head_dim]`, on the GPU
        blocks, targets: `[n]` int64, on the GPU
    """
    if len(blocks) == 0:
        return
    size = host[0].numel()
    _fill[(len(blocks), triton.cdiv(size, ELEMENTS))](host, frames, blocks, targets, SIZE=size, ELEMENTS=ELEMENTS)
