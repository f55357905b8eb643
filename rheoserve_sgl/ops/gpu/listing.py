"""The resident list of each (request, KV head): frames that attention reads, in page order.

It needs no scores, so `append_gpu` makes it, and attention begins while the CPU's part is still being selected.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rheoserve_sgl.ops.gpu.tables import Tables
from rheoserve_sgl.ops.plan import Visit


@dataclass(frozen=True)
class Listing:
    """What lists are made from, and where they go.

    tables: Tables
    visit: Visit, gets the lists
    arrived: `[1]` int32, how many of the programs that copy beside the step are done with this layer; None: nothing is
        copied
    seen: `[batch, kv_heads]` int32, gets what `arrived` was when each list was made, so that `plan_gpu` agrees with it
    """

    tables: Tables
    visit: Visit
    arrived: torch.Tensor | None
    seen: torch.Tensor


@triton.jit
def frames_of_pages(pages, frame_of, row, head, kv_heads, count, max_pages, NP: tl.constexpr):
    """(block, frame) of each page of a request, and of its newest page (frame); frame -1 beyond the last."""
    at = tl.arange(0, NP)
    page = tl.load(pages + row * max_pages + at, mask=at < max_pages, other=0)
    page = tl.where(at < count, page, 0).to(tl.int64)  # (so that this load does not wait for the count)
    block = page * kv_heads + head
    frame = tl.load(frame_of + block, mask=at < count, other=-1)
    newest = tl.load(pages + row * max_pages + count - 1, mask=count > 0, other=0).to(tl.int64)
    return block, frame, tl.load(frame_of + newest * kv_heads + head)


@triton.jit
def with_arrived(frame, seen, ARRIVING: tl.constexpr, COPIERS: tl.constexpr):
    """What has come to this layer meanwhile is in its frame, once all programs that copy are done with the layer."""
    return tl.where((frame <= ARRIVING) & (seen >= COPIERS), ARRIVING - frame, frame)


@triton.jit
def tail_of(count, newest_frame, tail, TOKENS: tl.constexpr):
    """Valid tokens of a resident list's last block."""
    return tl.where((count > 0) & (newest_frame >= 0), tail, TOKENS)


def width_of(max_pages: int) -> int:
    """Pages of a program, a power of two."""
    return max(triton.next_power_of_2(max_pages), 16)


def warps_of(width: int) -> int:
    return min(max(width // 256, 4), 16)
