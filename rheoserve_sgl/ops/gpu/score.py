"""Logits of the gate over a page table, with what a softmax over them needs: one program a tile of pages.

`plan` turns them into scores; together they are `rheoserve_sgl.ops.score.score_torch`.
"""

import triton
import triton.language as tl

PAGES = 64  # of a tile
HEADS = 16  # the smallest tile of tl.dot
KINDS = {"dot": 0, "range": 1}  # keys [key_dim], or Quest's [max, min] met by both signs of a query


@triton.jit
def _score(
    q, quick, pages, n_pages, logits, tile_max, tile_sum, scale, kv_heads, heads, max_pages, tiles,
    DIM: tl.constexpr, WIDE: tl.constexpr, RANGE: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    tile = tl.program_id(1)
    row = pair // kv_heads
    count = tl.load(n_pages + row)
    if tile * PAGES < count:
        head = tl.arange(0, HEADS)
        dim = tl.arange(0, WIDE)
        at = tile * PAGES + tl.arange(0, PAGES)
        valid = at < count
        page = tl.load(pages + row * max_pages + at, mask=valid, other=0).to(tl.int64)
        width = 2 * DIM if RANGE else DIM
        key = quick + (page * kv_heads + pair % kv_heads) * width
        used = (head < heads)[:, None] & (dim < DIM)[None, :]
        queries = tl.load(q + (pair * heads + head)[:, None] * DIM + dim[None, :], mask=used, other=0.0)
        inside = valid[None, :] & (dim < DIM)[:, None]
        first = tl.load(key[None, :] + dim[:, None], mask=inside, other=0.0)
        if RANGE:
            second = tl.load(key[None, :] + DIM + dim[:, None], mask=inside, other=0.0)
            found = tl.dot(tl.maximum(queries, 0.0), first, input_precision="ieee")
            found += tl.dot(tl.minimum(queries, 0.0), second, input_precision="ieee")
        else:
            found = tl.dot(queries, first, input_precision="ieee")
        found = tl.where(valid[None, :], found * scale, float("-inf"))
        top = tl.max(found, 1)
        total = tl.sum(tl.exp(found - top[:, None]), 1)
        out = (pair * heads + head).to(tl.int64)
        tl.store(logits + out[:, None] * max_pages + at[None, :], found, mask=(head < heads)[:, None] & valid[None, :])
        tl.store(tile_max + out * tiles + tile, top, mask=head < heads)
        tl.store(tile_sum + out * tiles + tile, total, mask=head < heads)


def score_tiles(q, quick, tables, scratch, scale: float, kind: str):
    """Fill the logits and tile sums of `scratch`.

    Args:
        q: `[batch, kv_heads, heads, dim]` float32
        quick: `[all_pages, kv_heads, dim]` float32, or `2 * dim` for kind "range"
    """
    batch, kv_heads, heads, dim = q.shape
    max_pages = tables.pages.shape[1]
    tiles = triton.cdiv(max_pages, PAGES)
    _score[(batch * kv_heads, tiles)](
        q, quick, tables.pages, tables.n_pages, scratch.logits, scratch.tile_max, scratch.tile_sum, scale,
        kv_heads, heads, max_pages, tiles,
        DIM=dim, WIDE=max(triton.next_power_of_2(dim), 16), RANGE=KINDS[kind], PAGES=PAGES, HEADS=HEADS,
    )  # fmt: skip
