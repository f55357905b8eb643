"""A GPU asks the CPU in the middle of a CUDA graph: `plan_gpu` asks, `merge_parts` waits."""

import time

import pytest
import torch

pytestmark = pytest.mark.gpu
LAYERS, BATCH, KV_HEADS, GROUP, DIM, PAGES, ALL_PAGES = 4, 3, 2, 4, 128, 8, 20


class Asking:
    """Steps over blocks that are all in the host store."""

    def __init__(self, seconds=10.0, threads=4):
        from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
        from rheoserve_sgl.ops.gpu.ask import Asker
        from rheoserve_sgl.ops.gpu.attend import SplitRoom
        from rheoserve_sgl.ops.gpu.tables import Tables
        from rheoserve_sgl.ops.plan import Visit

        torch.manual_seed(0)
        self.exchange = Exchange.make(BATCH, KV_HEADS, GROUP, DIM, PAGES, pin=True)
        self.exchange.batch[0] = BATCH
        self.tables = Tables.make(BATCH, PAGES, "cuda")
        self.tables.pages.random_(1, ALL_PAGES)
        self.tables.n_pages.random_(0, PAGES + 1)
        self.tables.tail_len.random_(1, 65)
        self.stores = [torch.randn(ALL_PAGES * KV_HEADS, 2, 64, DIM).bfloat16() for _ in range(LAYERS)]
        self.doorbell = Doorbell(self.exchange, self.stores, DIM**-0.5, threads)
        self.asker = Asker(self.exchange, seconds, LAYERS)
        self.visit = Visit(*(torch.zeros_like(t, device="cuda") for t in vars(self.exchange.visit).values()))
        self.visited = torch.zeros_like(self.visit.count)
        self.split = SplitRoom(BATCH * KV_HEADS, GROUP, DIM, "cuda").split(BATCH * KV_HEADS)
        self.q = torch.randn(LAYERS, BATCH, KV_HEADS, GROUP, DIM, device="cuda").bfloat16()
        self.out = torch.zeros(LAYERS, BATCH, KV_HEADS, GROUP, DIM, device="cuda")
        self.lse = torch.zeros(BATCH, KV_HEADS, GROUP, device="cuda")
        self.frame_of = torch.full((ALL_PAGES, KV_HEADS), -1, dtype=torch.int32, device="cuda")
        self.frames = torch.zeros(1, 2, 64, DIM, dtype=torch.bfloat16, device="cuda")
        self.nothing = torch.zeros((BATCH, 3), dtype=torch.int64, device="cuda")

    def layer(self, layer: int):
        from rheoserve_sgl.ops.gpu.attend import attend_split, merge_parts
        from rheoserve_sgl.ops.gpu.plan import plan_gpu
        from rheoserve_sgl.ops.plan import Rule, Select

        plan_gpu(
            Rule(Select.ALL, 1, 1), self.q[layer], self.tables, None, self.frame_of, self.lse, self.lse, self.nothing,
            self.exchange, self.visit, self.visited, self.nothing, self.asker,
        )  # fmt: skip
        attend_split(self.q[layer], self.frames, self.visit, self.split, DIM**-0.5)
        answer = (self.visited, self.exchange.out, self.exchange.lse)
        merge_parts(self.visit, self.split, self.out[layer], self.lse, answer, self.asker)

    def step(self):
        for layer in range(LAYERS):
            self.layer(layer)


def test_a_graph_of_layers_gets_the_answers_of_calls():
    from rheoserve_sgl.ops.attention import attend_cpu

    asking = Asking()
    asking.doorbell.expect(LAYERS)
    asking.step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        asking.step()
    for _ in range(200):
        asking.q.normal_()
        asking.tables.n_pages.random_(0, PAGES + 1)
        asking.doorbell.expect(LAYERS)
        graph.replay()
        torch.cuda.synchronize()
        for layer, store in enumerate(asking.stores):
            expected, _ = attend_cpu(asking.q[layer].float().cpu(), ((store, asking.exchange.visit),), DIM**-0.5, 1)
            torch.testing.assert_close(asking.out[layer].cpu(), expected.nan_to_num(), rtol=1e-6, atol=1e-6)
    assert asking.asker.late == 0 and int(asking.nothing[:, 1].sum()) > 0
    asking.doorbell.check()


def test_a_stalled_cpu_ends_the_wait_and_is_named():
    asking = Asking(seconds=0.2)
    asking.doorbell.expect(1)
    asking.layer(0)
    torch.cuda.synchronize()
    assert asking.asker.late == 0
    asking.doorbell = None  # nobody answers any more
    began = time.monotonic()
    asking.layer(1)
    asking.layer(2)
    torch.cuda.synchronize()
    assert 0.2 <= time.monotonic() - began < 2.0  # the second did not wait
    assert asking.asker.late == 2
