"""Write-through of a prefill, page by page: a few programs store whole rows over PCIe while others compute.

`append` has a program for each token and head, which suits a step; thousands of them would keep a prefill's own kernels
from the processors while their stores wait for the bus.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.append import check_rows
from rheoserve_sgl.ops.gpu.append import store_rows

WRITERS = 16  # programs; each holds a processor of the GPU


@triton.jit
def _append_pages(
    host, frames, frame_of, pages, token, before, filled, k, v, count, k_stride, v_stride, kv_heads,
    DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, WRITERS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS)[:, None]
    dim = tl.arange(0, WIDE)[None, :]
    to = row * DIM + dim
    for task in range(tl.program_id(0), count * kv_heads, WRITERS):
        at = task // kv_heads
        head = task % kv_heads
        first = tl.load(before + at)
        used = (row >= first) & (row < tl.load(filled + at)) & (dim < DIM)
        source = tl.load(token + at) + row - first
        key = tl.load(k + source * k_stride + head * DIM + dim, mask=used)
        value = tl.load(v + source * v_stride + head * DIM + dim, mask=used)
        pair = tl.load(pages + at) * kv_heads + head
        store_rows(host, frames, frame_of, pair, to, key, value, used, DIM, TOKENS)


def append_pages_gpu(host, frames, frame_of, writes, k, v):
    """As `append_torch` for the tokens of a prefill, without waiting: the CPU sees them when the stream has passed.

    Args:
        host: pinned
        writes: Writes, of the batch
        k, v: rows of `[kv_heads, head_dim]` contiguous; those beyond the batch's tokens are not read
    """
    _, kv_heads, dim = k.shape
    check_rows(host, k, v)
    if len(writes.pages):
        _append_pages[(WRITERS,)](
            host, frames, frame_of, writes.pages, writes.token, writes.before, writes.filled, k, v,
            len(writes.pages), k.stride(0), v.stride(0), kv_heads,
            DIM=dim, WIDE=triton.next_power_of_2(dim), TOKENS=PAGE_TOKENS, WRITERS=WRITERS, num_warps=8,
        )  # fmt: skip
