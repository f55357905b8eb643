"""The kernels of a decode step on a GPU, each against its limit in the same run. The last line is JSON.

Shapes: 8 KV heads of 128, 4 query heads each, bf16 (Qwen3-8B). Every call reads other frames than the one before, out
of several GB, so that nothing comes from a cache.
"""

import argparse
import json
import statistics

import torch
from machine import describe_machine

from rheoserve_sgl.cache.host_memory import pin_all, zeroed
from rheoserve_sgl.cache.pool import addresses
from rheoserve_sgl.cache.residency import Moves, Residency
from rheoserve_sgl.coordinator.swap import Ranking, swap_blocks
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.gpu.append_pages import append_pages_gpu
from rheoserve_sgl.ops.gpu.ask import Asker
from rheoserve_sgl.ops.gpu.attend import SplitRoom, attend_split, merge_parts
from rheoserve_sgl.ops.gpu.gather import gather_prefix
from rheoserve_sgl.ops.gpu.listing import Listing
from rheoserve_sgl.ops.gpu.move import ALONE, BESIDE, fill_frames
from rheoserve_sgl.ops.gpu.plan import plan_gpu
from rheoserve_sgl.ops.gpu.score import score_tiles
from rheoserve_sgl.ops.gpu.tables import Scratch, Tables
from rheoserve_sgl.ops.plan import Rule, Select, Visit
from rheoserve_sgl.runtime.writes import Writes

LAYERS, KV_HEADS, GROUP, DIM, PAGE = 36, 8, 4, 128, 64
BLOCK = 2 * PAGE * DIM * 2  # bytes
CALLS = 20  # in a graph, each on its own data
PINNED = []


