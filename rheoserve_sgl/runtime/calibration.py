"""The rates that a latency model starts from, measured when a server starts: a few tenths of a second."""

import logging
import time

import torch

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.ops.attention import attend_cpu
from rheoserve_sgl.ops.plan import Visit
from rheoserve_sgl.runtime.latency_model import LatencyModel, Rates

logger = logging.getLogger(__name__)
READ_BYTES = 128 << 20
REPEATS = 3


def calibrate(pool: TwoTierKVPool, model: torch.nn.Module, group: int) -> LatencyModel:
    """Measure this rank's rates, on blocks of its own pool.

    Args:
        group: query heads to a KV head
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    host = host_rate(pool, group)
    on_gpu = pool.importance.is_cuda
    rates = Rates(device_rate(pool) if on_gpu else host, host, beside=on_gpu)
    logger.info(
        "RheoServe: the device reads %.0f GB/s, the CPU's attention %.1f GB/s; weights %.2f GB",
        *(value / 1e9 for value in (rates.device, rates.host, weights)),
    )
    return LatencyModel(rates, weights)


def device_rate(pool: TwoTierKVPool) -> float:
    """Bytes a second that a copy of frames reads and writes."""
    flat = pool.frames.layers[0].view(-1)
    count = min(READ_BYTES // flat.element_size(), flat.numel())
    whole = flat[:count]
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        whole.clone()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * count * flat.element_size() / min(times[1:])


def host_rate(pool: TwoTierKVPool, group: int) -> float:
    """Bytes a second that the CPU's attention reads of blocks that lie apart, as those of a plan do."""
    blocks = pool.host.blocks(0)
    count = max(min(READ_BYTES // pool.block_bytes, len(blocks) - 1) // pool.head_num, 1)
    listed = torch.randperm(len(blocks) - 1)[: count * pool.head_num].to(torch.int32) + 1
    if len(listed) < count * pool.head_num:
        listed = torch.zeros(count * pool.head_num, dtype=torch.int32)
    shape = (1, pool.head_num)
    visit = Visit(
        listed.view(*shape, count), torch.full(shape, count, dtype=torch.int32), torch.full(shape, 64).to(torch.int32)
    )
    q = torch.zeros((*shape, group, pool.head_dim))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        attend_cpu(q, ((blocks, visit),), 1.0, pool.threads)
        times.append(time.perf_counter() - began)
    return count * pool.head_num * pool.block_bytes / min(times)
