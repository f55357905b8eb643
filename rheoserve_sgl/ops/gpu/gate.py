"""The learned gate of a decode step: its queries, and the keys of newest pages. As `rheoserve_sgl.ops.attn_gate`.

A vector is held as its two halves, which is how RoPE pairs them.
"""

import torch
import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import EPSILON, GateWeights
from rheoserve_sgl.ops.gpu.append import higher, lower
from rheoserve_sgl.ops.gpu.early import early, start

# Of a weight matrix at a time: all of it comes from memory, by few programs, so much has to be on its way at once.
ROWS, WARPS = 128, 8


@triton.jit
def _load_finish(norm, rope, position, half, NORM: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr):
    """What `_finish` takes: the norm's halves, cosines and sines. Before the work, to come meanwhile."""
    at = tl.arange(0, HALF)
    used = at < half
    by_a = tl.full([HALF], 1.0, tl.float32)
    by_b, cosine = by_a, by_a
    sine = tl.zeros([HALF], tl.float32)
    if NORM:
        by_a = tl.load(norm + at, mask=used, other=0.0)
        by_b = tl.load(norm + half + at, mask=used, other=0.0)
    if ROPE:
        cosine = tl.load(rope + position * 2 * half + at, mask=used, other=0.0)
        sine = tl.load(rope + position * 2 * half + half + at, mask=used, other=0.0)
    return by_a, by_b, cosine, sine


