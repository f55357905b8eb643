"""Scores of blocks that a benchmark makes up in place of a gate's: drawn at random, or a real trace's selection.

Random weights have no locality, so what a gate would pick with them says nothing. `Drawn` gives each block a random
logit that is drawn anew every 1 / churn steps, at another step for each block: of few picked among many, a share of
about that churn is replaced at each step. `Traced` replays what a real model's gate selected
(benchmarks/traces/pack.py). For speed only; the answers mean nothing.
"""

import threading
import time
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.gpu.early import early, start
from rheoserve_sgl.ops.gpu.score import PAGES

SPREAD = 8.0  # of the logits


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _store(found, at, valid, pair, tile, logits, tile_max, tile_sum, heads, max_pages, tiles):
    top = tl.max(found, 0)
    for head in range(heads):
        out = (pair * heads + head).to(tl.int64)
        tl.store(logits + out * max_pages + at, found, mask=valid)
        tl.store(tile_max + out * tiles + tile, top)
        tl.store(tile_sum + out * tiles + tile, tl.sum(tl.exp(found - top), 0))


@triton.jit(do_not_specialize=["layer"])
def _draw(
    pages, n_pages, tail_len, quiet, logits, tile_max, tile_sum, layer, churn_at, spread,
    kv_heads, heads, max_pages, tiles,
    PAGES: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    pair, tile = tl.program_id(0), tl.program_id(1)
    row = pair // kv_heads
    count = tl.load(n_pages + row)
    if (tile * PAGES < count) & (tl.load(quiet + row) == 0):  # of a quiet request all is resident: nobody reads them
        at = tile * PAGES + tl.arange(0, PAGES)
        valid = at < count
        step = ((count - 1) * TOKENS + tl.load(tail_len + row)).to(tl.float32)
        page = tl.load(pages + row * max_pages + at, mask=valid, other=0)
        own = _mix((page * kv_heads + pair % kv_heads).to(tl.uint32) + _mix((layer + 1).to(tl.uint32)))
        phase = (own & 0xFFFF).to(tl.float32) / 65536
        epoch = (step * tl.load(churn_at) + phase).to(tl.int32).to(tl.uint32)
        drawn = (_mix(own + epoch * 0x9E3779B9) & 0xFFFFFF).to(tl.float32) / 16777216
        found = tl.where(valid, drawn * spread, float("-inf"))
        _store(found, at, valid, pair, tile, logits, tile_max, tile_sum, heads, max_pages, tiles)


@triton.jit(do_not_specialize=["layer"])
def _replay(
    bits, pages, n_pages, tail_len, quiet, logits, tile_max, tile_sum, layer, spread,
    steps, words, trace_layers, trace_heads, trace_pages, kv_heads, heads, max_pages, tiles,
    PAGES: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    pair, tile = tl.program_id(0), tl.program_id(1)
    row = pair // kv_heads
    count = tl.load(n_pages + row)
    if (tile * PAGES < count) & (tl.load(quiet + row) == 0):
        at = tile * PAGES + tl.arange(0, PAGES)
        valid = at < count
        # There and back again, each request elsewhere in the trace, told by its first page.
        length = (count - 1) * TOKENS + tl.load(tail_len + row)
        own = _mix(tl.load(pages + row * max_pages).to(tl.uint32))
        step = (length + (own & 0xFFFF).to(tl.int32)) % (2 * steps)
        step = tl.where(step < steps, step, 2 * steps - 1 - step)
        lane = (step * trace_layers + layer % trace_layers) * trace_heads + pair % trace_heads
        # A longer request has `stretch` pages for each of the trace's, one of which is the selected one.
        stretch = tl.maximum(count // trace_pages, 1)
        place = at // stretch
        mine = at % stretch == (_mix(place.to(tl.uint32) + own) % stretch.to(tl.uint32)).to(tl.int32)
        inside = valid & mine & (place < words * 32)
        word = tl.load(bits + lane.to(tl.int64) * words + place // 32, mask=inside, other=0)
        selected = inside & (((word >> (place % 32)) & 1) != 0)
        noise = (_mix(at.to(tl.uint32) + own) & 0xFFFF).to(tl.float32) / 65536  # of the rest, always the same order
        found = tl.where(valid, tl.where(selected, spread, 0.0) + noise, float("-inf"))
        _store(found, at, valid, pair, tile, logits, tile_max, tile_sum, heads, max_pages, tiles)


class Drawn:
    """Logits of a churn that a file holds, followed when it changes, also by captured graphs."""

    def __init__(self, path: Path):
        self._path, self._value = path, None

    def fill(self, layer: int, tables, scratch, kv_heads: int):
        """Replace the logits and tile sums of `scratch` (see rheoserve_sgl.ops.gpu.score.score_tiles)."""
        launch(_draw, (), layer, (self._on(tables.pages.device),), (), tables, scratch, kv_heads)

    def _on(self, device: torch.device) -> torch.Tensor:
        if self._value is None:
            with torch.inference_mode(False):  # so that the thread may write to it
                self._value = torch.full((1,), float(self._path.read_text()), dtype=torch.float32, device=device)
            threading.Thread(target=self._follow, daemon=True).start()
        return self._value

    def _follow(self):
        known = None
        while True:
            text = self._path.read_text()
            if text and text != known:  # empty while it is being written
                self._value.fill_(float(text))
                known = text
            time.sleep(0.5)


class Traced:
    """Logits by which what a packed trace selected is selected, if budget, sink and window are the trace's."""

    def __init__(self, path: Path):
        trace = np.load(path)
        self._bits, self._pages = torch.from_numpy(trace["bits"]), int(trace["pages"])
        self._there = None

    def fill(self, layer: int, tables, scratch, kv_heads: int):
        """As `Drawn.fill`; layers and KV heads beyond the trace's begin with its first again."""
        if self._there is None:
            self._there = self._bits.to(tables.pages.device)
        steps, layers, heads, words = self._bits.shape
        launch(
            _replay, (self._there,), layer, (), (steps, words, layers, heads, self._pages), tables, scratch, kv_heads
        )


def launch(kernel, before: tuple, layer: int, after: tuple, sizes: tuple, tables, scratch, kv_heads: int):
    batch, max_pages = tables.pages.shape
    tiles = triton.cdiv(max_pages, PAGES)
    kernel[(batch * kv_heads, tiles)](
        *before, tables.pages, tables.n_pages, tables.tail_len, tables.quiet,
        scratch.logits, scratch.tile_max, scratch.tile_sum, layer, *after, SPREAD, *sizes,
        kv_heads, scratch.logits.shape[2], max_pages, tiles,
        PAGES=PAGES, TOKENS=PAGE_TOKENS, **early(tables.pages.device),
    )  # fmt: skip
