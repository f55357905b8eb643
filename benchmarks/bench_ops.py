"""The kernels of a decode step on a GPU, each against its limit in the same run. The last line is JSON.

Shapes: 8 KV heads of 128, 4 query heads each, bf16 (Qwen3-8B). Every call reads other frames than the one before, out
of several GB, so that nothing comes from a cache.
"""

import argparse
import json
import statistics

import torch
from machine import describe_machine

from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.gpu.ask import Asker
from rheoserve_sgl.ops.gpu.attend import SplitRoom, attend_split, merge_parts
from rheoserve_sgl.ops.gpu.plan import plan_gpu
from rheoserve_sgl.ops.gpu.score import score_tiles
from rheoserve_sgl.ops.gpu.tables import Scratch, Tables
from rheoserve_sgl.ops.plan import Rule, Select, Visit

KV_HEADS, GROUP, DIM, PAGE = 8, 4, 128, 64
BLOCK = 2 * PAGE * DIM * 2  # bytes
CALLS = 20  # in a graph, each on its own data


def seconds(calls) -> float:
    """Of one call: the median of graphs of all of them, replayed."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes read and written a second by a device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / seconds([lambda: target.copy_(source)] * 4)


class Case:
    """One batch and context; `resident` of the blocks are in frames."""

    def __init__(self, batch: int, context: int, resident: float, frames: torch.Tensor):
        self.batch, self.context, self.frames = batch, context, frames
        self.pages = context // PAGE
        self.listed = max(int(self.pages * resident), 1)
        pairs = (batch, KV_HEADS)
        self.q = torch.randn(*pairs, GROUP, DIM, device="cuda")
        self.visits = []
        for _ in range(CALLS):
            lists = torch.randint(len(frames), (*pairs, self.pages), dtype=torch.int32, device="cuda")
            count = torch.full(pairs, self.listed, dtype=torch.int32, device="cuda")
            self.visits.append(Visit(lists, count, torch.full_like(count, PAGE)))
        self.split = SplitRoom(batch * KV_HEADS, GROUP, DIM, "cuda").split(batch * KV_HEADS)
        self.out = torch.empty(*pairs, GROUP, DIM, dtype=torch.bfloat16, device="cuda")
        self.lse = torch.empty(*pairs, GROUP, device="cuda")
        none = torch.zeros(pairs, dtype=torch.int32, device="cuda")
        self.no_host = (none, self.split.acc, self.split.lse)

    @property
    def bytes(self) -> int:
        return self.batch * KV_HEADS * self.listed * BLOCK

    def attention(self) -> float:
        def call(visit):
            attend_split(self.q, self.frames, visit, self.split, DIM**-0.5)
            merge_parts(visit, self.split, self.out, self.lse, self.no_host)

        return seconds([lambda visit=visit: call(visit) for visit in self.visits])

    def fa3(self) -> float | None:
        """FlashAttention-3 over as many bytes, contiguous."""
        try:
            from sgl_kernel.flash_attn import flash_attn_with_kvcache
        except ImportError:
            return None
        tokens = self.listed * PAGE
        shape = (self.batch, tokens, KV_HEADS, DIM)
        stores = [torch.randn(2, *shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        q = torch.randn(self.batch, 1, KV_HEADS * GROUP, DIM, dtype=torch.bfloat16, device="cuda")
        lens = torch.full((self.batch,), tokens, dtype=torch.int32, device="cuda")
        calls = [lambda s=s: flash_attn_with_kvcache(q, s[0], s[1], cache_seqlens=lens, causal=True) for s in stores]
        return seconds(calls * 4)

    def selection(self) -> float:
        """Score and plan, Quest's keys, 4096 tokens of budget."""
        all_pages = self.batch * self.pages + 1
        tables = Tables.make(self.batch, self.pages, "cuda")
        tables.pages.copy_(torch.randperm(all_pages - 1, device="cuda").view(self.batch, -1) + 1)
        tables.n_pages.fill_(self.pages)
        tables.tail_len.fill_(PAGE)
        scratch = Scratch.make(self.batch, KV_HEADS, GROUP, self.pages, "cuda")
        exchange = Exchange.make(self.batch, KV_HEADS, GROUP, DIM, self.pages, pin=True)
        visit = Visit(*(torch.zeros_like(t, device="cuda") for t in vars(exchange.visit).values()))
        quick = [torch.randn(all_pages, KV_HEADS, 2 * DIM, device="cuda") for _ in range(CALLS)]
        frame_of = torch.zeros(all_pages, KV_HEADS, dtype=torch.int32, device="cuda")
        importance, weight = torch.zeros(all_pages, KV_HEADS, device="cuda"), torch.ones(1, device="cuda")
        budgets = torch.full((self.batch,), 4096 // PAGE, dtype=torch.int32, device="cuda")
        totals = torch.zeros(2, dtype=torch.int64, device="cuda")
        rule = Rule(Select.BUDGET, 1, 8)

        def call(keys):
            score_tiles(self.q, keys, tables, scratch, DIM**-0.5, "range")
            plan_gpu(rule, self.q, tables, scratch, frame_of, importance, weight, budgets, exchange, visit, totals)

        return seconds([lambda keys=keys: call(keys) for keys in quick])


def asking(beside: bool) -> float:
    """Seconds of a question with nothing to visit; with 20 us of other work, what it adds to that."""
    exchange = Exchange.make(1, KV_HEADS, GROUP, DIM, 8, pin=True)
    exchange.batch[0] = 1
    doorbell = Doorbell(exchange, [torch.zeros(8, 2, PAGE, DIM).bfloat16()], DIM**-0.5, 4)
    asker = Asker(exchange, 10.0)
    a = torch.randn(1024, 2048, dtype=torch.bfloat16, device="cuda")
    work = [lambda: a.mul_(1.0) for _ in range(8)] if beside else []

    def run(asks: bool) -> float:
        def call():
            if asks:
                asker.ring()
            for each in work:
                each()
            if asks:
                asker.wait()

        doorbell.expect(10**6)
        return seconds([call] * 100)

    return run(True) - (run(False) if beside else 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--resident", type=float, default=0.5, help="share of the blocks in frames")
    parser.add_argument("--frames", type=int, default=1 << 17, help="frames, of 32 KiB each")
    args = parser.parse_args()
    frames = torch.randn(args.frames, 2, PAGE, DIM, dtype=torch.bfloat16, device="cuda")
    limit = copy_rate()
    print(f"device copy: {limit / 1e9:.0f} GB/s read and written")
    rows = []
    for context in args.contexts:
        for batch in args.batches:
            case = Case(batch, context, args.resident, frames)
            attention, fa3, selection = case.attention(), case.fa3(), case.selection()
            row = {
                "context": context,
                "batch": batch,
                "attention_us": attention * 1e6,
                "attention_of_copy": case.bytes / attention / limit,
                "fa3_us": None if fa3 is None else fa3 * 1e6,
                "score_and_plan_us": selection * 1e6,
            }
            rows.append({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()})
            print(rows[-1], flush=True)
    alone, exposed = asking(beside=False), asking(beside=True)
    print(f"asking with nothing to visit: {alone * 1e6:.1f} us alone, {exposed * 1e6:.1f} us beside other work")
    document = {
        "benchmark": "ops",
        "options": vars(args),
        "copy_gb_s": limit / 1e9,
        "cases": rows,
        "asking_us": {"alone": alone * 1e6, "exposed": exposed * 1e6},
        "gpu": torch.cuda.get_device_name(),
        **describe_machine(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
