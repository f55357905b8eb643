"""Host attention against the speed of memory: how much of a streaming read's rate each kernel variant reaches.

Decode attention over random 64-token blocks of a bf16 store that is several times the last-level cache, each
KV head with a list of its own. "GB/s" counts every listed block once, however many query heads read it. The limit
is a plain streaming read of the same store by the same threads, measured around each case in the same run, of 512 MiB
a call ("stream") and of as many bytes a call as the case reads: by threads that each call wakes ("stream_called"; of a
short call waking is a good part), as for "kernels", and by threads that poll ("stream_alike"), as for "asked". Another
limit, "cached", is the same kernel over lists of few blocks, which stay in the caches: what its arithmetic allows.
Where there are more processors than threads, stream and kernels have those that the threads asked through memory are
pinned to: where other guests share cores, processors differ. Rates and shares of the stream ("shares", "asked" for the
default variant's, and "share_alike" of what is asked to "stream_alike") are medians of `--rounds`, each of which
measures the stream, the kernels and what is asked: where a machine is shared, one thread's speed changes by half within
a second.
"asked" is the default variant asked through memory, as by a GPU: threads that poll, pinned, timed from the thread that
sees the request to the one that answers, so without the call and the waking that "kernels" have, and without PCIe.
Beside it: torch's scaled_dot_product_attention, and SGLang's torch_native decode attention. The last line of the
output is one JSON document; draw_roofline.py makes a picture of it.

Usage: python benchmarks/bench_host_attention.py [--quick] [--threads N ...] [--gib 4]
"""

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
from machine import describe_machine
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

from rheoserve_sgl.cache.host_memory import zeroed
from rheoserve_sgl.ops.attention import attend_cpu
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.plan import Visit
from rheoserve_sgl.ops.processors import pinned, usable_threads
from rheoserve_sgl.ops.workers import cpu_variant, worker_pool

KV_HEADS = 8
BLOCK = 64
PEER_BYTES = 128 << 20  # KV that a call of torch's and SGLang's attention reads
CALLS = {1: 60, 8: 20}  # of a case, by batch: short calls need more of them for a steady median
FEWEST_CALLS = 8
CACHED_BLOCKS = 32


def make_store(gib: float, dim: int) -> torch.Tensor:
    """`[blocks, 2, 64, dim]` bf16 of random numbers, every page touched."""
    blocks = int(gib * 2**30) // (2 * BLOCK * dim * 2)
    store = zeroed((blocks, 2, BLOCK, dim), torch.bfloat16)
    for part in store.split(4096):
        part.normal_()
    return store


def make_visits(store: torch.Tensor, batch: int, count: int) -> list[Visit]:
    """Random lists for each repeat, distinct while the store has blocks left, and then in another order."""
    pairs = batch * KV_HEADS
    if pairs * count > len(store):
        raise SystemExit(f"--gib is too small: {pairs * count} blocks a call of batch {batch}, of {len(store)}")
    full = torch.full((batch, KV_HEADS), BLOCK, dtype=torch.int32)
    visits, ids = [], torch.empty(0, dtype=torch.int32)
    for _ in range(CALLS.get(batch, FEWEST_CALLS)):
        if len(ids) < pairs * count:
            ids = torch.randperm(len(store), dtype=torch.int32)
        lists, ids = ids[: pairs * count].view(batch, KV_HEADS, count).contiguous(), ids[pairs * count :]
        visits.append(Visit(lists, torch.full_like(full, count), full))
    return visits


def make_cached_visits(batch: int, count: int) -> list[Visit]:
    """Lists of the same few blocks."""
    full = torch.full((batch, KV_HEADS), BLOCK, dtype=torch.int32)
    lists = torch.randint(CACHED_BLOCKS, (batch, KV_HEADS, count), dtype=torch.int32)
    return [Visit(lists, torch.full_like(full, count), full)] * FEWEST_CALLS


