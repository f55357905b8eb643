"""SGLang's server with RheoServe, the blocks' scores replaced by synthetic ones of a given churn.

`python benchmarks/synthetic_server.py CHURN [arguments of sglang.launch_server]`. Random weights have no locality, so
what a gate would pick with them says nothing. Here the logit of a block is a random number that is drawn anew every
1 / CHURN steps, at another step for each block: of few picked among many, a share of about CHURN is replaced at each
step. The gate's own scores are computed as well, so that their cost is paid. For speed only; the answers mean nothing.
"""

import os
import runpy
import sys

import triton
import triton.language as tl

from rheoserve_sgl.ops.gpu.score import PAGES
from rheoserve_sgl.ops.gpu.step import GpuStep

SPREAD = 8.0  # of the logits


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["layer"])
def _draw(
    pages, n_pages, tail_len, quiet, logits, tile_max, tile_sum, layer, churn, spread,
    kv_heads, heads, max_pages, tiles,
    PAGES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
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
        epoch = (step * churn + phase).to(tl.int32).to(tl.uint32)
        drawn = (_mix(own + epoch * 0x9E3779B9) & 0xFFFFFF).to(tl.float32) / 16777216
        found = tl.where(valid, drawn * spread, float("-inf"))
        top = tl.max(found, 0)
        for head in range(heads):
            out = (pair * heads + head).to(tl.int64)
            tl.store(logits + out * max_pages + at, found, mask=valid)
            tl.store(tile_max + out * tiles + tile, top)
            tl.store(tile_sum + out * tiles + tile, tl.sum(tl.exp(found - top), 0))


def replace_scores(churn: float):
    """Let `GpuStep` score with synthetic logits."""
    real = GpuStep._score

    def score(self, index, heads, tables, *rest):
        scratch = real(self, index, heads, tables, *rest)
        batch, kv_heads, _, _ = heads.shape
        max_pages = tables.pages.shape[1]
        tiles = triton.cdiv(max_pages, PAGES)
        _draw[(batch * kv_heads, tiles)](
            tables.pages, tables.n_pages, tables.tail_len, tables.quiet,
            scratch.logits, scratch.tile_max, scratch.tile_sum, index, churn, SPREAD,
            kv_heads, scratch.logits.shape[2], max_pages, tiles, PAGES=PAGES, TOKENS=64,
        )  # fmt: skip
        return scratch

    GpuStep._score = score


# At import: SGLang's processes are spawned, and import this file.
replace_scores(float(os.environ.setdefault("SYNTHETIC_CHURN", sys.argv[1])))

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("sglang.launch_server", run_name="__main__")
