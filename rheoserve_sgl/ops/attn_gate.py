"""The learned gate while serving: keys of pages as tokens come, and queries of a step.

`gate_keys` and `gate_queries` pick the implementation by the tensors' device; the torch forms are the
documentation and the oracles.
"""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import K_PARTS, GateWeights, project_key, project_query
from rheoserve_sgl.ops.extension import address
from rheoserve_sgl.ops.workers import worker_pool
from rheoserve_sgl.runtime.writes import Writes


def gate_keys(weights: GateWeights, plain, writes: Writes, running, quick, threads: int = 1):
    """Fold new tokens into their pages, in place. A page that becomes complete gets its key, another zeros.

    The sum over a page's tokens is taken in their order, so that it has the same bits however they came.

    Args:
        plain: `[tokens, kv_heads, head_dim]` float32, the new tokens' keys before RoPE
        writes: where they went
        running: `[slots, kv_heads, 3, head_dim]` float32: max, min and sum of each request's incomplete page;
            the last slot is nobody's
        quick: `[all_pages, kv_heads, gate_dim]`, on a CPU float32
        threads: size of the worker pool, where tensors are on a CPU
    """
    if quick.device.type == "cpu":
        gate_keys_cpu(weights, plain, writes, running, quick, threads)
    else:
        from rheoserve_sgl.ops.gpu.fold import fold_gpu

        _keep(weights, fold_gpu(plain, writes, running), writes, running, quick)


def gate_keys_torch(weights: GateWeights, plain, writes: Writes, running, quick):
    _keep(weights, fold_torch(plain, writes, running), writes, running, quick)


def fold_torch(plain, writes: Writes, running) -> torch.Tensor:
    """Max, min and sum over all tokens of each page that was written, `[n, kv_heads, 3, head_dim]` float32."""
    fresh = (writes.before == 0)[:, None, None]
    high, low, total = running[writes.requests].unbind(2)
    high = high.masked_fill(fresh, -torch.inf)
    low = low.masked_fill(fresh, torch.inf)
    total = total.masked_fill(fresh, 0.0)
    new = writes.filled - writes.before
    for i in range(writes.most_new):
        more = (i < new)[:, None, None]
        key = plain[(writes.token + i).clamp(max=len(plain) - 1)]
        high = torch.where(more, torch.maximum(high, key), high)
        low = torch.where(more, torch.minimum(low, key), low)
        total = torch.where(more, total + key, total)
    return torch.stack((high, low, total), 2)


def _keep(weights: GateWeights, folded, writes: Writes, running, quick):
    """Keys of the pages that are complete, zeros for others; these are remembered as they are."""
    high, low, total = folded.unbind(2)
    complete = (writes.filled == PAGE_TOKENS)[:, None, None]
    pooled = {"max": high, "min": low, "avg": total / PAGE_TOKENS}
    keys = project_key(weights, torch.cat([pooled[part] for part in weights.parts], -1), writes.key_position)
    quick[writes.pages] = keys.where(complete, 0.0).to(quick.dtype)
    # Of a request's pages only the last can be incomplete; the others' values go to nobody's.
    slot = torch.where(complete[:, 0, 0], len(running) - 1, writes.requests)
    running[slot] = folded


def gate_keys_cpu(weights: GateWeights, plain, writes: Writes, running, quick, threads: int = 1):
    tokens, kv_heads, dim = plain.shape
    count, (slots, all_pages) = len(writes.pages), (len(running), len(quick))
    shape = (kv_heads, len(weights.parts) * dim, weights.gate_dim)
    worker_pool(threads).gate_keys(
        _projection(weights, weights.k, weights.k_norm, shape),
        address(plain, torch.float32, (tokens, kv_heads, dim), "plain"),
        [
            address(tensor, torch.int64, (count,), name)
            for name, tensor in (
                ("pages", writes.pages),
                ("token", writes.token),
                ("requests", writes.requests),
                ("key_position", writes.key_position),
            )
        ],
        [
            address(writes.before, torch.int32, (count,), "before"),
            address(writes.filled, torch.int32, (count,), "filled"),
        ],
        address(running, torch.float32, (slots, kv_heads, 3, dim), "running"),
        address(quick, torch.float32, (all_pages, kv_heads, weights.gate_dim), "quick"),
        tokens,
        count,
        slots,
        all_pages,
        kv_heads,
        dim,
        sum(1 << K_PARTS.index(part) for part in weights.parts),
    )


def gate_queries(weights: GateWeights, plain, positions, threads: int = 1) -> torch.Tensor:
    """Gate queries `[batch, kv_heads, gate_dim]` float32.

    Args:
        plain: `[batch, kv_heads, group, head_dim]` float32, queries before RoPE
        positions: `[batch]` int64
    """
    if plain.device.type == "cpu":
        return gate_queries_cpu(weights, plain, positions, threads)
    return project_query(weights, plain, positions)


def gate_queries_cpu(weights: GateWeights, plain, positions, threads: int = 1) -> torch.Tensor:
    batch, kv_heads, group, dim = plain.shape
    width = weights.gate_dim if weights.q is not None else dim
    out = torch.empty((batch, kv_heads, width), dtype=torch.float32)
    inputs = (dim,) if weights.q is None or weights.q.ndim == 3 else (group, dim)
    worker_pool(threads).gate_queries(
        _projection(weights, weights.q, weights.q_norm, (kv_heads, *inputs, width)),
        address(plain, torch.float32, (batch, kv_heads, group, dim), "plain"),
        address(positions, torch.int64, (batch,), "positions"),
        out.data_ptr(),
        batch,
        kv_heads,
        group,
        dim,
    )
    return out


def _projection(weights: GateWeights, matrix, norm, shape: tuple) -> tuple:
    """(weights, norm, rope, inputs, gate_dim, positions) of the extension; 0 for what is left out."""
    kv_heads, *inputs, width = shape
    rope = weights.rope
    positions = 0 if rope is None else len(rope)
    return (
        0 if matrix is None else address(matrix, torch.float32, shape, "gate weights"),
        0 if norm is None else address(norm, torch.float32, (width,), "gate norm"),
        0 if rope is None else address(rope, torch.float32, (positions, width), "gate rope"),
        torch.Size(inputs).numel(),
        width,
        positions,
    )
