"""Which blocks swap, for all layers at once: one program for each layer, request and KV head.

The same swaps as `rheoserve_sgl.coordinator.swap.swap_torch`. Requests that share pages may choose the same block:
a second kernel lets the first win.
"""

import struct

import torch
import triton
import triton.language as tl

from rheoserve_sgl.cache.residency import ARRIVING, ON_ITS_WAY, RESERVED, Moves
from rheoserve_sgl.coordinator.exchange import HYSTERESIS, TINY
from rheoserve_sgl.ops.gpu.plan import DIGITS, best, ordered
from rheoserve_sgl.ops.gpu.tables import width_of

OCTAVE = 1 << 23  # of what `ordered` returns
SMALLER = 2.0**-9  # than what may arrive: from there importance is told apart by octaves
SLOTS = 32  # swaps of a layer, request and head, at most
LARGEST = float(torch.finfo(torch.float32).max)


@triton.jit(do_not_specialize=["most", "least", "first"])
def _pair(
    importance, frame_of, pages, n_pages, arrivals, victims, frames, counts, tails,
    layer_blocks, kv_heads, max_pages, sink, window, hysteresis, most, least, first,
    LARGEST: tl.constexpr, TINY: tl.constexpr, RECENT: tl.constexpr, FORCED_ONLY: tl.constexpr, SLOTS: tl.constexpr,
    NP: tl.constexpr, OCTAVE: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    layer, pair = tl.program_id(0), tl.program_id(1)
    row, head = pair // kv_heads, pair % kv_heads
    out = layer * tl.num_programs(1) + pair
    count = tl.load(n_pages + row)
    at = tl.arange(0, NP)
    valid = at < count
    page = tl.load(pages + row * max_pages + at, mask=valid, other=0).to(tl.int64)
    block = page * kv_heads + head
    base = layer.to(tl.int64) * layer_blocks
    frame = tl.load(frame_of + base + block, mask=valid, other=-1)
    resident = valid & (frame >= 0)
    room = tl.sum(resident.to(tl.int32), 0)
    swaps = 0
    tail = 0
    if room > 0:
        forced = valid & ((at < sink) | (at >= count - 1 - window))
        if RECENT:
            worth = at.to(tl.float32)
        else:
            worth = tl.load(importance + base + block, mask=valid, other=0.0)
            worth = tl.where(resident, worth * hysteresis + TINY, worth)
        worth = tl.where(forced, LARGEST, worth)
        open_ = forced if FORCED_ONLY else valid
        wanted = best(ordered(worth), open_, room, first, OCTAVE, DIGITS)
        arriving, leaving = wanted & (resident == 0), resident & (wanted == 0)
        if not RECENT:
            arriving = arriving & (worth >= least)
        coming, going = tl.sum(arriving.to(tl.int32), 0), tl.sum(leaving.to(tl.int32), 0)
        swaps = tl.minimum(tl.minimum(coming, going), most)
        place = coming - tl.cumsum(arriving.to(tl.int32), 0)  # newer pages first
        tl.store(arrivals + out * SLOTS + place, block, mask=arriving & (place < swaps))
        tail = (tl.sum((arriving & (at == count - 1)).to(tl.int32), 0) > 0).to(tl.int32)
        place = tl.cumsum(leaving.to(tl.int32), 0) - 1
        tl.store(victims + out * SLOTS + place, block, mask=leaving & (place < swaps))
        tl.store(frames + out * SLOTS + place, frame.to(tl.int64), mask=leaving & (place < swaps))
    tl.store(counts + out, swaps)
    tl.store(tails + out, tail)


@triton.jit(do_not_specialize=["most"])
def _claim(
    frame_of, owner, arrivals, victims, frames, counts, tails,
    tail_blocks, tail_frames, tail_counts, blocks, targets, totals, layer_blocks, layer_frames,
    most, ON_ITS_WAY: tl.constexpr, ARRIVING: tl.constexpr, RESERVED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    layer, pair = tl.program_id(0), tl.program_id(1)
    pairs = tl.num_programs(1)
    own = layer * pairs + pair
    slot = tl.arange(0, SLOTS)
    used = slot < tl.load(counts + own)
    new = tl.load(arrivals + own * SLOTS + slot, mask=used, other=0)
    old = tl.load(victims + own * SLOTS + slot, mask=used, other=0)
    frame = tl.load(frames + own * SLOTS + slot, mask=used, other=0)
    where = frame_of + layer.to(tl.int64) * layer_blocks
    whose = owner + layer.to(tl.int64) * layer_frames
    got_block = used & (tl.atomic_min(where + new, ON_ITS_WAY, mask=used, sem="relaxed") == -1)
    got_frame = got_block & (tl.atomic_min(whose + frame, RESERVED, mask=got_block, sem="relaxed") == old)
    tl.store(where + new, -1, mask=got_block & (got_frame == 0))
    tl.store(where + old, -1, mask=got_frame)
    newest = got_frame & (slot == 0) & (tl.load(tails + own) > 0)
    other = got_frame & (newest == 0)
    tl.store(where + new, (ARRIVING - frame).to(tl.int32), mask=other)
    # Each list is filled from its start on, in whatever order the programs come.
    first = tl.atomic_add(tail_counts + layer, tl.sum(newest.to(tl.int64), 0), sem="relaxed")
    at = layer * pairs + first + slot
    tl.store(tail_blocks + at, new, mask=newest)
    tl.store(tail_frames + at, frame, mask=newest)
    first = tl.atomic_add(totals + layer, tl.sum(other.to(tl.int64), 0), sem="relaxed")
    at = layer * pairs * most + first + tl.cumsum(other.to(tl.int32), 0) - 1
    tl.store(blocks + at, new, mask=other)
    tl.store(targets + at, frame, mask=other)


def key_of(value: float) -> int:
    """A positive number as `ordered` has it."""
    return struct.unpack("I", struct.pack("f", value))[0] | 0x80000000


def swap_gpu(ranking, residency, importance, tables, most: int, least: float) -> tuple[Moves, Moves]:
    """See `rheoserve_sgl.coordinator.swap.swap_blocks`."""
    layers, all_pages, kv_heads = importance.shape
    batch, max_pages = tables.pages.shape
    pairs, most, device = batch * kv_heads, min(most, SLOTS), importance.device
    arrivals, victims, frames = torch.empty((3, layers, pairs, SLOTS), dtype=torch.int64, device=device)
    counts, tails = (torch.empty((layers, pairs), dtype=torch.int32, device=device) for _ in range(2))
    newest = Moves.make(layers, pairs, residency.frames, device)
    others = Moves.make(layers, pairs * most, residency.frames, device)
    found = arrivals, victims, frames, counts, tails
    width = width_of(max_pages)
    _pair[(layers, pairs)](
        importance, residency.frame_of, tables.pages, tables.n_pages, *found,
        all_pages * kv_heads, kv_heads, max_pages, ranking.sink_pages, ranking.window_pages, HYSTERESIS, most,
        float(least), key_of(SMALLER * (least or 1.0)),
        LARGEST=LARGEST, TINY=TINY, RECENT=ranking.ranks_by == "recency", FORCED_ONLY=ranking.forced_only,
        SLOTS=SLOTS, NP=width, OCTAVE=OCTAVE, DIGITS=DIGITS, num_warps=min(max(width // 128, 4), 16),
    )  # fmt: skip
    _claim[(layers, pairs)](
        residency.frame_of, residency.owners, *found, newest.block, newest.frame, newest.count,
        others.block, others.frame, others.count, all_pages * kv_heads, residency.frames + 1, most,
        ON_ITS_WAY=ON_ITS_WAY, ARRIVING=ARRIVING, RESERVED=RESERVED, SLOTS=SLOTS, num_warps=1,
    )  # fmt: skip
    return newest, others
