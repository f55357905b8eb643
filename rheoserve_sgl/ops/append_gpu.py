"""Write-through by one kernel: into frames, and over PCIe straight into the pinned host store.

Not in use yet: so far it ran under Triton's interpreter only.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.append import check_rows


@triton.jit
def _append(
    host, frames, frame_of, loc, k, v, k_stride, v_stride, kv_heads,
    DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.load(loc + token)
    pair = at // TOKENS * kv_heads + head
    dim = tl.arange(0, WIDE)
    used = dim < DIM
    key = tl.load(k + token * k_stride + head * DIM + dim, mask=used)
    value = tl.load(v + token * v_stride + head * DIM + dim, mask=used)
    row = at % TOKENS * DIM + dim
    block = host + pair * (2 * TOKENS * DIM)
    tl.store(block + row, key, mask=used)
    tl.store(block + TOKENS * DIM + row, value, mask=used)
    frame = tl.load(frame_of + pair).to(tl.int64)
    if frame >= 0:
        block = frames + frame * (2 * TOKENS * DIM)
        tl.store(block + row, key, mask=used)
        tl.store(block + TOKENS * DIM + row, value, mask=used)


def append_gpu(host, frames, frame_of, loc, k, v):
    """As `append_torch`, without waiting: the CPU sees the tokens when the stream has passed.

    Args:
        host: pinned
        k, v: rows of `[kv_heads, head_dim]` contiguous
    """
    tokens, kv_heads, dim = k.shape
    check_rows(host, k, v)
    if tokens == 0:
        return
    _append[(tokens, kv_heads)](
        host, frames, frame_of, loc, k, v, k.stride(0), v.stride(0), kv_heads,
        DIM=dim, WIDE=triton.next_power_of_2(dim), TOKENS=PAGE_TOKENS,
    )  # fmt: skip