def graph_of(calls) -> torch.cuda.CUDAGraph:
    """Of all of them in a row, once they have run."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def seconds(calls) -> float:
    """Of one call: the median of a graph of all of them, replayed."""
    graph, times = graph_of(calls), []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def device_rates() -> dict[str, float]:
    """Bytes a second: read and written by a device copy, and read by a plain sum over 4 GiB."""
    source = torch.ones(1 << 31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds([lambda: target.copy_(source)] * 2)
    return {"copy": copied, "read": source.nbytes / seconds([lambda: source.sum()] * 2)}


class Case:
    """One batch and context; `resident` of the blocks are in frames."""

    def __init__(self, batch: int, context: int, resident: float, frames: torch.Tensor):
        self.batch, self.context, self.frames = batch, context, frames
        self.pages = context // PAGE
        self.listed = max(int(self.pages * resident), 1)
        pairs = (batch, KV_HEADS)
        self.q = torch.randn(*pairs, GROUP, DIM, device="cuda").bfloat16()
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
        """Score and plan, with the lists of a next layer; Quest's keys, 4096 tokens of budget."""
        all_pages = self.batch * self.pages + 1
        tables = Tables.make(self.batch, self.pages, "cuda")
        tables.pages.copy_(torch.randperm(all_pages - 1, device="cuda").view(self.batch, -1) + 1)
        tables.n_pages.fill_(self.pages)
        tables.tail_len.fill_(PAGE)
        scratch = Scratch.make(self.batch, KV_HEADS, GROUP, self.pages, "cuda")
        exchange = Exchange.make(self.batch, KV_HEADS, GROUP, DIM, self.pages, pin=True)
        visit = Visit(*(torch.zeros_like(t, device="cuda") for t in vars(exchange.visit).values()))
        quick = [torch.randn(all_pages, KV_HEADS, 2 * DIM, device="cuda").bfloat16() for _ in range(CALLS)]
        frame_of = torch.zeros(all_pages, KV_HEADS, dtype=torch.int32, device="cuda")
        importance, weight = torch.zeros(all_pages, KV_HEADS, device="cuda"), torch.ones(1, device="cuda")
        budgets = torch.full((self.batch,), 4096 // PAGE, dtype=torch.int32, device="cuda")
        visited, totals = torch.zeros_like(visit.count), torch.zeros((self.batch, 3), dtype=torch.int64, device="cuda")
        rule, following = Rule(Select.BUDGET, 1, 8), Listing(tables, frame_of, None, visit, torch.zeros_like(visited))

        def call(keys):
            score_tiles(self.q, keys, tables, scratch, DIM**-0.5, "range")
            plan_gpu(
                rule, self.q, tables, scratch, frame_of, importance, weight, budgets, exchange, None, visited, totals,
                following=following,
            )  # fmt: skip

        return seconds([lambda keys=keys: call(keys) for keys in quick])


def asking() -> dict[str, float]:
    """Microseconds of a question with nothing to visit: what it adds to `plan`, `attend` and `merge` in a row, and with
    other work of some 20 us before `merge`."""
    pairs = (1, KV_HEADS)
    exchange = Exchange.make(*pairs, GROUP, DIM, 8, pin=True)
    exchange.batch[0] = 1
    doorbell = Doorbell(exchange, [torch.zeros(8, 2, PAGE, DIM).bfloat16()], DIM**-0.5, 4)
    asker = Asker(exchange, 10.0, LAYERS)
    tables = Tables.make(1, 8, "cuda")  # no pages
    visit = Visit(*(torch.zeros_like(t, device="cuda") for t in vars(exchange.visit).values()))
    visited, totals = torch.zeros_like(visit.count), torch.zeros((1, 3), dtype=torch.int64, device="cuda")
    frame_of = torch.zeros(8, KV_HEADS, dtype=torch.int32, device="cuda")
    q, lse = torch.zeros(*pairs, GROUP, DIM, device="cuda"), torch.zeros(*pairs, GROUP, device="cuda")
    split = SplitRoom(KV_HEADS, GROUP, DIM, "cuda").split(KV_HEADS)
    frames = torch.zeros(1, 2, PAGE, DIM, dtype=torch.bfloat16, device="cuda")
    a = torch.randn(1024, 2048, dtype=torch.bfloat16, device="cuda")
    rule = Rule(Select.ALL, 1, 1)

    def took(asker, between: int) -> float:
        def call():
            plan_gpu(
                rule, q, tables, None, frame_of, lse, lse, totals, exchange, visit, visited, totals, asker
            )  # fmt: skip
            attend_split(q, frames, visit, split, DIM**-0.5)
            for _ in range(between):
                a.mul_(1.0)
            merge_parts(visit, split, q, lse, (visited, exchange.out, exchange.lse), asker)

        doorbell.expect(10**6)
        return seconds([call] * 100) * 1e6

    return {
        "alone": took(asker, 0) - took(None, 0),
        "exposed": took(asker, 8) - took(None, 8),
        "other_work": took(None, 8) - took(None, 0),
    }


def transferring(requests: int) -> dict[str, float]:
    """Microseconds that a layer's kernels take longer where all heads of so many requests ask: to write the questions
    to pinned memory, and to read the answers from there; and the copy engine's for as much, in two copies each."""
    pairs, pages = (requests, KV_HEADS), 8
    exchange = Exchange.make(*pairs, GROUP, DIM, pages, pin=True)
    tables = Tables.make(requests, pages, "cuda")
    tables.pages.copy_(torch.arange(requests * pages, device="cuda").view(requests, -1) + 1)
    tables.n_pages.fill_(pages)
    tables.tail_len.fill_(PAGE)
    visit = Visit(*(torch.zeros_like(t, device="cuda") for t in vars(exchange.visit).values()))
    visited, totals = torch.zeros_like(visit.count), torch.zeros((requests, 3), dtype=torch.int64, device="cuda")
    q = torch.randn(*pairs, GROUP, DIM, device="cuda").bfloat16()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    split = SplitRoom(requests * KV_HEADS, GROUP, DIM, "cuda").split(requests * KV_HEADS)
    all_pages = requests * pages + 1
    importance, rule = torch.zeros(all_pages, KV_HEADS, device="cuda"), Rule(Select.ALL, 1, 1)

    def plan(frame: int) -> float:
        """With all pages in frames, or none."""
        frame_of = torch.full((all_pages, KV_HEADS), frame, dtype=torch.int32, device="cuda")
        visited.zero_()

        def call():
            plan_gpu(
                rule, q, tables, None, frame_of, importance, importance, totals, exchange, visit, visited, totals
            )  # fmt: skip

        return seconds([call] * CALLS)

    def merge(count: int) -> float:
        counts = torch.full_like(visited, count)
        return seconds([lambda: merge_parts(visit, split, out, lse, (counts, exchange.out, exchange.lse))] * CALLS)

    asks, lists = torch.zeros_like(exchange.q, device="cuda"), torch.zeros_like(exchange.visit.blocks, device="cuda")
    answer, sums = torch.zeros_like(exchange.out, device="cuda"), torch.zeros_like(exchange.lse, device="cuda")

    def copy(*both) -> float:
        return seconds([lambda: [to.copy_(source, non_blocking=True) for to, source in both]] * CALLS)

    taken = {
        "ask": plan(-1) - plan(0),
        "answer": merge(1) - merge(0),
        "copied_ask": copy((exchange.q, asks), (exchange.visit.blocks, lists)),
        "copied_answer": copy((answer, exchange.out), (sums, exchange.lse)),
    }
    return {"requests": requests} | {name: 1e6 * took for name, took in taken.items()}


def swapping(requests: int = 8, pages: int = 512) -> float:
    """Microseconds of a step's swaps over all layers, without the copies: half of the blocks resident, and another
    order of importance each time, so that all that may swap does."""
    all_pages, frames = requests * pages + 1, requests * pages * KV_HEADS // 2
    residency = Residency(LAYERS, all_pages, KV_HEADS, frames, "cuda")
    tables = Tables.make(requests, pages, "cuda")
    tables.pages.copy_(torch.randperm(all_pages - 1, device="cuda").view(requests, -1) + 1)
    tables.n_pages.fill_(pages)
    chosen = torch.rand(LAYERS, all_pages, KV_HEADS, device="cuda") < 0.5
    chosen[:, 0] = False
    residency.admit(residency.reserve(chosen, frames))
    ranking = Ranking("importance", False, 1, 8)
    orders = [torch.rand(LAYERS, all_pages, KV_HEADS, device="cuda") for _ in range(4)]

    def call(importance):
        for moves in swap_blocks(ranking, residency, importance, tables, 3):
            residency.admit(moves)

    return seconds([lambda order=order: call(order) for order in orders]) * 1e6


def moving(frames: torch.Tensor, dim: int) -> dict[str, float]:
    """GB/s over PCIe with blocks of this head dim: the copy engine's, and of the kernels that move blocks."""
    blocks, frames = 8192 * DIM // dim, frames.view(-1, 2, PAGE, dim)
    block_bytes = 2 * PAGE * dim * 2
    host = zeroed((4 * blocks // KV_HEADS, KV_HEADS, 2, PAGE, dim), torch.bfloat16)
    pin_all(Case, [host], 8)
    PINNED.append(host)  # as long as it is pinned, which is as long as the program runs
    rates = {}
    there = torch.empty(blocks, 2, PAGE, dim, dtype=torch.bfloat16, device="cuda")
    here = host.flatten(0, 1)[:blocks]
    amount = blocks * block_bytes / 1e9
    rates["copy_to_device"] = amount / seconds([lambda: there.copy_(here, non_blocking=True)] * 2)
    rates["copy_to_host"] = amount / seconds([lambda: here.copy_(there, non_blocking=True)] * 2)
    picked = [torch.randperm(4 * blocks, device="cuda")[:blocks] for _ in range(2)]
    targets = torch.randperm(len(frames) - 1, device="cuda")[None, :blocks]
    where = (addresses([tensor], "cuda") for tensor in (host, frames))
    where, count = tuple(where), torch.tensor([blocks], device="cuda")
    for name, programs in (("fill_frames", ALONE), ("fill_frames_beside", BESIDE)):
        moves = [Moves(p[None], targets, count) for p in picked]
        rates[name] = amount / seconds([lambda m=m, n=programs: fill_frames(*where, block_bytes, m, n) for m in moves])
    pages = [torch.randperm(len(host), device="cuda")[: blocks // KV_HEADS] for _ in range(2)]
    none = torch.full((len(host), KV_HEADS), -1, dtype=torch.int32, device="cuda")
    out = torch.empty(2, blocks // KV_HEADS * PAGE, KV_HEADS, dim, dtype=torch.bfloat16, device="cuda")
    rates["gather_prefix"] = amount / seconds([lambda p=p: gather_prefix(host, frames, none, p, out) for p in pages])
    k, v = torch.randn(2, blocks // KV_HEADS * PAGE, KV_HEADS, dim, device="cuda").bfloat16()
    writes = [whole_pages(p) for p in pages]
    rates["write_through"] = amount / seconds(
        [lambda w=w: append_pages_gpu(host, frames, none, w, k, v) for w in writes]
    )
    return rates


def whole_pages(pages: torch.Tensor) -> Writes:
    """A prompt's."""
    before, first = torch.zeros_like(pages, dtype=torch.int32), torch.arange(len(pages), device="cuda") * PAGE
    return Writes(pages, torch.zeros_like(pages), first, before, before + PAGE, first, PAGE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--resident", type=float, default=0.5, help="share of the blocks in frames")
    parser.add_argument("--frames", type=int, default=1 << 17, help="frames, of 32 KiB each")
    args = parser.parse_args()
    frames = torch.randn(args.frames, 2, PAGE, DIM, dtype=torch.bfloat16, device="cuda")
    rates = device_rates()
    limit = max(rates.values())
    print(f"device: {rates['copy'] / 1e9:.0f} GB/s read and written by a copy, {rates['read'] / 1e9:.0f} read by a sum")
    rows = []
    for context in args.contexts:
        for batch in args.batches:
            case = Case(batch, context, args.resident, frames)
            attention, fa3, selection = case.attention(), case.fa3(), case.selection()
            row = {
                "context": context,
                "batch": batch,
                "attention_us": attention * 1e6,
                "attention_gb_s": case.bytes / attention / 1e9,
                "attention_of_limit": case.bytes / attention / limit,
                "fa3_us": None if fa3 is None else fa3 * 1e6,
                "score_and_plan_us": selection * 1e6,
            }
            rows.append({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()})
            print(rows[-1], flush=True)
    bell, swaps, transfers = asking(), swapping(), [transferring(requests) for requests in (1, 10, 48)]
    moves = {f"{2 * PAGE * dim * 2 // 1024} KiB": moving(frames, dim) for dim in (DIM // 2, DIM)}
    print("asking with nothing to visit, us:", {name: round(us, 1) for name, us in bell.items()})
    for row in transfers:
        print("a layer's question and answer, us:", {name: round(us, 1) for name, us in row.items()})
    print(f"swaps of a step over {LAYERS} layers, 8 requests of 32K: {swaps:.0f} us")
    for size, found in moves.items():
        print(f"blocks of {size} over PCIe, GB/s:", {name: round(rate, 1) for name, rate in found.items()})
    document = {
        "benchmark": "ops",
        "options": vars(args),
        "device_gb_s": {name: rate / 1e9 for name, rate in rates.items()},
        "cases": rows,
        "asking_us": bell,
        "transfers_us": transfers,
        "swaps_us": swaps,
        "pcie_gb_s": moves,
        "gpu": torch.cuda.get_device_name(),
        **describe_machine(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
