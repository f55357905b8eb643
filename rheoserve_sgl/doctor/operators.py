"""Each operator against its plain-torch form, on random inputs, for a second."""

import time

import torch

from rheoserve_sgl.doctor import operators_attention
from rheoserve_sgl.doctor.finding import Finding, find
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
from rheoserve_sgl.ops.append import append_cpu, append_torch
from rheoserve_sgl.ops.attention import attend_cpu, attend_torch
from rheoserve_sgl.ops.attn_gate import gate_keys_cpu, gate_keys_torch, gate_queries_cpu
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.merge import merge_torch
from rheoserve_sgl.ops.plan import Rule, Select, plan_cpu, plan_torch
from rheoserve_sgl.ops.pool_keys import pool_keys_cpu, pool_keys_torch
from rheoserve_sgl.ops.score import record_cpu, record_torch, score_cpu, score_torch
from rheoserve_sgl.runtime.writes import Writes

SECONDS = 1.0


def look_at_operators() -> list[Finding]:
    try:
        extension()
    except ImportError as error:
        return [
            Finding("operators", f"the compiled extension does not load: {error}", "bad", "install RheoServe again")
        ]
    checks = {f"attention, {variant}": lambda v=variant: attention(v) for variant in extension().cpu_variants()}
    checks |= {"merge": merging, "score and plan": selection, "learned gate": gate}
    checks |= {"recorder": recorder, "append": appending, "gate keys": keys}
    checks |= {"doorbell": operators_attention.asking, "prefill": operators_attention.prefill}
    if torch.cuda.is_available():
        from rheoserve_sgl.doctor import operators_gpu, operators_prefill

        checks |= operators_gpu.CHECKS | operators_prefill.CHECKS
    return [find(name, lambda name=name, look=look: repeated(name, look)) for name, look in checks.items()]


def repeated(name: str, once) -> Finding:
    """Try again and again with other numbers; `once` returns how far it was from its oracle, and how far it may be."""
    torch.manual_seed(0)
    began, tries, worst = time.perf_counter(), 0, 0.0
    while tries == 0 or time.perf_counter() - began < SECONDS:
        error, bound = once()
        tries, worst = tries + 1, max(worst, error)
        if not error <= bound:  # a NaN is wrong, too
            return Finding(name, f"off by {error:.3g} at try {tries}; at most {bound:.3g} is right", "bad")
    return Finding(name, f"{tries} tries, off by {worst:.1e} at most")


def attention(variant: str) -> tuple[float, float]:
    dtype = (torch.bfloat16, torch.float16, torch.float32)[int(torch.randint(3, ()))]
    blocks, visit = torch.randn(BLOCKS, 2, 64, DIM).to(dtype), lists(3, 9)
    q = torch.randn(3, KV_HEADS, GROUP, DIM)
    mine = attend_cpu(q, ((blocks, visit),), DIM**-0.5, 2, variant)
    theirs = attend_torch(q, blocks, visit, DIM**-0.5)
    return max(distance(*pair) for pair in zip(mine, theirs, strict=True)), 1e-4


def merging() -> tuple[float, float]:
    """Attention over both tiers at once, merged, against the two apart."""
    stores, visits = torch.randn(2, BLOCKS, 2, 64, DIM).bfloat16(), (lists(3, 9), lists(3, 9))
    q, scale = torch.randn(3, KV_HEADS, GROUP, DIM), DIM**-0.5
    tiers = tuple(zip(stores, visits, strict=True))
    mine = attend_cpu(q, tiers, scale, 2)
    parts = (attend_torch(q, blocks, visit, scale) for blocks, visit in tiers)
    theirs = merge_torch(*next(parts), *next(parts))
    return max(distance(*pair) for pair in zip(mine, theirs, strict=True)), 1e-4


