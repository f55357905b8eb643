"""Each operator against its plain-torch form, on random inputs, for a second."""

import time

import torch

from rheoserve_sgl.doctor.finding import Finding, find
from rheoserve_sgl.ops.append import append_cpu, append_torch
from rheoserve_sgl.ops.attention import attend_cpu, attend_torch
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.plan import Rule, Select, Visit, plan_cpu, plan_torch
from rheoserve_sgl.ops.score import record_cpu, record_torch, score_cpu, score_torch

SECONDS = 1.0
KV_HEADS, GROUP, DIM, BLOCKS = 2, 4, 128, 64


def look_at_operators() -> list[Finding]:
    try:
        extension()
    except ImportError as error:
        return [
            Finding("operators", f"the compiled extension does not load: {error}", "bad", "install RheoServe again")
        ]
    checks = {f"attention, {variant}": lambda v=variant: attention(v) for variant in extension().cpu_variants()}
    checks |= {"score and plan": selection, "recorder": recorder, "append": appending}
    if torch.cuda.is_available():
        checks["attention, GPU"] = gpu_attention
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


def lists(batch: int, width: int) -> Visit:
    """Random blocks, some lists empty, last blocks not full."""
    blocks = torch.rand(batch, KV_HEADS, BLOCKS).argsort(-1)[..., :width].int().contiguous()
    shape = (batch, KV_HEADS)
    counts = torch.randint(0, width + 1, shape, dtype=torch.int32)
    return Visit(blocks, counts, torch.randint(1, 65, shape, dtype=torch.int32))


def distance(mine, theirs) -> float:
    """The largest difference; positions where both are infinite agree."""
    same = (mine == theirs) | (mine.isinf() & theirs.isinf())
    return float((mine - theirs).abs().masked_fill(same, 0.0).max())


def attention(variant: str) -> tuple[float, float]:
    dtype = (torch.bfloat16, torch.float16, torch.float32)[int(torch.randint(3, ()))]
    blocks, visit = torch.randn(BLOCKS, 2, 64, DIM).to(dtype), lists(3, 9)
    q = torch.randn(3, KV_HEADS, GROUP, DIM)
    mine = attend_cpu(q, ((blocks, visit),), DIM**-0.5, 2, variant)
    theirs = attend_torch(q, blocks, visit, DIM**-0.5)
    return max(distance(*pair) for pair in zip(mine, theirs, strict=True)), 1e-4


def gpu_attention() -> tuple[float, float]:
    from rheoserve_sgl.ops.gpu.attend import attend_gpu

    blocks, visit = torch.randn(BLOCKS, 2, 64, DIM).bfloat16(), lists(3, 9)
    q = torch.randn(3, KV_HEADS, GROUP, DIM).bfloat16().float()
    there = Visit(*(part.cuda() for part in vars(visit).values()))
    mine = attend_gpu(q.cuda(), blocks.cuda(), there, DIM**-0.5)
    theirs = attend_torch(q, blocks, visit, DIM**-0.5)
    return max(distance(got.cpu(), right) for got, right in zip(mine, theirs, strict=True)), 2e-2


def table() -> tuple[torch.Tensor, torch.Tensor]:
    pages = torch.stack([torch.randperm(BLOCKS - 1)[:40] + 1 for _ in range(3)])
    return pages, torch.randint(1, 41, (3,), dtype=torch.int32)


def selection() -> tuple[float, float]:
    """Lists that differ count as 1."""
    pages, n_pages = table()
    q, quick = torch.randn(3, KV_HEADS, GROUP, DIM), torch.randn(BLOCKS, KV_HEADS, DIM)
    mine, theirs = (run(q, quick, pages, n_pages, DIM**-0.5) for run in (score_cpu, score_torch))
    frame_of = torch.randint(-9, 9, (BLOCKS, KV_HEADS), dtype=torch.int32).clamp(min=-1)
    rest = (pages, n_pages, torch.randint(1, 65, (3,), dtype=torch.int32), frame_of)
    rule = Rule(Select.BUDGET, 1, 2, budget_pages=8)
    plans = [run(rule, mine, *rest) for run in (plan_cpu, plan_torch)]
    for tier in ("device", "host"):
        one, other = (getattr(plan, tier) for plan in plans)
        listed = torch.arange(one.blocks.shape[-1]) < one.count[..., None]
        if not torch.equal(one.count, other.count) or bool(((one.blocks != other.blocks) & listed).any()):
            return 1.0, 0.0
    return distance(mine, theirs), 1e-3


def recorder() -> tuple[float, float]:
    pages, n_pages = table()
    scores, chosen = torch.randn(3, KV_HEADS, 40), torch.rand(3, KV_HEADS, 40) < 0.3
    mine, theirs = torch.ones(2, BLOCKS, KV_HEADS)
    record_cpu(scores, chosen, mine, pages, n_pages, 2.0)
    record_torch(scores, chosen, theirs, pages, n_pages, 2.0)
    return distance(mine[1:], theirs[1:]), 1e-4


def appending() -> tuple[float, float]:
    frame_of = torch.arange(BLOCKS * KV_HEADS, dtype=torch.int32).view(BLOCKS, KV_HEADS) % 7 - 1
    loc = torch.randperm(64 * (BLOCKS - 1))[:5] + 64
    k, v = torch.randn(2, 5, KV_HEADS, DIM)
    stores = []
    for run in (append_cpu, append_torch):
        host, frames = torch.zeros(BLOCKS, KV_HEADS, 2, 64, DIM), torch.zeros(7, 2, 64, DIM)
        run(host, frames, frame_of, loc, k, v)
        stores.append(host)
    return distance(*stores), 0.0
