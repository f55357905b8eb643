"""The rates that a latency model starts from, measured when a server starts."""

import logging
import time

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.ops.attention import attend_cpu
from rheoserve_sgl.ops.gpu.timing import fastest
from rheoserve_sgl.ops.plan import Visit
from rheoserve_sgl.runtime.latency_model import LatencyModel, Rates
from rheoserve_sgl.runtime.ranks import smallest

logger = logging.getLogger(__name__)
READ_BYTES = 128 << 20
REPEATS = 3


def calibrate(pool: TwoTierKVPool, model: torch.nn.Module, group: int) -> LatencyModel:
    """Measure the rates of all ranks, each on blocks of its own pool; all get the slowest, so that they predict alike.

    Args:
        group: query heads to a KV head
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    rates = measure_rates(
        pool.host.blocks(0),
        pool.head_num,
        group,
        pool.threads,
        pool.frames.layers[0] if pool.importance.is_cuda else None,
    )
    device, host, least = smallest([rates.device, rates.host, -float(weights)])
    rates, weights = Rates(device, host, rates.beside), int(-least)
    logger.info(
        "RheoServe: the device reads %.0f GB/s, the CPU's attention %.1f GB/s; weights %.2f GB",
        *(value / 1e9 for value in (rates.device, rates.host, weights)),
    )
    return LatencyModel(rates, weights)


def measure_rates(host: torch.Tensor, kv_heads: int, group: int, threads: int, frames: torch.Tensor | None) -> Rates:
    """Rates of both tiers.

    Args:
        host: `[blocks, 2, 64, head_dim]`, several times larger than the caches where there is room for it
        frames: some memory of the GPU; None: there is none
    """
    rate = host_rate(host, kv_heads, group, threads)
    return Rates(rate if frames is None else device_rate(frames), rate, beside=frames is not None)


def device_rate(memory: torch.Tensor) -> float:
    """Bytes a second that a copy within a GPU's memory reads and writes."""
    flat = memory.view(-1)[: READ_BYTES // memory.element_size()]
    return 2 * flat.nbytes / fastest(flat.clone)


def host_rate(blocks: torch.Tensor, kv_heads: int, group: int, threads: int) -> float:
    """Bytes a second that the CPU's attention reads of blocks that lie apart, as those of a plan do."""
    block_bytes = blocks[0].nbytes
    count = max(min(READ_BYTES // block_bytes, len(blocks)) // kv_heads, 1)
    listed = torch.randperm(len(blocks), dtype=torch.int32).repeat(kv_heads)[: count * kv_heads]
    shape = (1, kv_heads)
    of_each = [torch.full(shape, number, dtype=torch.int32) for number in (count, PAGE_TOKENS)]
    visit = Visit(listed.view(*shape, count), *of_each)
    q = torch.zeros((*shape, group, blocks.shape[-1]))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        attend_cpu(q, ((blocks, visit),), 1.0, threads)
        times.append(time.perf_counter() - began)
    return count * kv_heads * block_bytes / min(times)
