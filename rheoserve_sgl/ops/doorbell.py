"""CPU attention that is asked through memory: from a GPU in the middle of a CUDA graph, without Python."""

from dataclasses import dataclass

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.attention import attention_arguments
from rheoserve_sgl.ops.extension import address, extension
from rheoserve_sgl.ops.plan import Visit
from rheoserve_sgl.ops.workers import cpu_variant


@dataclass(frozen=True)
class Exchange:
    """Memory through which a GPU and the CPU's threads talk; pinned, where there is a GPU.

    q: `[batch, kv_heads, group, head_dim]` float32
    visit: the lists of blocks in the host store
    out, lse: `[batch, kv_heads, group, head_dim]`, `[batch, kv_heads, group]` float32, the answer
    batch: `[1]` int32, how many of the rows are in use
    bell: `[4, 8]` int64: the first of each row is the number of the last request, of the last answer, of the first
        request that failed, and of the last request before the step (one for each layer) that began last. No thread
        polls for what a later step will ask. (The largest number, as made: all have begun.)
    """

    q: torch.Tensor
    visit: Visit
    out: torch.Tensor
    lse: torch.Tensor
    batch: torch.Tensor
    bell: torch.Tensor

    @classmethod
    def make(cls, batch: int, kv_heads: int, group: int, head_dim: int, max_list: int, pin: bool) -> "Exchange":
        def zeros(*shape, dtype):
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)

        pairs = (batch, kv_heads)
        lists = (zeros(*pairs, max_list, dtype=torch.int32), *(zeros(*pairs, dtype=torch.int32) for _ in range(2)))
        lists[2].fill_(PAGE_TOKENS)  # legal, whatever is asked first
        bell = zeros(extension().BELL_BYTES // 8, dtype=torch.int64).view(4, -1)
        bell[3] = torch.iinfo(torch.int64).max
        return cls(
            q=zeros(*pairs, group, head_dim, dtype=torch.float32),
            visit=Visit(*lists),
            out=zeros(*pairs, group, head_dim, dtype=torch.float32),
            lse=zeros(*pairs, group, dtype=torch.float32),
            batch=zeros(1, dtype=torch.int32),
            bell=bell,
        )


class Doorbell:
    """Threads that answer request n with the attention of layer (n - 1) modulo the layers.

    Args:
        exchange: where requests and answers lie
        layers: each layer's blocks, `[blocks, 2, 64, head_dim]` in host memory
        scale: softmax scale
        threads: size of the pool, the one that waits included
        cpus: processors to pin them to, in turn; none leaves placement to the system
    """

    def __init__(self, exchange: Exchange, layers: list[torch.Tensor], scale: float, threads: int, cpus=()):
        arguments = [
            attention_arguments(exchange.q, ((blocks, exchange.visit),), exchange.out, exchange.lse, scale)
            for blocks in layers
        ]
        self._threads = extension().Doorbell(
            arguments,
            address(exchange.batch, torch.int32, (1,), "exchange.batch"),
            address(exchange.bell, torch.int64, (4, extension().BELL_STRIDE // 8), "exchange.bell"),
            threads,
            cpu_variant(),
            list(cpus),
            (exchange, layers),
        )
        self.exchange = exchange

    def expect(self, requests: int):
        """Say that so many more requests will come; the threads poll for these and sleep at other times."""
        self._threads.expect(requests)

    @property
    def busy_seconds(self) -> float:
        """How long it took to answer all requests so far."""
        return self._threads.busy_seconds()

    def check(self):
        """Raise RuntimeError if a request failed, with the layer and the reason of the first."""
        failure = self._threads.failure()
        if failure:
            raise RuntimeError(f"CPU attention failed in {failure}")
