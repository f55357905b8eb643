"""Hooks that build RheoServe's pool and allocator in place of SGLang's."""

import logging
from dataclasses import replace

import torch
from sglang.srt.distributed import get_world_group
from sglang.srt.runtime_context import get_parallel, get_schedule

from rheoserve_sgl.cache.allocator import TwoTierAllocator
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.coordinator.coordinator import Coordinator
from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.gate.base import Gate
from rheoserve_sgl.gate.checkpoint import read_gate, take_heads
from rheoserve_sgl.gate.seer import SeerGate
from rheoserve_sgl.ops.processors import cpu_quota
from rheoserve_sgl.refusals import model_shape, refuse_dtype, refuse_layers
from rheoserve_sgl.runtime.memory import free_host_bytes, key_bytes, size_tiers, staging_bytes
from rheoserve_sgl.runtime.ranks import own_processors, smallest
from rheoserve_sgl.server_args import selects_rheoserve

logger = logging.getLogger(__name__)
GPU_REQUESTS = 256  # at once, unless --max-running-requests says otherwise


def resolve_sizes(original, configurator, pre_model_load_memory):
    """AROUND `_resolve_memory_pool_config`: the token capacity becomes the host store's."""
    if not selects_rheoserve(configurator.server_args):
        return original(configurator, pre_model_load_memory)
    # Here, since after this the host store is touched and pinned, which takes its time.
    info = configurator.layer_info
    refuse_layers(configurator.model, range(info.start_layer, info.end_layer))
    refuse_dtype(configurator.server_args, configurator.kv_cache_dtype)
    on_cpu = torch.device(configurator.device).type == "cpu"
    resolved = original(configurator, pre_model_load_memory)
    config = RheoConfig.from_server_args(configurator.server_args)
    world = get_world_group()
    layers, heads, head_dim, itemsize = _kv_shape(configurator)
    sizes = size_tiers(
        config,
        token_bytes=2 * layers * heads * head_dim * itemsize,
        # The same for all ranks, so that their page tables stay alike.
        free_bytes=int(*smallest([free_host_bytes() // world.world_size])),
        profiled_tokens=None if on_cpu else resolved.max_total_num_tokens,
        max_total_tokens=get_schedule().max_total_tokens,
        key_bytes=key_bytes(layers, heads, head_dim, itemsize, on_gpu=not on_cpu),
        staging_bytes=staging_bytes(heads, head_dim, itemsize),
        context=configurator.model_config.context_len,
    )
    logger.info("RheoServe sizes: %s", sizes.reason)
    resolved.max_total_num_tokens = sizes.host_tokens
    resolved.max_running_requests = configurator.resolve_max_num_reqs(sizes.host_tokens)
    if not on_cpu and configurator.server_args.max_running_requests is None:
        # The memory of a decode step that stays where it is grows with this.
        resolved.max_running_requests = min(resolved.max_running_requests, GPU_REQUESTS)
    # SGLang's size record has no field for the second tier; the flag's resolved value carries it
    # to `build_pool`.
    configurator.server_args.override("rheoserve.sizes", rheoserve_device_tokens=sizes.device_tokens)
    return resolved


def build_pool(original, configurator, **kwargs):
    """AROUND `_build_token_to_kv_pool`."""
    if not selects_rheoserve(configurator.server_args):
        return original(configurator, **kwargs)
    model = configurator.model_config
    layers = configurator.layer_info
    config = RheoConfig.from_server_args(configurator.server_args)
    if config.host_threads is None:
        config = replace(config, host_threads=_default_threads(configurator.device))
    gate, config = build_gate(config, model, configurator.device)
    pool = TwoTierKVPool(
        kwargs["sizes"].max_total_num_tokens,
        config=config,
        gate=gate,
        dtype=configurator.kv_cache_dtype,
        head_num=model.get_num_kv_heads(get_parallel().attn_tp_size),
        head_dim=model.head_dim,
        layer_num=layers.num_effective_layers,
        device=configurator.device,
        enable_memory_saver=False,
        start_layer=layers.start_layer,
        end_layer=layers.end_layer,
        enable_alt_stream=False,
    )
    pool.coordinator = Coordinator(pool)
    return pool


def build_gate(config: RheoConfig, model_config, device) -> tuple[Gate, RheoConfig]:
    """This rank's gate, and the settings with its number of dense layers."""
    if config.selector != "seer":
        if config.gate_path is not None:
            logger.warning(
                "RheoServe: the gate at %s is not used: the selector is %s", config.gate_path, config.selector
            )
        return make_gate(config.selector), replace(config, dense_layers=config.dense_layers or 0)
    parallel = get_parallel()
    stored, layers = read_gate(config.gate_path, model_shape(model_config))
    own = model_config.get_num_kv_heads(parallel.attn_tp_size)
    heads = slice(parallel.attn_tp_rank * own, (parallel.attn_tp_rank + 1) * own)
    weights = [take_heads(tensors, heads, stored.parts, None, device) for tensors in layers]
    if config.dense_layers is None:
        config = replace(config, dense_layers=stored.start_layer)
    return SeerGate(weights, rotates=stored.use_rope, rotate_last=config.gate_rope == "last"), config


def build_allocator(original, configurator, **kwargs):
    """AROUND `_build_token_to_kv_pool_allocator`."""
    pool = kwargs["token_to_kv_pool"]
    if not isinstance(pool, TwoTierKVPool):
        return original(configurator, **kwargs)
    return TwoTierAllocator(
        kwargs["sizes"].max_total_num_tokens,
        page_size=pool.page_size,
        dtype=configurator.kv_cache_dtype,
        device=configurator.device,
        kvcache=pool,
        need_sort=False,
    )


def _default_threads(device) -> int:
    """A rank's part of the processors, alike for all; beside a GPU some are left to SGLang's own processes."""
    own = int(*smallest([min(len(own_processors()), cpu_quota() / get_world_group().world_size)]))
    return max(own if torch.device(device).type == "cpu" else own - 2, 1)


def _kv_shape(configurator) -> tuple[int, int, int, int]:
    """(layers, KV heads, head dim, bytes of a number) of this rank's KV cache."""
    model = configurator.model_config
    heads = model.get_num_kv_heads(get_parallel().attn_tp_size)
    return configurator.layer_info.num_effective_layers, heads, model.head_dim, configurator.kv_cache_dtype.itemsize
