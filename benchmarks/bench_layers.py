"""Layers of a decode step in one CUDA graph, as a server has them, with the CPU beside. The last line is JSON.

Each layer is a product of 4,096 x 6,144, `GpuStep.layer` and a product of 4,096 x 4,096, in Qwen3-8B's shapes with a
gate's keys and a budget of 4,096 tokens; the figure is what it takes beyond the products. Where a request's blocks are
all resident it is taken as quiet (nothing selected, seven of eight steps) and not, and fa3 beside it, as SGLang calls
it, with SGLang's own kernel that stores new tokens. `--timeline` prints when one layer's kernels run; `--gate learned`
scores by a learned gate of random weights, in the form of the published ones; all is resident then, since what random
weights select is not the blocks that matter here. (A key is projected where its page is full, one token of 64: not in
these.)
"""

import argparse
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from bench_ops import graph_of, seconds
from machine import describe_machine

from rheoserve_sgl.cache.host_memory import pin_all, zeroed
from rheoserve_sgl.gate.attn_gate import GateWeights
from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.gate.quest import QuestGate
from rheoserve_sgl.gate.seer import SeerGate
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.gpu.ask import Asker
from rheoserve_sgl.ops.gpu.step import GpuStep
from rheoserve_sgl.ops.plan import Rule, Select

LAYERS, KV_HEADS, GROUP, DIM, PAGE, WIDTH = 36, 8, 4, 128, 64, 4096
Q, KV = KV_HEADS * GROUP * DIM, KV_HEADS * DIM
BUDGET = 4096 // PAGE
TAIL = 33  # tokens of the newest page
SHARED = 12  # layers' worth of weights and frames: more than a cache holds
# Requests, tokens of each, share of the blocks that are resident, share of the budget's best blocks that are not.
CASES = [(1, 32768, 1.0, 0.0), (1, 65536, 1.0, 0.0), (1, 65536, 0.6, 0.2), (4, 65536, 0.5, 0.1), (10, 65536, 0.4, 0.05)]


class Layers:
    """The products around attention."""

    def __init__(self):
        def weights(out: int):
            return [0.01 * torch.randn(WIDTH, out, dtype=torch.bfloat16, device="cuda") for _ in range(SHARED)]

        self._into, self._back = weights(Q + 2 * KV), weights(WIDTH)

    def run(self, x, attend):
        for index in range(LAYERS):
            qkv = x @ self._into[index % SHARED]
            q, k, v = qkv[:, :Q], *(part.view(len(x), KV_HEADS, DIM) for part in qkv[:, Q:].split(KV, 1))
            x = attend(index, q, k, v) @ self._back[index % SHARED]
            x = torch.nn.functional.rms_norm(x, (WIDTH,))  # as large in each layer: scores that differ
        return x

    def time(self, batch: int, attend, timeline: bool) -> float:
        """Microseconds of a layer beyond the products."""
        x = torch.randn(batch, WIDTH, dtype=torch.bfloat16, device="cuda")

        def whole():
            self.run(x, attend)

        if timeline:
            print_timeline(graph_of([whole]))
        return 1e6 * (seconds([whole]) - seconds([lambda: self.run(x, lambda index, q, k, v: q)])) / LAYERS


def print_timeline(graph):
    """Start and length in microseconds of the kernels of a layer in the middle."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda event: event["ts"])
    each = len(kernels) // LAYERS
    own = kernels[each * LAYERS // 2 :][: each + 1]
    print("   ", " | ".join(f"{e['name'][:14]} {e['ts'] - own[0]['ts']:.1f}+{e['dur']:.1f}" for e in own), flush=True)


class Case:
    """A pool as `GpuStep` sees one, with random blocks; some matter more than others, the same in each step."""

    def __init__(self, batch: int, context: int, resident: float, outside: float, quiet: bool, frames, host, gate):
        torch.manual_seed(1)
        self.batch, self.gate, pages = batch, gate, context // PAGE
        every = batch * pages + 1
        self._ids = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages) + 1
        shape = (LAYERS, every, KV_HEADS)
        best = torch.rand(shape, device="cuda") < BUDGET / pages
        has = torch.where(
            best, torch.rand(shape, device="cuda") >= outside, torch.rand(shape, device="cuda") < resident
        )
        has[:, self._ids[:, -1].long()] = True
        frame_of = torch.full(shape, -1, dtype=torch.int32, device="cuda")
        frame_of[has] = torch.randint(len(frames[0]), (int(has.sum()),), dtype=torch.int32, device="cuda")
        width = gate.key_dim(DIM)
        keys = torch.randn(*shape, width, dtype=torch.bfloat16, device="cuda") * torch.where(best, 4, 0.1)[..., None]
        self.positions = torch.full((batch,), context - PAGE + TAIL - 1, device="cuda")
        if gate.kind == "seer":
            gate.prepare(torch.randn(context, DIM, device="cuda"), batch, DIM)
        pool = SimpleNamespace(
            device=frame_of.device,
            gate=gate,
            residency=SimpleNamespace(frame_of=frame_of),
            quick=SimpleNamespace(layers=list(keys.bfloat16())),
            importance=torch.zeros(shape, device="cuda"),
            arrived=torch.zeros(LAYERS, dtype=torch.int32, device="cuda"),
            canary=None,
            host=SimpleNamespace(layers=[host[:every]] * LAYERS),
            frames=SimpleNamespace(layers=[frames[index % SHARED] for index in range(LAYERS)]),
        )
        exchange = Exchange.make(batch, KV_HEADS, GROUP, DIM, pages, pin=True)
        self.bell = Doorbell(exchange, [host[:every].flatten(0, 1)] * LAYERS, DIM**-0.5, 14)
        self.asker = Asker(exchange, 10.0, LAYERS)
        self.step = GpuStep(pool, [Rule(Select.BUDGET, 1, 8, BUDGET)] * LAYERS, exchange, self.asker)
        self.bell.expect(10**6)
        self._begin(quiet)

    def _begin(self, quiet: bool):
        """What a step's first kernels leave."""
        tables = self.step.tables
        tables.pages.copy_(self._ids)
        tables.n_pages.fill_(self._ids.shape[1])
        tables.tail_len.fill_(TAIL)
        tables.requests.copy_(torch.arange(self.batch))
        tables.newest.copy_(self._ids[:, -1])
        tables.quiet.fill_(int(quiet))
        self.step.budgets.fill_(BUDGET)
        self.step.exchange.batch[0] = self.batch

    def time(self, layers: Layers, timeline: bool) -> dict:
        loc = self._ids[:, -1].long() * PAGE + TAIL - 1

        def attend(index, q, k, v):
            if self.gate.needs_taps:
                self.step.tap(index, Tapped(q, k.flatten(1), self.positions))
            return self.step.layer(index, q, k, v, loc, DIM**-0.5)

        took = layers.time(self.batch, attend, timeline)
        self.bell.check()
        if self.asker.late:
            raise RuntimeError(f"the CPU did not answer question {self.asker.late} in time")
        asked = int(self.asker.counter)  # by all runs of the layers
        visits = int(self.step.totals[:, 1].sum()) / asked / self.batch / KV_HEADS
        return {"layer_us": took, "waited_us": int(self.asker.waited) / 1000 / asked, "visits_a_head": visits}