@triton.jit
def _finish(
    a, b, by_a, by_b, cosine, sine, out, half,
    NORM: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """RMSNorm, rotate and store both halves."""
    at = tl.arange(0, HALF)
    used = at < half
    if NORM:
        mean = (tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * half)
        scale = 1.0 / tl.sqrt(mean + EPSILON)
        a = a * scale * by_a
        b = b * scale * by_b
    if ROPE:
        rotated = a * cosine - b * sine
        b = b * cosine + a * sine
        a = rotated
    tl.store(out + at, a, mask=used)
    tl.store(out + half + at, b, mask=used)


@triton.jit
def _add_rows(a, b, x, weights, i, there, half, HALF: tl.constexpr):
    """Adds to `[rows, HALF]` sums, of both halves, what rows `i` of a matrix give for `x`."""
    at = tl.arange(0, HALF)
    inside = there[:, None] & (at < half)[None, :]
    matrix = weights + i[:, None] * 2 * half + at[None, :]
    a += x[:, None] * tl.load(matrix, mask=inside, other=0.0).to(tl.float32)
    b += x[:, None] * tl.load(matrix + half, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def gate_query(
    pair, q, q_stride, positions, weights, norm, rope, out, kv_heads, group, dim, inputs, half,
    KIND: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """Of one (request, KV head)."""
    row = pair // kv_heads
    head = pair % kv_heads
    at = tl.arange(0, HALF)
    used = at < half
    own = q + row.to(tl.int64) * q_stride + head * group * dim
    position = tl.load(positions + row).to(tl.int64)
    by_a, by_b, cosine, sine = _load_finish(norm, rope, position, half, NORM, ROPE, HALF)
    if KIND == 0:  # the average itself
        a = tl.zeros([HALF], tl.float32)
        b = tl.zeros([HALF], tl.float32)
        for g in range(group):
            a += tl.load(own + g * dim + at, mask=used, other=0.0).to(tl.float32) / group
            b += tl.load(own + g * dim + half + at, mask=used, other=0.0).to(tl.float32) / group
    else:
        as_ = tl.zeros([ROWS, HALF], tl.float32)  # (summed once, since threads wait for each other in a sum)
        bs = tl.zeros([ROWS, HALF], tl.float32)
        own_weights = weights + head.to(tl.int64) * inputs * 2 * half
        for first in range(0, inputs, ROWS):
            i = first + tl.arange(0, ROWS)
            there = i < inputs
            if KIND == 1:  # a projection of the average
                x = tl.zeros([ROWS], tl.float32)
                for g in range(group):
                    x += tl.load(own + g * dim + i, mask=there, other=0.0).to(tl.float32) / group
            else:
                x = tl.load(own + i, mask=there, other=0.0).to(tl.float32)
            as_, bs = _add_rows(as_, bs, x, own_weights, i, there, half, HALF)
        a, b = tl.sum(as_, 0), tl.sum(bs, 0)
    _finish(a, b, by_a, by_b, cosine, sine, out + pair * 2 * half, half, NORM, ROPE, HALF, EPSILON)


@triton.jit
def gate_key(
    pair, k, k_stride, newest, requests, tail_len, n_pages, running, weights, norm, rope, quick,
    kv_heads, dim, inputs, half, key_offset,
    MAX: tl.constexpr, MIN: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    WIDE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Of one (request, KV head)'s newest page, with its new token: 0 until the page is full."""
    row = pair // kv_heads
    head = pair % kv_heads
    tail = tl.load(tail_len + row)
    if tail > 0:
        i = tl.arange(0, WIDE)
        there = i < dim
        old = there & (tail > 1)
        own = running + (tl.load(requests + row) * kv_heads + head) * 3 * dim + i
        new = tl.load(k + row.to(tl.int64) * k_stride + head * dim + i, mask=there, other=0.0).to(tl.float32)
        high = tl.load(own, mask=old, other=float("-inf"))
        low = tl.load(own + dim, mask=old, other=float("inf"))
        total = tl.load(own + 2 * dim, mask=old, other=0.0) + new
        tl.store(own, higher(new, high), mask=there)
        tl.store(own + dim, lower(new, low), mask=there)
        tl.store(own + 2 * dim, total, mask=there)
        at = tl.arange(0, HALF)
        used = at < half
        out = quick + (tl.load(newest + row) * kv_heads + head) * 2 * half
        if tail == TOKENS:
            position = (tl.load(n_pages + row) - 1).to(tl.int64) * TOKENS + key_offset
            by_a, by_b, cosine, sine = _load_finish(norm, rope, position, half, NORM, ROPE, HALF)
            tl.debug_barrier()  # what other threads of this program stored is read below
            base = running + (tl.load(requests + row) * kv_heads + head) * 3 * dim
            as_ = tl.zeros([ROWS, HALF], tl.float32)
            bs = tl.zeros([ROWS, HALF], tl.float32)
            own_weights = weights + head.to(tl.int64) * inputs * 2 * half
            for first in range(0, inputs, ROWS):
                j = first + tl.arange(0, ROWS)
                inside = j < inputs
                # Which of max, min and sum the rows of the matrix stand for, in the order of K_PARTS.
                part = j // dim
                kind = part
                if MAX == 0:
                    kind = kind + 1
                if MIN == 0:
                    kind = tl.where(kind >= 1, kind + 1, kind)
                x = tl.load(base + kind * dim + j % dim, mask=inside, other=0.0)
                x = tl.where(kind == 2, x / TOKENS, x)
                as_, bs = _add_rows(as_, bs, x, own_weights, j, inside, half, HALF)
            a, b = tl.sum(as_, 0), tl.sum(bs, 0)
            _finish(a, b, by_a, by_b, cosine, sine, out, half, NORM, ROPE, HALF, EPSILON)
        else:
            nothing = tl.zeros([HALF], tl.float32)
            tl.store(out + at, nothing, mask=used)
            tl.store(out + half + at, nothing, mask=used)


@triton.jit
def _queries(
    q, q_stride, positions, weights, norm, rope, out, kv_heads, group, dim, inputs, half,
    KIND: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    EPSILON: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    gate_query(
        tl.program_id(0), q, q_stride, positions, weights, norm, rope, out, kv_heads, group, dim, inputs, half, KIND,
        NORM, ROPE, HALF, ROWS, EPSILON,
    )  # fmt: skip


@triton.jit
def _tap(
    q, q_stride, positions, q_weights, q_norm, rope, out,
    k, k_stride, newest, requests, tail_len, n_pages, quiet, running, k_weights, k_norm, quick,
    kv_heads, group, dim, q_inputs, k_inputs, half, key_offset,
    KIND: tl.constexpr, MAX: tl.constexpr, MIN: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    ROPE: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr, EPSILON: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    pair = tl.program_id(0)
    if tl.program_id(1) == 0:
        row = pair // kv_heads
        if (tl.load(quiet + row) == 0) & (tl.load(tail_len + row) > 0):
            gate_query(
                pair, q, q_stride, positions, q_weights, q_norm, rope, out, kv_heads, group, dim, q_inputs, half, KIND,
                Q_NORM, ROPE, HALF, ROWS, EPSILON,
            )  # fmt: skip
    else:
        gate_key(
            pair, k, k_stride, newest, requests, tail_len, n_pages, running, k_weights, k_norm, rope, quick,
            kv_heads, dim, k_inputs, half, key_offset, MAX, MIN, K_NORM, ROPE, WIDE, HALF, ROWS, TOKENS, EPSILON,
        )  # fmt: skip


def gate_queries_gpu(weights: GateWeights, plain, positions, out):
    """Gate queries of a step into out `[batch, kv_heads, gate_dim]` float32.

    Args:
        plain: `[batch, kv_heads, group, head_dim]`, any float dtype
        positions: `[batch]` int64
    """
    batch, kv_heads, group, dim = plain.shape
    kind, inputs = _query_form(weights, group, dim)
    _queries[(batch * kv_heads,)](
        plain, plain.stride(0), positions, *_or_any(plain, weights.q, weights.q_norm, weights.rope), out,
        kv_heads, group, dim, inputs, weights.gate_dim // 2,
        KIND=kind, NORM=weights.q_norm is not None, **_options(weights), **early(plain.device),
    )  # fmt: skip


def gate_tap_gpu(weights: GateWeights, tapped, tables, running, quick, out, rotate_last: bool = False):
    """Make each request's gate query, as `gate_queries_gpu`, but for quiet ones, and take its new token into the key of
    its newest page, as `gate_keys`.

    Args:
        tapped: Tapped of the tokens; rows may have gaps between them
        tables: Tables
        running, quick, rotate_last: see `gate_keys`
        out: `[batch, kv_heads, gate_dim]` float32
    """
    batch, kv_heads, _ = out.shape
    dim = running.shape[-1]
    if len(tapped.q) != batch or tapped.k.shape != (batch, kv_heads * dim):
        raise ValueError(f"tapped.k is {tuple(tapped.k.shape)}; needed: {(batch, kv_heads * dim)}")
    q, k = (part if part.stride(1) == 1 else part.contiguous() for part in (tapped.q, tapped.k))
    group = q.shape[1] // (kv_heads * dim)
    kind, inputs = _query_form(weights, group, dim)
    q_weights, q_norm, rope, k_weights, k_norm = _or_any(
        out, weights.q, weights.q_norm, weights.rope, weights.k, weights.k_norm
    )
    _tap[(batch * kv_heads, 2)](
        q, q.stride(0), tapped.positions, q_weights, q_norm, rope, out,
        k, k.stride(0), tables.newest, tables.requests, tables.tail_len, tables.n_pages, tables.quiet, running,
        k_weights, k_norm, quick, kv_heads, group, dim, inputs, len(weights.parts) * dim, weights.gate_dim // 2,
        PAGE_TOKENS - 1 if rotate_last else 0,
        KIND=kind, MAX=int("max" in weights.parts), MIN=int("min" in weights.parts),
        Q_NORM=weights.q_norm is not None, K_NORM=weights.k_norm is not None,
        WIDE=triton.next_power_of_2(dim), TOKENS=PAGE_TOKENS, **_options(weights), **early(out.device),
    )  # fmt: skip


def _query_form(weights: GateWeights, group: int, dim: int) -> tuple[int, int]:
    """KIND of `gate_query`, and how many numbers it projects."""
    kind = 0 if weights.q is None else weights.q.ndim - 2
    return kind, dim if kind < 2 else group * dim


def _or_any(any_: torch.Tensor, *tensors):
    """What is left out is not read, but a kernel wants an address."""
    return [any_ if tensor is None else tensor for tensor in tensors]


def _options(weights: GateWeights) -> dict:
    return {
        "ROPE": weights.rope is not None,
        "HALF": max(triton.next_power_of_2(weights.gate_dim // 2), 16),
        "ROWS": ROWS,
        "EPSILON": EPSILON,
        "num_warps": WARPS,
    }
