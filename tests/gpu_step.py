"""A decode step's kernels in a row against the CPU's path, on two pools of the same content (see test_triton.py)."""

import os
from dataclasses import replace

import pytest
import torch
from pools import DIM, HEADS, LAYERS, make_pool
from test_attn_gate import make_weights

from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.gate.seer import SeerGate
from rheoserve_sgl.ops.attention import attend_cpu, attend_tiers
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.gpu.ask import Asker
from rheoserve_sgl.ops.gpu.step import GpuStep
from rheoserve_sgl.ops.plan import Rule, Select, plan
from rheoserve_sgl.runtime.batch import Batch
from rheoserve_sgl.runtime.writes import Writes

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
GROUP, SCALE, MAX_PAGES = 2, DIM**-0.5, 16


class Answers:
    """Answers in Python, layer after layer: what the doorbell's threads do."""

    def __init__(self, pool, exchange):
        self.pool, self.exchange, self.asked = pool, exchange, 0

    def __call__(self):
        exchange, rows = self.exchange, int(self.exchange.batch)
        visit = replace(exchange.visit, **{n: t[:rows] for n, t in vars(exchange.visit).items()})
        blocks = self.pool.host.blocks(self.asked % LAYERS)
        out, lse = attend_cpu(exchange.q[:rows], ((blocks, visit),), SCALE, 1)
        exchange.out[:rows], exchange.lse[:rows] = out, lse
        self.asked += 1


