"""Compile every Triton kernel for GPUs that need not be here: `python compile_kernels.py 80 90` (compute capabilities).

Launches are turned into compilations, so that each kernel is compiled with the arguments it is called with.
"""

import sys
from dataclasses import replace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rheoserve_sgl.cache.pool import addresses
from rheoserve_sgl.cache.residency import Moves, Residency
from rheoserve_sgl.coordinator.swap import Ranking
from rheoserve_sgl.gate.attn_gate import GateWeights
from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.ops.doorbell import Exchange
from rheoserve_sgl.ops.gpu import (
    append,
    append_pages,
    attend,
    begin,
    first,
    fold,
    gate,
    gather,
    listing,
    move,
    plan,
    quiet,
    score,
    snapshot,
    swap,
    tables,
)
from rheoserve_sgl.ops.gpu.early import early
from rheoserve_sgl.ops.plan import Rule, Select, Visit
from rheoserve_sgl.runtime.writes import Writes

LAYERS, BATCH, KV_HEADS, GROUP, PAGES, ALL_PAGES, SLOTS = 2, 3, 2, 4, 512, 9, 5
compiled = []


class Elsewhere:
    """A driver for a GPU that is not here."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # by which compiled kernels are kept

    def get_current_stream(self, device=None):
        return 0


class Bell:
    """What an Asker has."""

    layers, limit = LAYERS, 10**9
    asked = answered = begun = counter = asks = rung = seen = lost = report = waited = torch.zeros(1, dtype=torch.int64)


def compile_instead(launch):
    def run(self, *args, **kwargs):
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        assert kernel.asm["cubin"], self.__name__
        assert kernel.metadata.target == driver.active.get_current_target(), self.__name__
        compiled.append(self.__name__)

    return run


def launch_all(dtype: torch.dtype, dim: int):
    pairs = (BATCH, KV_HEADS)
    host = torch.zeros(ALL_PAGES, KV_HEADS, 2, 64, dim, dtype=dtype)
    frames, k = torch.zeros(7, 2, 64, dim, dtype=dtype), torch.zeros(*pairs, dim, dtype=dtype)
    frame_of, loc = torch.zeros(ALL_PAGES, KV_HEADS, dtype=torch.int32), torch.zeros(BATCH, dtype=torch.int64)
    importance, q = torch.zeros(ALL_PAGES, KV_HEADS), torch.zeros(*pairs, GROUP, dim)
    new = append.NewTokens(host, frames, frame_of, loc, k, k)
    append.append_gpu(new)
    step = tables.Tables.make(BATCH, PAGES, "cpu")
    snapshot.snapshot(torch.zeros(SLOTS, PAGES * 64, dtype=torch.int32), loc, loc, 2, step)
    begin.tell_step(
        torch.zeros(SLOTS, dtype=torch.int32), step.requests, torch.zeros(BATCH, dtype=torch.int32), torch.ones(1),
        Exchange.make(*pairs, GROUP, dim, PAGES, pin=False), 2, 1.0, Bell(),
    )  # fmt: skip
    quiet.mark_quiet(torch.zeros(LAYERS, ALL_PAGES, KV_HEADS, dtype=torch.int32), step)
    scratch = tables.Scratch.make(*pairs, GROUP, PAGES, "cpu")
    score.score_tiles(q, torch.zeros(ALL_PAGES, KV_HEADS, 2 * dim), step, scratch, 0.1, "range", new)
    for keys, appended in ((torch.float32, new), (torch.float32, None), (torch.bfloat16, None)):
        score.score_tiles(q, torch.zeros(ALL_PAGES, KV_HEADS, dim, dtype=keys), step, scratch, 0.1, "dot", appended)
    short = q.to(torch.bfloat16)  # tensor cores
    keys = torch.zeros(ALL_PAGES, KV_HEADS, 2 * dim, dtype=short.dtype)
    score.score_tiles(short, keys, step, scratch, 0.1, "range", new)
    first.add_scores(scratch, step, importance, 2.0)
    exchange = Exchange.make(*pairs, GROUP, dim, PAGES, pin=False)
    visit = Visit(*(torch.zeros_like(tensor) for tensor in vars(exchange.visit).values()))
    budgets, totals = torch.zeros(BATCH, dtype=torch.int32), torch.zeros(SLOTS, 3, dtype=torch.int64)
    ints = torch.zeros(BATCH, dtype=torch.int32)
    lists = listing.Listing(step, frame_of, ints[:1], visit, visit.count)
    listing.list_gpu(lists)
    for select in Select:
        for scored in (scratch, None) if select in (Select.ALL, Select.FORCED) else (scratch,):
            rule = Rule(select, 1, 8, selected_only=select == Select.FORCED)
            own, following = (visit, None) if rule.selected_only else (None, lists)
            for asker in (None, Bell()):
                plan.plan_gpu(
                    rule, q, step, scored, frame_of, importance, torch.ones(1), budgets, exchange, own, visit.count,
                    totals, asker, ints, following,
                )  # fmt: skip
    slots = torch.zeros(LAYERS, 4, dtype=torch.int64)
    there = addresses([host] * LAYERS, "cpu")
    residency = Residency(LAYERS, ALL_PAGES, KV_HEADS, 6, "cpu")
    for ranking in (Ranking("importance", False, 1, 8), Ranking("recency", True, 1, 8)):
        swap.swap_gpu(ranking, residency, torch.zeros(LAYERS, ALL_PAGES, KV_HEADS), step, 4, 0.5)
    move.fill_frames(there, there, host[0, 0].nbytes, Moves(slots, slots, slots[:, 0]))
    gather.gather_prefix(host, frames, frame_of, loc, torch.zeros(2, BATCH * 64, KV_HEADS, dim, dtype=dtype))
    split = attend.SplitRoom(BATCH * KV_HEADS, GROUP, dim, "cpu").split(BATCH * KV_HEADS)
    for beside in (False, True):
        attend.attend_split(q, frames, visit, split, 0.1, beside)
    answer = (exchange.visit.count, exchange.out, exchange.lse)
    for asker in (None, Bell()):
        out, lse = torch.zeros_like(q, dtype=dtype), torch.zeros(*pairs, GROUP)
        attend.merge_parts(visit, split, out, lse, answer, asker, asker is not None)
    matrices = torch.zeros(KV_HEADS, GROUP, dim, dim), torch.zeros(KV_HEADS, 3 * dim, dim)
    weights = GateWeights(*matrices, *torch.zeros(2, dim), torch.zeros(9, dim))
    gate.gate_queries_gpu(weights, q.to(dtype), loc, torch.zeros(*pairs, dim))
    running = torch.zeros(SLOTS, KV_HEADS, 3, dim)
    writes = Writes(loc, loc, loc, ints, ints, loc, 1)
    fold.fold_gpu(k, writes, running)
    for keys, width in (("max_min", 2 * dim), ("mean", dim)):
        fold.pool_gpu(keys, k, writes, torch.zeros(ALL_PAGES, KV_HEADS, width))
    append_pages.append_pages_gpu(host, frames, frame_of, writes, k, k)
    tapped = Tapped(q.to(dtype).flatten(1), k.flatten(1), loc)
    for keys in (torch.float32, torch.bfloat16):
        weights = replace(weights, q=weights.q.to(keys), k=weights.k.to(keys))
        quick = torch.zeros(ALL_PAGES, KV_HEADS, dim, dtype=keys)
        gate.gate_tap_gpu(weights, tapped, step, running, quick, torch.zeros(*pairs, dim))
        score.score_tiles(torch.zeros(*pairs, 1, dim), quick, step, scratch, 0.1, "dot", new, pooled=False)


def main():
    JITFunction.run = compile_instead(JITFunction.run)
    for capability in map(int, sys.argv[1:]):
        driver.set_active(Elsewhere(capability))
        for module in (append, attend, gate, listing, plan, score):
            module.early = early if capability < 90 else lambda device: {"EARLY": True, "launch_pdl": True}
        for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 80)):
            launch_all(dtype, dim)
        print(capability, len(compiled), "compiled:", *sorted(set(compiled)))
        compiled.clear()


if __name__ == "__main__":
    main()
