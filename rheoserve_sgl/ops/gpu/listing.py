"""The resident list of each (request, KV head): frames that attention reads, in page order.

It needs no scores. So a layer's lists are made while the layer before attends, and attention begins while the CPU's
part is still being selected.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.residency import ARRIVING
from rheoserve_sgl.ops.gpu.early import early, start
from rheoserve_sgl.ops.gpu.move import BESIDE
from rheoserve_sgl.ops.gpu.tables import Tables, warps_of, width_of
from rheoserve_sgl.ops.plan import Visit


@dataclass(frozen=True)
class Listing:
    """What the lists of a layer are made from, and where they go.

    tables: Tables
    frame_of: `[all_pages, kv_heads]` int32
    arrived: `[1]` int32, how many of the programs that copy beside the step are done with the layer; None: nothing is
        copied
    visit: Visit, gets the lists
    seen: `[batch, kv_heads]` int32, gets what `arrived` was when each list was made, so that `plan_gpu` agrees with it
    """

    tables: Tables
    frame_of: torch.Tensor
    arrived: torch.Tensor | None
    visit: Visit
    seen: torch.Tensor

    @property
    def copiers(self) -> int:
        return 0 if self.arrived is None else BESIDE

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `list_resident`, from `came` on."""
        came = self.seen if self.arrived is None else self.arrived
        return came, self.visit.blocks, self.visit.count, self.visit.last_len, self.seen


@triton.jit
def blocks_of(pages, row, head, kv_heads, count, max_pages, NP: tl.constexpr):
    """Blocks of a request's pages (those beyond its last are the dummy page's), and of its newest page."""
    at = tl.arange(0, NP)
    page = tl.load(pages + row * max_pages + at, mask=at < max_pages, other=0)
    page = tl.where(at < count, page, 0).to(tl.int64)  # (so that this load does not wait for the count)
    newest = tl.load(pages + row * max_pages + count - 1, mask=count > 0, other=0).to(tl.int64)
    return page * kv_heads + head, newest * kv_heads + head


@triton.jit
def with_arrived(frame, seen, ARRIVING: tl.constexpr, COPIERS: tl.constexpr):
    """What has come to a layer meanwhile is in its frame, once all programs that copy are done with the layer."""
    return tl.where((frame <= ARRIVING) & (seen >= COPIERS), ARRIVING - frame, frame)


@triton.jit
def length_of_last(count, newest_frame, tail, TOKENS: tl.constexpr):
    """Valid tokens of a resident list's last block."""
    return tl.where((count > 0) & (newest_frame >= 0), tail, TOKENS)


@triton.jit
def list_resident(
    pair, block, newest, count, tail, max_pages, frame_of, came, lists, counts, last_len, seen,
    NP: tl.constexpr, TOKENS: tl.constexpr, ARRIVING: tl.constexpr, COPIERS: tl.constexpr,
):  # fmt: skip
    """Make the list of one pair."""
    frame = tl.load(frame_of + block, mask=tl.arange(0, NP) < count, other=-1)
    newest_frame = tl.load(frame_of + newest)
    if COPIERS > 0:
        # (An atomic gives all threads one number, while the copying kernel counts on.)
        done = tl.atomic_add(came, 0, sem="acquire")
        frame = with_arrived(frame, done, ARRIVING, COPIERS)
        newest_frame = with_arrived(newest_frame, done, ARRIVING, COPIERS)
        tl.store(seen + pair, done)
    resident = (frame >= 0).to(tl.int32)
    place = tl.cumsum(resident, 0) - 1
    tl.store(lists + pair.to(tl.int64) * max_pages + place, frame, mask=frame >= 0)
    tl.store(counts + pair, tl.sum(resident, 0))
    tl.store(last_len + pair, length_of_last(count, newest_frame, tail, TOKENS))


@triton.jit
def _list(
    pages, n_pages, tail_len, frame_of, came, lists, counts, last_len, seen, kv_heads, max_pages,
    NP: tl.constexpr, TOKENS: tl.constexpr, ARRIVING: tl.constexpr, COPIERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    pair = tl.program_id(0)
    row = pair // kv_heads
    count = tl.load(n_pages + row)
    block, newest = blocks_of(pages, row, pair % kv_heads, kv_heads, count, max_pages, NP)
    list_resident(
        pair, block, newest, count, tl.load(tail_len + row), max_pages, frame_of, came, lists, counts, last_len, seen,
        NP, TOKENS, ARRIVING, COPIERS,
    )  # fmt: skip


def list_gpu(listing: Listing):
    """Make a layer's lists."""
    tables, frame_of = listing.tables, listing.frame_of
    batch, max_pages = tables.pages.shape
    kv_heads = frame_of.shape[1]
    width = width_of(max_pages)
    _list[(batch * kv_heads,)](
        tables.pages, tables.n_pages, tables.tail_len, frame_of, *listing.outputs, kv_heads, max_pages,
        NP=width, TOKENS=PAGE_TOKENS, ARRIVING=ARRIVING, COPIERS=listing.copiers,
        num_warps=warps_of(width), **early(frame_of.device),
    )  # fmt: skip