def make_gate(name: str):
    """Quest, or a learned gate of random weights for `LAYERS` layers."""
    if name == "quest":
        return QuestGate()

    def weights(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, device="cuda")).bfloat16()

    norms = torch.ones(2, DIM, device="cuda")
    return SeerGate(
        [
            GateWeights(weights(KV_HEADS, GROUP, DIM, DIM), weights(KV_HEADS, 3 * DIM, DIM), *norms, None)
            for _ in range(LAYERS)
        ]
    )


def time_fa3(batch: int, context: int, layers: Layers, timeline: bool) -> float | None:
    """SGLang's fa3 with pages of one token, as it comes."""
    try:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata
        from sglang.kernels.ops.kvcache.kvcache import store_cache
    except ImportError:
        return None
    cache = torch.randn(3, 2, batch * context, 1, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(batch * context // PAGE, device="cuda").int().view(batch, -1, 1) * PAGE
    table = (table + torch.arange(PAGE, device="cuda").int()).view(batch, context)
    lens = torch.full((batch,), context - PAGE + TAIL, dtype=torch.int32, device="cuda")
    loc = table[:, context - PAGE + TAIL - 1].long()
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    shape = {"num_heads": KV_HEADS * GROUP, "num_heads_k": KV_HEADS, "headdim": DIM, "page_size": 1}
    planned = get_scheduler_metadata(
        batch, 1, context, **shape, cache_seqlens=lens, qkv_dtype=torch.bfloat16, cu_seqlens_q=starts, causal=True
    )  # once a step
    options = {"max_seqlen_q": 1, "softmax_scale": DIM**-0.5, "causal": True, "scheduler_metadata": planned}

    def attend(index, q, k, v):
        keys, values = cache[index % len(cache)]
        rows = (k.reshape(batch, -1), v.reshape(batch, -1), keys.view(-1, KV), values.view(-1, KV))
        store_cache(*rows, loc)
        heads = q.contiguous().view(batch, KV_HEADS * GROUP, DIM)
        where = {"page_table": table, "cache_seqlens": lens, "cu_seqlens_q": starts}
        return flash_attn_with_kvcache(heads, keys, values, **where, **options).view(batch, -1)

    return layers.time(batch, attend, timeline)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--gate", choices=["quest", "learned"], default="quest")
    args = parser.parse_args()
    layers, rows = Layers(), []
    frames = torch.randn(SHARED, 1 << 15, 2, PAGE, DIM, dtype=torch.bfloat16, device="cuda")
    host = zeroed(
        (max(batch * context for batch, context, *_ in CASES) // PAGE + 1, KV_HEADS, 2, PAGE, DIM), torch.bfloat16
    )
    pin_all(main, [host], 8)
    learned = [(batch, context, 1.0, 0.0) for batch, context in dict.fromkeys(case[:2] for case in CASES)]
    for batch, context, resident, outside in CASES if args.gate == "quest" else learned:
        for quiet in (True, False) if resident >= 1.0 else (False,):
            row = {"requests": batch, "context": context, "resident": resident, "outside": outside, "quiet": quiet}
            case = Case(batch, context, resident, outside, quiet, frames, host, make_gate(args.gate))
            row |= case.time(layers, args.timeline)
            if quiet:
                row["fa3_us"] = time_fa3(batch, context, layers, args.timeline)
            rows.append({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
            print(rows[-1], flush=True)
    gpu = torch.cuda.get_device_name()
    print(json.dumps({"benchmark": "layers", "options": vars(args), "rows": rows, "gpu": gpu, **describe_machine()}))


if __name__ == "__main__":
    main()
