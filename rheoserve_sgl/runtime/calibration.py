"""The rates that a latency model starts from, measured when a server starts on a machine for the first time."""

import logging
import time
from importlib.metadata import version

import torch
from sglang.srt.distributed import get_world_group

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.ops.attention import attend_cpu
from rheoserve_sgl.ops.gpu.timing import fastest
from rheoserve_sgl.ops.plan import Visit
from rheoserve_sgl.ops.processors import processor_name
from rheoserve_sgl.ops.workers import cpu_variant
from rheoserve_sgl.runtime.latency_cache import LatencyCache
from rheoserve_sgl.runtime.latency_model import PRIOR, TERMS, LatencyModel, Rates
from rheoserve_sgl.runtime.ranks import smallest

logger = logging.getLogger(__name__)
READ_BYTES = 128 << 20
REPEATS = 3


def calibrate(pool: TwoTierKVPool, model: torch.nn.Module, group: int) -> LatencyModel:
    """Measure the rates of all ranks, each on blocks of its own pool, or take those of an earlier start; all ranks get
    the slowest, so that they predict alike.

    Args:
        group: query heads to a KV head
    """
    own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    weights = int(-smallest([-float(own)])[0])
    on_gpu, cache = pool.importance.is_cuda, LatencyCache.of(**facts_of(pool, weights, group))
    found, source = cache.read(len(TERMS)), f"from {cache.path}"
    learnt = found is not None and found[2] is not None
    known, resumes = smallest([float(found is not None), float(learnt)])
    if not known:
        logger.info("RheoServe: measuring what the device and the CPU's attention read in a second")
        frames = pool.frames.layers[0] if on_gpu else None
        rates = measure_rates(pool.host.blocks(0), pool.head_num, group, pool.threads, frames)
        found, source = (rates.device, rates.host, None), "measured"
    device, host, factors = found
    device, host, *factors = smallest([device, host, *(PRIOR if factors is None else factors)])
    first = get_world_group().rank_in_group == 0
    latency = LatencyModel(Rates(device, host, beside=on_gpu), weights, cache if first else None)
    if resumes:
        latency.resume(factors)
    latency.keep()
    logger.info(
        "RheoServe: the device reads %.0f GB/s, the CPU's attention %.1f GB/s (%s); weights %.2f GB",
        device / 1e9,
        host / 1e9,
        source,
        weights / 1e9,
    )
    return latency


def facts_of(pool: TwoTierKVPool, weights: int, group: int) -> dict:
    """What a step's time depends on beside its load."""
    config = pool.config
    return {
        "version": version("rheoserve-sgl"),
        "measured": "written memory",  # since then; another name for what was kept before
        "cpu": processor_name(),
        "variant": cpu_variant(),
        "threads": pool.threads,
        "gpu": torch.cuda.get_device_name() if pool.importance.is_cuda else "none",
        "ranks": get_world_group().world_size,
        "weights": weights,
        "kv": (pool.layer_num, pool.head_num, pool.head_dim, group, pool.dtype),
        "attends": (config.mode, config.device_attention, config.selector),
    }


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
    read = torch.unique(listed).long()
    blocks[read] = blocks[read]  # what nobody has written to yet is one page of zeros, read from a cache
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
