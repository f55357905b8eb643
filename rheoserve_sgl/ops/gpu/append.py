"""Write-through of a step's tokens by one kernel, into frames and over PCIe straight into the pinned host store, with
the running keys of a training-free gate.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.append import check_rows
from rheoserve_sgl.ops.gpu.early import early, start

KEYS = {"none": 0, "max_min": 1, "mean": 2}


@triton.jit
def store_rows(
    host, frames, frame_of, pair, to, key, value, used, DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Keys and values at `to` in a block: in the host store, and in its frame if it has one."""
    block = host + pair * (2 * TOKENS * DIM)
    tl.store(block + to, key, mask=used)
    tl.store(block + TOKENS * DIM + to, value, mask=used)
    frame = tl.load(frame_of + pair).to(tl.int64)
    if frame >= 0:
        block = frames + frame * (2 * TOKENS * DIM)
        tl.store(block + to, key, mask=used)
        tl.store(block + TOKENS * DIM + to, value, mask=used)


@triton.jit
def higher(new, high):
    """The larger, and NaN if either is."""
    return tl.where((new > high) | (new != new), new, high)


@triton.jit
def lower(new, low):
    return tl.where((new < low) | (new != new), new, low)


@triton.jit
def _append(
    host, frames, frame_of, loc, k, v, quick, k_stride, v_stride, kv_heads,
    KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.load(loc + token)
    pair = at // TOKENS * kv_heads + head
    offset = at % TOKENS
    dim = tl.arange(0, WIDE)
    used = dim < DIM
    key = tl.load(k + token * k_stride + head * DIM + dim, mask=used)
    value = tl.load(v + token * v_stride + head * DIM + dim, mask=used)
    store_rows(host, frames, frame_of, pair, offset * DIM + dim, key, value, used, DIM, TOKENS)
    new = key.to(tl.float32)
    old = used & (offset > 0)
    if KEYS == 1:
        own = quick + pair * 2 * DIM + dim
        high = tl.load(own, mask=old, other=float("-inf")).to(tl.float32)
        low = tl.load(own + DIM, mask=old, other=float("inf")).to(tl.float32)
        tl.store(own, higher(new, high), mask=used)
        tl.store(own + DIM, lower(new, low), mask=used)
    if KEYS == 2:
        own = quick + pair * DIM + dim
        mean = tl.load(own, mask=old, other=0.0)
        tl.store(own, mean + (new - mean) / (offset + 1).to(tl.float32), mask=used)


def append_gpu(host, frames, frame_of, loc, k, v, quick=None, keys: str = "none"):
    """As `append_torch`, without waiting: the CPU sees the tokens when the stream has passed.

    Args:
        host: pinned
        k, v: rows of `[kv_heads, head_dim]` contiguous
        quick: `[all_pages, kv_heads, key_dim]`, float32 or, for "max_min", the dtype of k; the newest pages' keys take
            in their new token. Only for one token a page
        keys: what they are: "none", "max_min" or "mean"
    """
    tokens, kv_heads, dim = k.shape
    check_rows(host, k, v)
    if tokens == 0:
        return
    _append[(tokens, kv_heads)](
        host, frames, frame_of, loc, k, v, frames if quick is None else quick, k.stride(0), v.stride(0), kv_heads,
        KEYS=KEYS[keys], DIM=dim, WIDE=triton.next_power_of_2(dim), TOKENS=PAGE_TOKENS,
        **early(k.device),
    )  # fmt: skip
