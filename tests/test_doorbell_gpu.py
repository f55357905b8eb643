"""A GPU asks the CPU in the middle of a CUDA graph."""

import statistics
import time

import pytest
import torch

pytestmark = pytest.mark.gpu
LAYERS, BATCH, KV_HEADS, GROUP, DIM, LIST = 4, 3, 2, 4, 128, 8


def make(layers=LAYERS, seconds=10.0, threads=4):
    from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
    from rheoserve_sgl.ops.gpu.ask import Asker

    torch.manual_seed(0)
    exchange = Exchange.make(BATCH, KV_HEADS, GROUP, DIM, LIST, pin=True)
    exchange.batch[0] = BATCH
    exchange.visit.blocks.random_(0, 20)
    exchange.visit.count.random_(0, LIST + 1)
    exchange.visit.last_len.random_(1, 65)
    stores = [torch.randn(20, 2, 64, DIM).bfloat16() for _ in range(layers)]
    return exchange, stores, Doorbell(exchange, stores, DIM**-0.5, threads), Asker(exchange, seconds)


def ask(asker):
    asker.ring()
    asker.wait()


def capture(step):
    step()  # compiles the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_a_graph_of_layers_gets_the_answers_of_calls():
    from rheoserve_sgl.ops.attention import attend_cpu

    exchange, stores, doorbell, asker = make()
    q = torch.zeros(LAYERS, BATCH, KV_HEADS, GROUP, DIM, device="cuda")
    out, lse = torch.zeros_like(q), torch.zeros(LAYERS, BATCH, KV_HEADS, GROUP, device="cuda")

    def step():
        for layer in range(LAYERS):
            exchange.q.copy_(q[layer], non_blocking=True)
            ask(asker)
            out[layer].copy_(exchange.out, non_blocking=True)
            lse[layer].copy_(exchange.lse, non_blocking=True)

    doorbell.expect(LAYERS)
    graph = capture(step)
    for _ in range(20):
        q.normal_()
        doorbell.expect(LAYERS)
        graph.replay()
        torch.cuda.synchronize()
        for layer, store in enumerate(stores):
            expected = attend_cpu(q[layer].cpu(), ((store, exchange.visit),), DIM**-0.5, 1)
            assert torch.equal(out[layer].cpu(), expected[0])
            assert torch.equal(lse[layer].cpu(), expected[1])
    doorbell.check()
    assert asker.late == 0


def test_a_stalled_cpu_ends_the_wait_and_is_named():
    exchange, _, doorbell, asker = make(seconds=0.2)
    doorbell.expect(1)
    ask(asker)
    torch.cuda.synchronize()
    del doorbell  # nobody answers any more
    began = time.monotonic()
    ask(asker)
    ask(asker)
    torch.cuda.synchronize()
    assert 0.2 <= time.monotonic() - began < 2.0  # the second did not wait
    assert asker.late == 2


def test_report_the_cost_of_asking(capsys):
    """No bound, because a machine may be busy; the figure is for the log."""
    exchange, _, doorbell, asker = make(layers=1)
    exchange.visit.count.zero_()
    asks, times = 100, []
    doorbell.expect(asks)
    graph = capture(lambda: [ask(asker) for _ in range(asks)])
    for _ in range(10):
        doorbell.expect(asks)
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / asks)
    with capsys.disabled():
        print(f"\nasking costs {statistics.median(times) * 1e6:.1f} us")
    assert asker.late == 0
