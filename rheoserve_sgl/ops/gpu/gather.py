"""A request's prefix for prefill: each block from its frame, or over PCIe from the pinned host store."""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS


@triton.jit
def _gather(
    host, frames, frame_of, pages, out, kv_heads, part_stride,
    DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)  # keys or values
    block = tl.load(pages + at).to(tl.int64) * kv_heads + head
    frame = tl.load(frame_of + block).to(tl.int64)
    token = tl.arange(0, TOKENS)
    dim = tl.arange(0, WIDE)
    used = (token < TOKENS)[:, None] & (dim < DIM)[None, :]
    inside = part * TOKENS * DIM + token[:, None] * DIM + dim[None, :]
    if frame >= 0:
        rows = tl.load(frames + frame * (2 * TOKENS * DIM) + inside, mask=used)
    else:
        rows = tl.load(host + block * (2 * TOKENS * DIM) + inside, mask=used)
    row = (at.to(tl.int64) * TOKENS + token[:, None]) * kv_heads + head
    tl.store(out + part.to(tl.int64) * part_stride + row * DIM + dim[None, :], rows, mask=used)


def gather_prefix(host, frames, frame_of, pages, out):
    """Fill out `[2, len(pages) * 64, kv_heads, head_dim]` with K and V of one layer's pages.

    Args:
        host: `[all_pages, kv_heads, 2, 64, head_dim]`, pinned
        frames: `[frames + 1, 2, 64, head_dim]`
        frame_of: `[all_pages, kv_heads]` int32
        pages: `[n]` int64, on the GPU
    """
    kv_heads, dim = host.shape[1], host.shape[-1]
    _gather[(len(pages), kv_heads, 2)](
        host, frames, frame_of, pages, out, kv_heads, out.stride(0),
        DIM=dim, WIDE=triton.next_power_of_2(dim), TOKENS=PAGE_TOKENS,
    )  # fmt: skip
