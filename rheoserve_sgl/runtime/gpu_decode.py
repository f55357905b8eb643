"""Decode on a GPU: what `ops/gpu` needs around it, for SGLang's CUDA graphs and without them."""

import torch

from rheoserve_sgl import environ
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.coordinator.coordinator import Coordinator
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.gpu.ask import Asker
from rheoserve_sgl.ops.gpu.step import GpuStep
from rheoserve_sgl.ops.plan import Rule

ANSWER_SECONDS = 20.0  # a step that waits longer for the CPU is lost, and the server ends


class GpuDecode:
    """The kernels of a decode step and the CPU threads they ask.

    Args:
        rules: each layer's
        batch: most requests at once
        max_pages: of a request
        group: query heads to a KV head
        scale: softmax scale, the same in all layers
        cpus: processors of the threads
    """

    def __init__(
        self, pool: TwoTierKVPool, rules: list[Rule], batch: int, max_pages: int, group: int, scale: float, cpus=()
    ):
        self.coordinator: Coordinator = pool.coordinator
        self.layers, self.start_layer = pool.layer_num, pool.start_layer
        exchange = Exchange.make(batch, pool.head_num, group, pool.head_dim, max_pages, pin=True)
        stores = [pool.host.blocks(index) for index in range(self.layers)]
        self.doorbell = Doorbell(exchange, stores, scale, pool.threads, cpus)
        self.seconds = environ.answer_seconds(ANSWER_SECONDS)
        self.asker = Asker(exchange, self.seconds, self.layers)
        self.step = GpuStep(pool, rules, exchange, self.asker, totals=self.coordinator.attended.counts)
        self.coordinator.gpu = self
        self.coordinator.swap_now(self.step.tables.rows(1))  # of no request: compiles what runs outside CUDA graphs
        torch.cuda.synchronize()
        self.coordinator.lane.finish()

    def begin(self, req_to_token, slots, lens, rows: int, batch: int, limits: torch.Tensor):
        """Before a step of `rows` requests, padded to `batch`. Raises RuntimeError if an earlier step was lost.

        Args:
            limits: `[slots]` int32, pages that each request's KV heads may select
        """
        self.check()
        self.step.begin(req_to_token, slots, lens, rows, batch, limits, self.coordinator.weight)

    def times(self, waited: int | None = None) -> dict:
        """Seconds that the CPU's threads attended, and that the GPU waited for them and for copies.

        Args:
            waited: nanoseconds of the second, where they were read before; None: the GPU is asked for them
        """
        waited = int(self.asker.waited) if waited is None else waited
        return {
            "host_attention_seconds": self.doorbell.busy_seconds,
            "exposed_wait_seconds": waited / 1e9,
            "exchange_wait_seconds": self.coordinator.lane.late_seconds,
        }

    def expect(self):
        """A step's questions are about to come."""
        self.doorbell.expect(self.layers)

    def tap(self, layer_id: int, tapped):
        """See `GpuStep.tap`."""
        self.step.tap(layer_id - self.start_layer, tapped)

    def layer(self, index: int, q, k, v, loc, scale: float) -> torch.Tensor:
        if index == 0 and not torch.cuda.is_current_stream_capturing():
            self.expect()  # not from a graph: `begin`'s caller does it for those
        return self.step.layer(index, q, k, v, loc, scale)

    def check(self):
        """Raise RuntimeError, naming the layer, if the CPU failed or did not answer in time."""
        self.doorbell.check()
        late = self.asker.late
        if late:
            step, layer = divmod(late - 1, self.layers)
            raise RuntimeError(
                f"CPU attention did not answer in {self.seconds:g} s: layer {layer} of decode step {step}. The "
                "machine's processors may be taken by others; see --rheoserve-host-threads"
            )


def require_answers(scheduler, batch, result, *_):
    """BEFORE `Scheduler.process_batch_result`: a step without the CPU's part gives no token to anyone.

    Raises RuntimeError, which ends the server.
    """
    gpu = getattr(scheduler.tp_worker.model_runner.attn_backend, "gpu", None)
    if gpu is not None and batch.forward_mode.is_decode():
        done = getattr(result, "copy_done", None)
        if done is None:
            torch.cuda.synchronize()
        else:
            done.synchronize()
        gpu.check()
