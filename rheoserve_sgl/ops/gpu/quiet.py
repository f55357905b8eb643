"""Requests for which a step need not select: all their blocks are resident, so all are attended to anyway.

Their scores would only be recorded, for the time when frames become scarce: every few steps are enough.
"""

import triton
import triton.language as tl

PAGES = 128  # looked at together
EVERY = 8  # steps of which one records


@triton.jit
def _begin(n_pages, tail_len, quiet, EVERY: tl.constexpr):
    row = tl.program_id(0)
    rests = (tl.load(n_pages + row) > 0) & (tl.load(tail_len + row) % EVERY != 0)
    tl.store(quiet + row, rests.to(tl.int32))


@triton.jit
def _disturb(
    frame_of, pages, n_pages, quiet, layer_blocks, kv_heads, max_pages, HEADS: tl.constexpr, PAGES: tl.constexpr
):
    layer, row = tl.program_id(0), tl.program_id(1)
    if tl.load(quiet + row) != 0:
        count = tl.load(n_pages + row)
        head = tl.arange(0, HEADS)
        frames = frame_of + layer.to(tl.int64) * layer_blocks
        first = 0
        missing = 0
        while (first < count) & (missing == 0):
            at = first + tl.arange(0, PAGES)
            page = tl.load(pages + row * max_pages + at, mask=at < count, other=0).to(tl.int64)
            used = (at < count)[:, None] & (head < kv_heads)[None, :]
            frame = tl.load(frames + page[:, None] * kv_heads + head[None, :], mask=used, other=0)
            missing = tl.max(tl.max((frame < 0).to(tl.int32), 1), 0)
            first += PAGES
        if missing > 0:
            tl.store(quiet + row, 0)


def mark_quiet(frame_of, tables):
    """Set `tables.quiet` for requests of which every block is resident, but for every eighth step.

    A block that loses its frame after this is attended to by the CPU: `plan_gpu` selects all blocks of a quiet request.

    Args:
        frame_of: `[layers, all_pages, kv_heads]` int32
    """
    layers, all_pages, kv_heads = frame_of.shape
    batch, max_pages = tables.pages.shape
    _begin[(batch,)](tables.n_pages, tables.tail_len, tables.quiet, EVERY=EVERY)
    _disturb[(layers, batch)](
        frame_of, tables.pages, tables.n_pages, tables.quiet, all_pages * kv_heads, kv_heads, max_pages,
        HEADS=triton.next_power_of_2(kv_heads), PAGES=PAGES,
    )  # fmt: skip