def seconds(calls) -> float:
    """Median time of the calls after the first."""
    times = []
    for call in calls:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def stream_rate(
    store: torch.Tensor, threads: int, part: int = 512 << 20, calls: int = 6, polling: bool = False
) -> float:
    """Of reading `part` bytes a call, each from another place, by threads that sleep or poll between the calls."""
    size = store.nbytes >> 20 << 20
    part = min(size, part)
    pool = worker_pool(threads)
    apart = max(part, size // calls)
    offsets = [i * apart % (size - part + 1) >> 20 << 20 for i in range(calls)]
    pool.keep_polling(polling)
    try:
        return part / seconds([lambda o=o: pool.stream_read(store.data_ptr() + o, part) for o in offsets])
    finally:
        pool.keep_polling(False)


def listed_bytes(store: torch.Tensor, visit: Visit) -> int:
    """What a call reads: every listed block once."""
    return visit.blocks.numel() * store[0].nbytes


def kernel_rate(store, visits, group: int, threads: int, variant: str) -> float:
    dim = store.shape[-1]
    batch = len(visits[0].count)
    # A model in bf16 has bf16 queries, which the bf16 variants multiply as they are.
    q = torch.randn(batch, KV_HEADS, group, dim).bfloat16().float()
    took = seconds([lambda v=v: attend_cpu(q, ((store, v),), dim**-0.5, threads, variant) for v in visits])
    return listed_bytes(store, visits[0]) / took


def asked_rate(store, visits, group: int, threads: int, processors: list[int]) -> float:
    """As `kernel_rate`, of requests through memory, without the way there and back, by threads pinned to these."""
    dim = store.shape[-1]
    batch, _, count = visits[0].blocks.shape
    exchange = Exchange.make(batch, KV_HEADS, group, dim, count, pin=False)
    exchange.q.copy_(torch.randn(exchange.q.shape).bfloat16())
    exchange.batch[0] = batch
    doorbell = Doorbell(exchange, [store], dim**-0.5, threads, processors)
    asked, answered = exchange.bell[0].numpy(), exchange.bell[1].numpy()
    times = []
    doorbell.expect(len(visits))
    for number, visit in enumerate(visits, 1):
        exchange.visit.blocks.copy_(visit.blocks)
        exchange.visit.count.copy_(visit.count)
        before = doorbell.busy_seconds
        asked[0] = number
        while answered[0] != number:
            time.sleep(1e-3)  # leaves the processor to the thread that is pinned to it
        times.append(doorbell.busy_seconds - before)
    doorbell.check()
    return listed_bytes(store, visits[0]) / statistics.median(times[1:])


def peer_rates(store, group: int, threads: int) -> dict[str, float]:
    """torch's and SGLang's decode attention over PEER_BYTES of KV, all heads with the same tokens."""
    dim = store.shape[-1]
    tokens = PEER_BYTES // (KV_HEADS * 2 * dim * 2)
    torch.set_num_threads(threads)
    flat = store.view(-1)
    size = tokens * KV_HEADS * dim
    pieces = [flat[i * 2 * size : (i + 1) * 2 * size].view(2, tokens, KV_HEADS, dim) for i in range(4)]
    q = torch.randn(1, KV_HEADS * group, dim, dtype=torch.bfloat16)

    def sdpa(piece):
        k, v = (t.view(1, KV_HEADS, tokens, dim) for t in piece)
        scaled_dot_product_attention(q.view(1, KV_HEADS * group, 1, dim), k, v, enable_gqa=True)

    native = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)  # the method uses nothing of a backend
    table = torch.arange(tokens).view(-1, BLOCK)[torch.randperm(tokens // BLOCK)].view(1, tokens)

    def torch_native(piece):
        native._run_sdpa_forward_decode(
            q,
            torch.empty_like(q),
            *piece,
            table,
            torch.tensor([0]),
            torch.tensor([tokens]),
            scaling=dim**-0.5,
            enable_gqa=True,
        )

    bytes_read = 2 * size * store.element_size()
    return {f.__name__: bytes_read / seconds([lambda p=p, f=f: f(p) for p in pieces]) for f in (sdpa, torch_native)}


@contextlib.contextmanager
def on(processors: list[int]):
    """This thread on these processors, or on all where there are none."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure_round(store, batch: int, group: int, threads: int, args) -> dict[str, float]:
    """Each kernel's rate and, as "asked", the default's, all with lists of their own: none reads what another left in a
    cache. As "stream", "stream_called" and "stream_alike" what is read around them, and of as much a call."""
    read = batch * KV_HEADS * args.blocks * store[0].nbytes
    processors = pinned(sorted(os.sched_getaffinity(0)), threads)
    with on(processors):
        before = stream_rate(store, threads)
        calls = CALLS.get(batch, FEWEST_CALLS)
        rates = {
            "stream_called": stream_rate(store, threads, read, calls),
            "stream_alike": stream_rate(store, threads, read, calls, polling=True),
        }
        for variant in args.variants:
            rates[variant] = kernel_rate(store, make_visits(store, batch, args.blocks), group, threads, variant)
    rates["asked"] = asked_rate(store, make_visits(store, batch, args.blocks), group, threads, processors)
    with on(processors):
        return rates | {"stream": (before + stream_rate(store, threads)) / 2}


def measure_case(store, batch: int, group: int, threads: int, args) -> dict:
    """A row: medians of the rounds, and as `shares` those of each round's share of its own stream."""
    rounds = [measure_round(store, batch, group, threads, args) for _ in range(args.rounds)]
    rates = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "dim": store.shape[-1],
        "threads": threads,
        "group": group,
        "batch": batch,
        "stream": rates["stream"],
        "stream_called": rates["stream_called"],
        "stream_alike": rates["stream_alike"],
        "kernels": {variant: rates[variant] for variant in args.variants},
        "asked": {cpu_variant(): rates["asked"]},
        "shares": {
            name: statistics.median(each[name] / each["stream"] for each in rounds)
            for name in (*args.variants, "asked")
        },
        "share_alike": statistics.median(each["asked"] / each["stream_alike"] for each in rounds),
    }


def told(row: dict) -> str:
    rates = row["kernels"] | {"asked": row["asked"][cpu_variant()]}
    shares = "  ".join(f"{name} {rate / 1e9:5.1f} ({row['shares'][name]:4.0%})" for name, rate in rates.items())
    beside = "  ".join(f"{name} {rate / 1e9:.1f}" for name, rate in row["peers"].items())
    return (
        f"d {row['dim']:3d} threads {row['threads']:2d} group {row['group']:2d} batch {row['batch']:2d}: stream "
        f"{row['stream'] / 1e9:5.1f} GB/s  of as much a call {row['stream_called'] / 1e9:5.1f}, by threads that poll "
        f"{row['stream_alike'] / 1e9:5.1f} (asked {row['share_alike']:.0%})  {shares}  {beside}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 5, 8, 12, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--blocks", type=int, default=64, help="blocks listed for each KV head")
    parser.add_argument("--threads", type=int, nargs="+", default=[usable_threads(), 1])
    parser.add_argument("--variants", nargs="+", default=[v for v in extension().cpu_variants() if v != "scalar"])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the store")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring the stream and the kernels")
    parser.add_argument("--quick", action="store_true", help="dim 128, groups 4 and 8, batch 8 only")
    args = parser.parse_args()
    if args.quick:
        args.dims, args.groups, args.batches = [128], [4, 8], [8]

    rows = []
    for dim in args.dims:
        store = make_store(args.gib, dim)
        for threads in dict.fromkeys(args.threads):
            for group in args.groups:
                peers = peer_rates(store, group, threads)
                batches = args.batches if threads > 1 else args.batches[:1]
                for batch in batches:
                    row, cached = measure_case(store, batch, group, threads, args), {}
                    if batch == max(batches):
                        few = make_cached_visits(batch, args.blocks)
                        cached = {v: kernel_rate(store, few, group, threads, v) for v in args.variants}
                    rows.append(row | {"cached": cached, "peers": peers})
                    print(told(rows[-1]), flush=True)
        del store
    print(json.dumps({"benchmark": "host_attention", "options": vars(args), "rows": rows, **describe_machine()}))


if __name__ == "__main__":
    main()
