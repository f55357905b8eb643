"""Kernels of a decode step on a GPU, each against its plain-torch form on the CPU; see `operators.py`."""

import torch

from rheoserve_sgl.cache.host_memory import pin_all, zeroed
from rheoserve_sgl.doctor.inputs import (
    BLOCKS,
    DIM,
    FRAMES,
    GROUP,
    KV_HEADS,
    distance,
    gate_weights,
    lists,
    same_lists,
    some_frames,
    table,
)
from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.gate.attn_gate import project_query
from rheoserve_sgl.ops.append import append_torch
from rheoserve_sgl.ops.attention import attend_torch
from rheoserve_sgl.ops.merge import merge_torch
from rheoserve_sgl.ops.plan import Rule, Select, Visit, plan_torch
from rheoserve_sgl.ops.score import record_torch, score_torch

PINNED = []  # for as long as the program runs: the driver knows their addresses


def attention() -> tuple[float, float]:
    """Over resident lists, and the merge with a CPU's part."""
    from rheoserve_sgl.ops.gpu.attend import SplitRoom, attend_split, merge_parts

    blocks, here, there = torch.randn(BLOCKS, 2, 64, DIM).bfloat16(), lists(3, 9), lists(3, 9)
    q = torch.randn(3, KV_HEADS, GROUP, DIM).bfloat16().float()
    host = attend_torch(q, blocks, there, DIM**-0.5)
    visit = Visit(*(part.cuda() for part in vars(here).values()))
    split = SplitRoom(3 * KV_HEADS, GROUP, DIM, "cuda").split(3 * KV_HEADS)
    attend_split(q.cuda(), blocks.cuda(), visit, split, DIM**-0.5)
    out, lse = torch.empty_like(q, device="cuda"), torch.empty(q.shape[:3], device="cuda")
    merge_parts(visit, split, out, lse, (there.count.cuda(), *(part.cuda() for part in host)))
    right = merge_torch(*attend_torch(q, blocks, here, DIM**-0.5), *host)
    return max(distance(mine.cpu(), theirs) for mine, theirs in zip((out, lse), right, strict=True)), 2e-2


def selection() -> tuple[float, float]:
    """Quest's scores and the plan, on tensor cores as of a 16-bit model; lists that differ count as 1."""
    from rheoserve_sgl.ops.doorbell import Exchange
    from rheoserve_sgl.ops.gpu.plan import plan_gpu
    from rheoserve_sgl.ops.gpu.score import score_tiles
    from rheoserve_sgl.ops.gpu.tables import Scratch, Tables

    pages, n_pages = table()
    tail_len = torch.randint(1, 65, (3,), dtype=torch.int32)
    q, quick = torch.randn(3, KV_HEADS, GROUP, DIM).bfloat16(), torch.randn(BLOCKS, KV_HEADS, 2 * DIM).bfloat16()
    frame_of, rule = some_frames(), Rule(Select.BUDGET, 1, 2, budget_pages=8)
    scores = score_torch(make_gate("quest").query(q.float()), quick.float(), pages, n_pages, DIM**-0.5)
    right = plan_torch(rule, scores, pages, n_pages, tail_len, frame_of)
    recorded = torch.zeros(BLOCKS, KV_HEADS)
    record_torch(scores, right.chosen, recorded, pages, n_pages, 1.0)

    most = pages.shape[1]
    tables = Tables.make(3, most, "cuda")
    for mine, theirs in ((tables.pages, pages), (tables.n_pages, n_pages), (tables.tail_len, tail_len)):
        mine.copy_(theirs)
    scratch = Scratch.make(3, KV_HEADS, GROUP, most, "cuda")
    exchange = Exchange.make(3, KV_HEADS, GROUP, DIM, most, pin=True)
    visit = Visit(*(torch.zeros_like(part, device="cuda") for part in vars(exchange.visit).values()))
    importance, weight = torch.zeros(BLOCKS, KV_HEADS, device="cuda"), torch.ones(1, device="cuda")
    budgets = torch.full((3,), rule.budget_pages, dtype=torch.int32, device="cuda")
    visited, totals = torch.zeros_like(visit.count), torch.zeros((3, 3), dtype=torch.int64, device="cuda")
    here = [t.cuda() for t in (q, quick, frame_of)]
    score_tiles(*here[:2], tables, scratch, DIM**-0.5, "range")
    plan_gpu(rule, here[0], tables, scratch, here[2], importance, weight, budgets, exchange, visit, visited, totals)
    torch.cuda.synchronize()
    ours = Visit(*(part.cpu() for part in vars(visit).values()))
    again = plan_torch(rule, scores + 1e-4 * torch.rand_like(scores), pages, n_pages, tail_len, frame_of)
    if not torch.equal(again.chosen, right.chosen):
        return 0.0, 1.0  # too close for rounding to decide it
    if not (same_lists(ours, right.device) and same_lists(exchange.visit, right.host)):
        return 1.0, 0.0
    return distance(importance.cpu()[1:], recorded[1:]), 1e-3


