"""Hooks on what happens to requests, and on what the server tells about itself."""

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.observe import look
from rheoserve_sgl.runtime import request_report, transaction


def request_left(req, tree_cache, is_insert=True):
    """BEFORE `release_kv_cache`: finish, abort or retraction. Pages that are freed lose their frames (allocator.py)."""
    pool = tree_cache.token_to_kv_pool_allocator.get_kvcache()
    if not isinstance(pool, TwoTierKVPool) or req.req_pool_idx is None:
        return
    request_report.leave(req, pool.coordinator.attended)
    transaction.leave(req)
    pool.coordinator.batch_changed()


def look_when_idle(scheduler):
    """BEFORE `Scheduler.on_idle`: nothing is in flight, so the canary looks at some blocks."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if isinstance(pool, TwoTierKVPool) and pool.canary is not None and scheduler.is_fully_idle():
        pool.canary.look(idle=True)


def add_state(result, scheduler, question):
    """AFTER `Scheduler.get_internal_state`: settings and live counts under the key "rheoserve", and what the live page
    shows, if it asks."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    if isinstance(pool, TwoTierKVPool):
        free = scheduler.token_to_kv_pool_allocator.available_size() // pool.page_size
        result.internal_state["rheoserve"] = {
            "settings": pool.config.as_dict(),
            "cpu_variant": _cpu_variant(),
            **pool.coordinator.stats(free),
            "transactions": transaction.describe(scheduler),
        }
        seen = look.answer(question.rid, scheduler)
        if seen is not None:
            result.internal_state["rheoserve"]["look"] = seen


def enable_fused_set_kv_buffer(original, *args, **kwargs):
    """AROUND `enable_fused_set_kv_buffer`: some models fuse RoPE with a store of KV by token rows,
    which our pool does not have. They then call `set_kv_buffer`."""
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    if isinstance(get_token_to_kv_pool(), TwoTierKVPool):
        return False
    return original(*args, **kwargs)


def _cpu_variant() -> str:
    from rheoserve_sgl.ops.workers import cpu_variant

    return cpu_variant()
