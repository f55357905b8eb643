"""Attention as steps and prefills have it: asked through memory, of new tokens over a prefix; see `operators.py`."""

import time

import torch

from rheoserve_sgl.doctor.inputs import BLOCKS, DIM, GROUP, KV_HEADS, distance, lists
from rheoserve_sgl.ops.attention import attend_torch
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.prefill import prefill_attention, prefill_flash

ANSWER_SECONDS = 5.0


def asking() -> tuple[float, float]:
    """Two layers, one after the other, of threads that poll for the question."""
    layers = torch.randn(2, BLOCKS, 2, 64, DIM).bfloat16()
    visit, q = lists(3, 9), torch.randn(3, KV_HEADS, GROUP, DIM).bfloat16().float()
    exchange = Exchange.make(3, KV_HEADS, GROUP, DIM, 9, pin=False)
    doorbell = Doorbell(exchange, list(layers), DIM**-0.5, 2)
    exchange.q.copy_(q)
    exchange.batch[0] = 3
    for name, part in vars(visit).items():
        getattr(exchange.visit, name).copy_(part)
    doorbell.expect(len(layers))
    worst = 0.0
    for number, blocks in enumerate(layers, 1):
        exchange.bell[0, 0] = number
        deadline = time.perf_counter() + ANSWER_SECONDS
        while exchange.bell[1, 0] != number:
            if time.perf_counter() > deadline:
                return float("inf"), 0.0
            time.sleep(1e-4)
        asked = visit.count > 0  # nothing is written where nothing was asked
        right = attend_torch(q, blocks, visit, DIM**-0.5)
        pairs = zip((exchange.out, exchange.lse), right, strict=True)
        worst = max(worst, *(distance(mine[asked], theirs[asked]) for mine, theirs in pairs))
    doorbell.check()
    return worst, 1e-4


def prefill(device: str = "cpu") -> tuple[float, float]:
    """New tokens over themselves and a prefix, against float64 with a mask."""
    tokens, before = int(torch.randint(1, 200, ())), int(torch.randint(0, 300, ()))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(tokens, KV_HEADS * GROUP, DIM).to(dtype)
    kv = torch.randn(2, KV_HEADS, before + tokens, DIM).to(dtype)
    k, v = (part[:, before:].transpose(0, 1).contiguous().to(device) for part in kv)
    prefix = kv[:, :, :before].contiguous().to(device) if before else None
    if device == "cpu":
        mine = prefill_attention(q, k, v, prefix, DIM**-0.5)
    else:
        prefix = None if prefix is None else prefix.transpose(1, 2)
        mine = prefill_flash(q.to(device), k, v, prefix, DIM**-0.5).cpu()
    keys, values = (part.double().repeat_interleave(GROUP, 0) for part in kv)
    logits = torch.einsum("thd,hsd->hts", q.double(), keys) * DIM**-0.5
    future = torch.arange(before + tokens) > torch.arange(before, before + tokens)[:, None]
    weights = torch.softmax(logits.masked_fill(future, -torch.inf), -1)
    return distance(mine.double(), torch.einsum("hts,hsd->thd", weights, values)), 1e-4 if device == "cpu" else 3e-2
