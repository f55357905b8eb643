"""What blocks matter to a prompt's last query: their first importance, before any step has selected.

The same as `score` and `record` (rheoserve_sgl/ops/score.py), by the kernels of a decode step.
"""

import torch
import triton
import triton.language as tl

from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.ops.gpu.plan import scores
from rheoserve_sgl.ops.gpu.score import PAGES
from rheoserve_sgl.ops.gpu.snapshot import snapshot
from rheoserve_sgl.ops.gpu.step import GpuStep
from rheoserve_sgl.ops.gpu.tables import Scratch, Tables, warps_of, width_of


@triton.jit(do_not_specialize=["weight"])
def _first(
    logits, tile_max, tile_sum, pages, n_pages, importance, weight, kv_heads, heads, max_pages, tiles,
    TILES: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, head = pair // kv_heads, pair % kv_heads
    count = tl.load(n_pages + row)
    at = tl.arange(0, NP)
    valid = at < count
    page = tl.load(pages + row * max_pages + at, mask=valid, other=0).to(tl.int64)
    score = scores(logits, tile_max, tile_sum, pair, heads, count, at, max_pages, tiles, TILES, PAGES, HEADS)
    gain = tl.where(score == score, tl.exp(score), 0.0)
    tl.atomic_add(importance + page * kv_heads + head, gain * weight, mask=valid, sem="relaxed")


def add_scores(scratch: Scratch, tables: Tables, importance: torch.Tensor, weight: float):
    """Add weight * exp(score) to the importance of each request's blocks; a NaN score adds nothing.

    Args:
        scratch: what `score_tiles` filled for `tables`
        importance: `[all_pages, kv_heads]` float32
    """
    rows, max_pages = tables.pages.shape
    kv_heads, heads = scratch.logits.shape[1:3]
    tiles, width = scratch.tile_max.shape[-1], width_of(max_pages)
    _first[(rows * kv_heads,)](
        scratch.logits, scratch.tile_max, scratch.tile_sum, tables.pages, tables.n_pages, importance, float(weight),
        kv_heads, heads, max_pages, tiles,
        TILES=max(triton.next_power_of_2(tiles), 1), PAGES=PAGES, HEADS=triton.next_power_of_2(heads), NP=width,
        num_warps=warps_of(width),
    )  # fmt: skip


class FirstScores:
    """For the batches of a prefill, with a decode step's room for scores.

    Args:
        step: GpuStep that selects

    Raises:
        ValueError: the step selects in no layer, and has no room for scores
    """

    def __init__(self, step: GpuStep):
        if not step.selects:
            raise ValueError("step.selects is False; needed: a step that selects in some layer")
        self._step = step
        rows, max_pages = step.tables.pages.shape
        self._room = Tables.make(rows, max_pages, step.tables.pages.device)
        self._tables = self._room

    def begin(self, req_to_token, slots, lens, rows: int):
        """Before a batch's first layer: its page table, in stream order. See `snapshot`."""
        self._tables = self._room.rows(rows)
        snapshot(req_to_token, slots, lens, rows, self._tables)

    def layer(self, index: int, last: torch.Tensor, scale: float, weight: float, tapped: Tapped | None):
        """See `add_scores`.

        Args:
            last: `[rows, kv_heads, group, head_dim]`, each request's last query, any float dtype
            tapped: the same before RoPE, for a learned gate
        """
        step, tables = self._step, self._tables
        add_scores(step.score(index, last, tables, scale, tapped=tapped), tables, step.pool.importance[index], weight)
