"""Gate keys of the pages that a prefill writes, from its own tokens: one program a (page, KV head).

For a learned gate max, min and sum over a page's keys before RoPE, for a training-free one its key itself.
"""

import torch
import triton
import triton.language as tl

from rheoserve_sgl.ops.gpu.append import KEYS, higher, lower


@triton.jit
def _fold(k, token, before, filled, requests, running, out, kv_heads, dim, WIDE: tl.constexpr):
    page = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, WIDE)
    there = i < dim
    had = tl.load(before + page)
    own = running + (tl.load(requests + page) * kv_heads + head) * 3 * dim + i
    old = there & (had > 0)
    high = tl.load(own, mask=old, other=float("-inf"))
    low = tl.load(own + dim, mask=old, other=float("inf"))
    total = tl.load(own + 2 * dim, mask=old, other=0.0)
    key = k + (tl.load(token + page) * kv_heads + head) * dim + i
    for _ in range(tl.load(filled + page) - had):  # in the tokens' order: the sum has the same bits however they came
        new = tl.load(key, mask=there, other=0.0).to(tl.float32)
        high = higher(new, high)
        low = lower(new, low)
        total += new
        key += kv_heads * dim
    to = out + (page.to(tl.int64) * kv_heads + head) * 3 * dim + i
    tl.store(to, high, mask=there)
    tl.store(to + dim, low, mask=there)
    tl.store(to + 2 * dim, total, mask=there)


@triton.jit
def _pool(
    k, quick, pages, token, before, filled, k_stride, kv_heads,
    KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    page = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, WIDE)
    there = i < DIM
    first = tl.load(before + page)
    old = there & (first > 0)
    own = quick + (tl.load(pages + page) * kv_heads + head) * (2 * DIM if KEYS == 1 else DIM) + i
    high = tl.load(own, mask=old, other=float("-inf") if KEYS == 1 else 0.0).to(tl.float32)  # or the mean
    low = high
    if KEYS == 1:
        low = tl.load(own + DIM, mask=old, other=float("inf")).to(tl.float32)
    key = k + tl.load(token + page) * k_stride + head * DIM + i
    for offset in range(first, tl.load(filled + page)):
        new = tl.load(key, mask=there, other=0.0).to(tl.float32)
        if KEYS == 1:
            high = higher(new, high)
            low = lower(new, low)
        else:
            high += (new - high) / (offset + 1)
        key += k_stride
    tl.store(own, high, mask=there)
    if KEYS == 1:
        tl.store(own + DIM, low, mask=there)


def pool_gpu(kind: str, k: torch.Tensor, writes, quick: torch.Tensor):
    """As `rheoserve_sgl.ops.pool_keys.pool_keys`, from the new tokens and the keys that the pages had.

    Args:
        kind: "max_min" or "mean", of the gate
        k: `[tokens, kv_heads, head_dim]`, the new tokens' keys, any float dtype
    """
    _, kv_heads, dim = k.shape
    if k.stride()[1:] != (dim, 1):
        k = k.contiguous()
    if len(writes.pages):
        _pool[(len(writes.pages), kv_heads)](
            k, quick, writes.pages, writes.token, writes.before, writes.filled, k.stride(0), kv_heads,
            KEYS=KEYS[kind], DIM=dim, WIDE=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip


def fold_gpu(plain: torch.Tensor, writes, running: torch.Tensor) -> torch.Tensor:
    """As `rheoserve_sgl.ops.attn_gate.fold_torch`; plain may be of any float dtype."""
    _, kv_heads, dim = plain.shape
    out = torch.empty((len(writes.pages), kv_heads, 3, dim), dtype=torch.float32, device=plain.device)
    if len(writes.pages):
        _fold[(len(writes.pages), kv_heads)](
            plain, writes.token, writes.before, writes.filled, writes.requests, running, out, kv_heads, dim,
            WIDE=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return out
