"""Write-through of a step's tokens by one kernel, into frames and over PCIe straight into the pinned host store, with
the running keys of a training-free gate. Where blocks are scored, the kernel that does writes as well.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.append import check_rows
from rheoserve_sgl.ops.gpu.early import early, start

KEYS = {"none": 0, "max_min": 1, "mean": 2}  # of training-free gates


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
def append_token(
    token, head, host, frames, frame_of, loc, k, v, quick, k_stride, v_stride, kv_heads,
    KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One KV head of one token, and what its page's key takes in of it: see KEYS. Only for one token a page."""
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


@triton.jit
def _append(
    host, frames, frame_of, loc, k, v, quick, k_stride, v_stride, kv_heads,
    DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    append_token(
        tl.program_id(0).to(tl.int64), tl.program_id(1), host, frames, frame_of, loc, k, v, quick, k_stride, v_stride,
        kv_heads, 0, DIM, WIDE, TOKENS,
    )  # fmt: skip


@dataclass(frozen=True)
class NewTokens:
    """Tokens, and where they go.

    host: `[all_pages, kv_heads, 2, 64, head_dim]`, pinned
    frames: `[n, 2, 64, head_dim]`; frame_of: `[all_pages, kv_heads]` int32
    loc: `[tokens]` int64
    k, v: `[tokens, kv_heads, head_dim]`, rows contiguous; ValueError otherwise, and for a dtype that is not the store's
    """

    host: torch.Tensor
    frames: torch.Tensor
    frame_of: torch.Tensor
    loc: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def __post_init__(self):
        check_rows(self.host, self.k, self.v)

    def arguments(self, quick: torch.Tensor) -> tuple:
        """Of `append_token`, from `host` on."""
        tensors = (self.host, self.frames, self.frame_of, self.loc, self.k, self.v)
        return *tensors, quick, self.k.stride(0), self.v.stride(0)


def append_gpu(new: NewTokens):
    """As `append_torch`, without waiting: the CPU sees the tokens when the stream has passed."""
    tokens, kv_heads, dim = new.k.shape
    if tokens == 0:
        return
    _append[(tokens, kv_heads)](
        *new.arguments(new.frames), kv_heads,
        DIM=dim, WIDE=triton.next_power_of_2(dim), TOKENS=PAGE_TOKENS, **early(new.k.device),
    )  # fmt: skip
