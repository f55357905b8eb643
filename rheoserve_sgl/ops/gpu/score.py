"""Logits of the gate over a page table, with what a softmax over them needs: one program a tile of pages. Those with
newest pages write the step's tokens before: a kernel of its own takes some two microseconds a layer, whatever it does.

`plan` turns them into scores; together they are `rheoserve_sgl.ops.score.score_torch`.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.gpu.append import KEYS, NewTokens, append_token
from rheoserve_sgl.ops.gpu.attend import HEADS
from rheoserve_sgl.ops.gpu.early import early, start

PAGES = 32  # of a tile
KINDS = {"dot": 0, "range": 1}  # keys [key_dim], or Quest's [max, min] met by both signs of a query


@triton.jit
def _score(
    q, pages, n_pages, quiet, logits, tile_max, tile_sum, host, frames, frame_of, loc, k, v, quick, k_stride, v_stride,
    scale, kv_heads, heads, max_pages, tiles,
    DIM: tl.constexpr, WIDE: tl.constexpr, RANGE: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
    APPEND: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr, OWN_WIDE: tl.constexpr, TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    # The page table is read while the kernels in front run, which do not write it.
    pair = tl.program_id(0)
    tile = tl.program_id(1)
    row = pair // kv_heads
    count = tl.load(n_pages + row)
    rests = tl.load(quiet + row) != 0
    at = tile * PAGES + tl.arange(0, PAGES)
    page = tl.load(pages + row * max_pages + at, mask=at < max_pages, other=0).to(tl.int64)
    start(EARLY)
    if APPEND:
        if (count > 0) & (tile == (count - 1) // PAGES):
            append_token(
                row.to(tl.int64), pair % kv_heads, host, frames, frame_of, loc, k, v, quick, k_stride, v_stride,
                kv_heads, KEYS, OWN, OWN_WIDE, TOKENS,
            )  # fmt: skip
            if KEYS > 0:
                tl.debug_barrier()  # the newest page's key is read by other threads
    if (tile * PAGES < count) & (rests == 0):
        dim = tl.arange(0, WIDE)
        valid = at < count
        width = 2 * DIM if RANGE else DIM
        key = quick + (page * kv_heads + pair % kv_heads)[:, None] * width + dim[None, :]
        inside = valid[:, None] & (dim < DIM)[None, :]
        first = tl.load(key, mask=inside, other=0.0)
        if RANGE:
            second = tl.load(key + DIM, mask=inside, other=0.0)
        if HEADS > 0:  # all heads at once, on tensor cores; products of 16-bit numbers are exact
            head = tl.arange(0, HEADS)
            used = (head < heads)[:, None] & (dim < DIM)[None, :]
            query = tl.load(q + (pair * heads + head).to(tl.int64)[:, None] * DIM + dim[None, :], mask=used, other=0.0)
            if RANGE:
                found = tl.dot(tl.maximum(query, 0.0).to(first.dtype), tl.trans(first))
                found = tl.dot(tl.minimum(query, 0.0).to(second.dtype), tl.trans(second), found)
            else:
                found = tl.dot(query, tl.trans(first))
            found = tl.where(valid[None, :], found * scale, float("-inf"))
            top = tl.max(found, 1)
            out = (pair * heads + head).to(tl.int64)
            mine = head < heads
            tl.store(logits + out[:, None] * max_pages + at[None, :], found, mask=mine[:, None] & valid[None, :])
            tl.store(tile_max + out * tiles + tile, top, mask=mine)
            tl.store(tile_sum + out * tiles + tile, tl.sum(tl.exp(found - top[:, None]), 1), mask=mine)
        else:
            first = first.to(tl.float32)
            if RANGE:
                second = second.to(tl.float32)
            for head in range(heads):  # a page is read once for all of them
                out = (pair * heads + head).to(tl.int64)
                query = tl.load(q + out * DIM + dim, mask=dim < DIM, other=0.0).to(tl.float32)[None, :]
                if RANGE:
                    found = tl.sum(tl.maximum(query, 0.0) * first + tl.minimum(query, 0.0) * second, 1)
                else:
                    found = tl.sum(query * first, 1)
                found = tl.where(valid, found * scale, float("-inf"))
                top = tl.max(found, 0)
                tl.store(logits + out * max_pages + at, found, mask=valid)
                tl.store(tile_max + out * tiles + tile, top)
                tl.store(tile_sum + out * tiles + tile, tl.sum(tl.exp(found - top), 0))


def score_tiles(q, quick, tables, scratch, scale: float, kind: str, new: NewTokens | None = None, pooled: bool = True):
    """Fill the logits and tile sums of `scratch`, but for quiet requests.

    The kernel launched right before must not write to tables: they are read while it runs.

    Args:
        q: `[batch, kv_heads, heads, dim]`, any float dtype
        quick: `[all_pages, kv_heads, dim]`, any float dtype; `2 * dim` for kind "range"
        new: each request's newest token, which is appended, also of quiet ones; None: all are there
        pooled: whether a new token is taken into its page's key (float32 or, for kind "range", of the dtype of k)
            before that is scored: a mean for kind "dot"
    """
    batch, kv_heads, heads, dim = q.shape
    max_pages = tables.pages.shape[1]
    tiles = triton.cdiv(max_pages, PAGES)
    tensor_cores = 1 < heads <= HEADS and q.dtype == quick.dtype and q.dtype.itemsize == 2
    keys = "none" if new is None or not pooled else "max_min" if kind == "range" else "mean"
    own = dim if new is None else new.k.shape[-1]
    added = (*(q,) * 6, quick, 0, 0) if new is None else new.arguments(quick)
    _score[(batch * kv_heads, tiles)](
        q, tables.pages, tables.n_pages, tables.quiet, scratch.logits, scratch.tile_max, scratch.tile_sum, *added,
        scale, kv_heads, heads, max_pages, tiles,
        DIM=dim, WIDE=max(triton.next_power_of_2(dim), 16), RANGE=KINDS[kind], PAGES=PAGES,
        HEADS=HEADS if tensor_cores else 0, APPEND=new is not None, KEYS=KEYS[keys], OWN=own,
        OWN_WIDE=triton.next_power_of_2(own), TOKENS=PAGE_TOKENS,
        num_warps=2, **early(q.device),
    )  # fmt: skip