def fill(pool, pages: torch.Tensor, lens: torch.Tensor, rule: Rule):
    """Prompts of these lengths, the same whatever the device; half of the blocks get frames, all of the first one's."""
    generator = torch.Generator().manual_seed(0)
    device = pool.device
    for row, length in enumerate(lens.tolist()):
        loc = (pages[row][:, None] * 64 + torch.arange(64)).flatten()[:length]
        for layer in range(LAYERS):
            k, v = torch.randn(2, length, HEADS, DIM, generator=generator)
            pool.write(layer, loc.to(device), k.to(device), v.to(device))
            plain = torch.randn(length, HEADS * DIM, generator=generator).to(device)
            batch = Batch.build(table_of(pages), torch.tensor([row]), lens[row : row + 1], length, 1, 1)
            writes = Writes.of_extend(batch, [0], [length])
            writes = moved(writes, device)
            pool.gate.refresh(pool, layer, writes, k.to(device), Tapped(plain, plain, writes.key_position))
    wanted = torch.rand(pool.residency.frame_of.shape, generator=generator) < 0.5
    wanted[:, pages[0]] = True
    used = torch.zeros(wanted.shape[1], dtype=torch.bool)
    for row, length in enumerate(lens.tolist()):
        used[pages[row, : (length + 63) // 64]] = True
    pool.exchange((wanted & used[:, None]).to(device), 10**6)


def moved(thing, device):
    """A dataclass with its tensors on the device."""
    tensors = {name: value for name, value in vars(thing).items() if isinstance(value, torch.Tensor)}
    return replace(thing, **{name: tensor.to(device) for name, tensor in tensors.items()})


def table_of(pages: torch.Tensor) -> torch.Tensor:
    return (pages[:, :, None] * 64 + torch.arange(64)).flatten(1).to(torch.int32)


def make(device: str, selector: str):
    pool, _ = make_pool(64 * 80, 64 * 20, device, selector="quest" if selector == "seer" else selector, canary="raise")
    if selector == "seer":
        torch.manual_seed(3)
        weights = [make_weights(dim=DIM, group=GROUP, positions=1024) for _ in range(LAYERS)]
        pool.gate = SeerGate([moved(layer, device) for layer in weights])
        pool.gate.prepare(weights[0].rope.to(device), 8, DIM)
        pool.quick.layers = [torch.zeros(81, HEADS, DIM, device=device) for _ in range(LAYERS)]
    return pool


RULES = {
    "full": Rule(Select.ALL, 1, 1),
    "window": Rule(Select.FORCED, 1, 1, selected_only=True),
    "budget": Rule(Select.BUDGET, 1, 1, budget_pages=5),
    "selected": Rule(Select.BUDGET, 1, 1, budget_pages=5, selected_only=True),
    "threshold": Rule(Select.THRESHOLD, 1, 1, log_threshold=-2.0),
}


# Interpreted, a pair takes ten seconds: those then, that differ in more than what their parts are tested for.
PAIRS = [(name, selector) for name in RULES for selector in ("quest", "mean", "seer")]
SOME = {
    ("full", "mean"),
    ("window", "quest"),
    ("budget", "quest"),
    ("selected", "seer"),
    ("budget", "seer"),
    ("threshold", "mean"),
}


@pytest.mark.parametrize(("name", "selector"), PAIRS if DEVICE == "cuda" else sorted(SOME))
def test_steps_equal_the_cpus(name, selector):
    rule = RULES[name]
    rules = [rule] * (LAYERS - 1) + [replace(rule, select=Select.ALL)]  # a dense layer among them
    lens = torch.tensor([62, 700, 128])
    pages = torch.randperm(80)[: 3 * MAX_PAGES].view(3, -1) + 1
    ours, theirs = make(DEVICE, selector), make("cpu", selector)
    fill(ours, pages, lens, rule), fill(theirs, pages, lens, rule)
    exchange = Exchange.make(6, HEADS, GROUP, DIM, MAX_PAGES, pin=DEVICE == "cuda")
    if DEVICE == "cuda":
        stores = [ours.host.blocks(layer) for layer in range(LAYERS)]
        doorbell = Doorbell(exchange, stores, SCALE, 2)
        step = GpuStep(ours, rules, exchange, Asker(exchange, 10.0, LAYERS))
    else:
        step = GpuStep(ours, rules, exchange, None, Answers(ours, exchange))
    table, slots = table_of(pages), torch.arange(3)
    attended = torch.zeros(3, dtype=torch.int64)
    for at in range(3):
        lens = lens + 1
        batch = Batch.build(table, slots, lens, int(lens.max()), rule.sink_pages, rule.window_pages)
        writes = Writes.of_decode(batch)
        loc = table[slots, lens - 1].long()
        limits = torch.full((3,), rule.budget_pages, dtype=torch.int32, device=DEVICE)
        step.begin(table.to(DEVICE), slots.to(DEVICE), lens.to(DEVICE), 3, 5, limits, 1.5**at)
        if step.rests:  # at 63 tokens; the second step is one of the eighth, the third begins a page without frames
            assert step.tables.quiet[:3].tolist() == [int(at == 0), 0, 0]
        if DEVICE == "cuda":
            doorbell.expect(LAYERS)
        for layer in range(LAYERS):
            q, plain_q = torch.randn(2, 3, HEADS * GROUP * DIM)
            k, v, plain_k = torch.randn(3, 3, HEADS, DIM)
            theirs.write(layer, loc, k, v)
            heads, scores = q.view(3, HEADS, GROUP, DIM), None
            tapped = Tapped(plain_q, plain_k.flatten(1), lens - 1)
            if rule.needs_scores:
                theirs.gate.refresh(theirs, layer, writes, k, tapped)
                scores = theirs.gate.score(theirs, layer, heads, SCALE, batch, tapped)
            frame_of = theirs.residency.frame_of[layer]
            lists = plan(rules[layer], scores, batch.pages, batch.n_pages, batch.tail_len, frame_of)
            frames, host = theirs.frames.layers[layer], theirs.host.blocks(layer)
            expected = attend_tiers(heads, frames, host, lists, SCALE, 1)
            attended += torch.tensor([lists.device.count.sum(), lists.host.count.sum(), lists.chosen.sum()])
            if selector == "seer":
                step.gate_q.fill_(torch.nan)
                step.tap(layer, Tapped(*(padded(t).to(DEVICE) for t in (plain_q, plain_k.flatten(1), lens - 1))))
            places = padded(loc).to(DEVICE)
            got = step.layer(layer, *(padded(t).to(DEVICE) for t in (q, k, v)), places, SCALE)
            torch.testing.assert_close(got[:3].cpu(), expected.view(3, -1), rtol=1e-4, atol=1e-5)
            assert not got[3:].any()  # padding attends to nothing
    assert step.totals.sum(0).tolist() == attended.tolist()
    assert torch.equal(ours.canary.known.cpu(), theirs.canary.known)
    for layer in range(LAYERS):
        assert torch.equal(ours.host.layers[layer][1:], theirs.host.layers[layer][1:])
        assert torch.equal(ours.canary.sums[layer, 1:].cpu(), theirs.canary.sums[layer, 1:])


def padded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, torch.zeros((2, *tensor.shape[1:]), dtype=tensor.dtype)))