def gate() -> tuple[float, float]:
    """A learned gate's queries."""
    from rheoserve_sgl.ops.gpu.gate import gate_queries_gpu

    weights, q, positions = gate_weights(), torch.randn(3, KV_HEADS, GROUP, DIM), torch.tensor([0, 63, 900])
    there = type(weights)(*(t.cuda() for t in (weights.q, weights.k, weights.q_norm, weights.k_norm, weights.rope)))
    out = torch.empty(3, KV_HEADS, weights.gate_dim, device="cuda")
    gate_queries_gpu(there, q.cuda(), positions.cuda(), out)
    return distance(out.cpu(), project_query(weights, q, positions)), 1e-3


def appending() -> tuple[float, float]:
    """New tokens into frames and into pinned memory, and blocks from there into other frames."""
    from rheoserve_sgl.cache.pool import addresses
    from rheoserve_sgl.cache.residency import Moves
    from rheoserve_sgl.ops.gpu.append import NewTokens, append_gpu
    from rheoserve_sgl.ops.gpu.move import fill_frames

    if not PINNED:
        PINNED.append(zeroed((BLOCKS, KV_HEADS, 2, 64, DIM), torch.bfloat16))
        pin_all(appending, PINNED, 1)
    host, frame_of = PINNED[0], some_frames()
    host.zero_()
    loc = torch.randperm(64 * (BLOCKS - 1))[:5] + 64
    k, v = torch.randn(2, 5, KV_HEADS, DIM).bfloat16()
    right, kept = torch.zeros_like(host), torch.zeros(FRAMES + 1, 2, 64, DIM, dtype=torch.bfloat16)
    frames = kept.cuda()
    append_gpu(NewTokens(host, frames, frame_of.cuda(), loc.cuda(), k.cuda(), v.cuda()))
    append_torch(right, kept, frame_of, loc, k, v)
    # (On a CPU the last frame takes what has none.)
    worst = distance(frames[:FRAMES].cpu().float(), kept[:FRAMES].float())
    blocks = (loc // 64 * KV_HEADS)[None].cuda()
    moves = Moves(blocks, torch.arange(5, device="cuda")[None], torch.tensor([5], device="cuda"))
    fill_frames(addresses([host], "cuda"), addresses([frames], "cuda"), right[0, 0].nbytes, moves)
    torch.cuda.synchronize()
    moved = right.flatten(0, 1)[blocks[0].cpu()]
    return max(worst, distance(host.float(), right.float()), distance(frames[:5].cpu().float(), moved.float())), 0.0


CHECKS = {
    "attention and merge, GPU": attention,
    "score and plan, GPU": selection,
    "learned gate, GPU": gate,
    "append and exchange, GPU": appending,
}