def selection() -> tuple[float, float]:
    """Lists that differ count as 1."""
    pages, n_pages = table()
    q, quick = torch.randn(3, KV_HEADS, GROUP, DIM), torch.randn(BLOCKS, KV_HEADS, DIM)
    mine, theirs = (run(q, quick, pages, n_pages, DIM**-0.5) for run in (score_cpu, score_torch))
    frame_of = torch.randint(-9, 9, (BLOCKS, KV_HEADS), dtype=torch.int32).clamp(min=-1)
    rest = (pages, n_pages, torch.randint(1, 65, (3,), dtype=torch.int32), frame_of)
    rule = Rule(Select.BUDGET, 1, 2, budget_pages=8)
    plans = [run(rule, mine, *rest) for run in (plan_cpu, plan_torch)]
    if not all(same_lists(*(getattr(plan, tier) for plan in plans)) for tier in ("device", "host")):
        return 1.0, 0.0
    return distance(mine, theirs), 1e-3


def gate() -> tuple[float, float]:
    """A learned gate's queries, and the keys of a page that becomes complete and of one that does not."""
    weights, q, positions = gate_weights(), torch.randn(3, KV_HEADS, GROUP, DIM), torch.tensor([0, 63, 900])
    worst = distance(gate_queries_cpu(weights, q, positions, 2), project_query(weights, q, positions))
    writes = Writes(
        pages=torch.tensor([5, 9]), requests=torch.tensor([0, 1]), token=torch.tensor([0, 40]),
        before=torch.tensor([24, 0], dtype=torch.int32), filled=torch.tensor([64, 17], dtype=torch.int32),
        key_position=torch.tensor([128, 0]), most_new=40,
    )  # fmt: skip
    plain, running = torch.randn(57, KV_HEADS, DIM), torch.randn(3, KV_HEADS, 3, DIM)
    keys = torch.zeros(2, BLOCKS, KV_HEADS, weights.gate_dim)
    gate_keys_cpu(weights, plain, writes, running.clone(), keys[0], 2)
    gate_keys_torch(weights, plain, writes, running.clone(), keys[1])
    return max(worst, distance(*keys)), 1e-3


def keys() -> tuple[float, float]:
    """Keys of a gate without weights, of whole pages and of one that is not full."""
    name = ("quest", "mean")[int(torch.randint(2, ()))]
    host, pages = torch.randn(BLOCKS, KV_HEADS, 2, 64, DIM), torch.randperm(BLOCKS)[:3]
    filled = torch.tensor([64, 64, int(torch.randint(1, 64, ()))], dtype=torch.int32)
    mine, theirs = torch.zeros(2, BLOCKS, KV_HEADS, make_gate(name).key_dim(DIM))
    pool_keys_cpu(make_gate(name), host, pages, filled, mine, 2)
    pool_keys_torch(make_gate(name), host, pages, filled, theirs)
    return distance(mine, theirs), 1e-4


def recorder() -> tuple[float, float]:
    pages, n_pages = table()
    scores, chosen = torch.randn(3, KV_HEADS, 40), torch.rand(3, KV_HEADS, 40) < 0.3
    mine, theirs = torch.ones(2, BLOCKS, KV_HEADS)
    record_cpu(scores, chosen, mine, pages, n_pages, 2.0)
    record_torch(scores, chosen, theirs, pages, n_pages, 2.0)
    return distance(mine[1:], theirs[1:]), 1e-4


def appending() -> tuple[float, float]:
    """New tokens into the host store, and into frames where there are some."""
    frame_of, loc = some_frames(), torch.randperm(64 * (BLOCKS - 1))[:5] + 64
    k, v = torch.randn(2, 5, KV_HEADS, DIM)
    stores = []
    for run in (append_cpu, append_torch):
        host, frames = torch.zeros(BLOCKS, KV_HEADS, 2, 64, DIM), torch.zeros(FRAMES + 1, 2, 64, DIM)
        run(host, frames, frame_of, loc, k, v)
        stores.append((host, frames[:FRAMES]))  # the last one takes what has no frame
    return max(distance(*pair) for pair in zip(*stores, strict=True)), 0.0
