"""Gate keys of pages, pooled from their stored K."""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.extension import DTYPES, address
from rheoserve_sgl.ops.workers import worker_pool


def pool_keys(gate, host, pages, filled, quick, threads: int = 1):
    """Recompute the gate keys of some pages of one layer, in place.

    Args:
        host: `[all_pages, kv_heads, 2, 64, head_dim]`, the host store
        pages: `[n]` int64
        filled: `[n]` int32, valid tokens of each page, 1 to 64
        quick: `[all_pages, kv_heads, key_dim]`, on the device; on a CPU float32
        threads: size of the worker pool, where tensors are on a CPU
    """
    if quick.device.type == "cpu":
        pool_keys_cpu(gate, host, pages, filled, quick, threads)
    else:
        pool_keys_torch(gate, host, pages, filled, quick)


def pool_keys_torch(gate, host, pages, filled, quick):
    keys = host[pages.cpu(), :, 0].to(quick.device)
    valid = torch.arange(PAGE_TOKENS, device=quick.device) < filled[:, None]
    quick[pages] = gate.pool(keys.float(), valid[:, None, :, None]).to(quick.dtype)


def pool_keys_cpu(gate, host, pages, filled, quick, threads: int = 1):
    all_pages, kv_heads, _, _, dim = host.shape
    worker_pool(threads).pool_keys(
        gate.pooling,
        address(host, host.dtype, (all_pages, kv_heads, 2, PAGE_TOKENS, dim), "host"),
        DTYPES[host.dtype],
        address(pages, torch.int64, (len(pages),), "pages"),
        address(filled, torch.int32, (len(pages),), "filled"),
        address(quick, torch.float32, (all_pages, kv_heads, gate.key_dim(dim)), "quick"),
        len(pages),
        all_pages,
        kv_heads,
        dim,
    )
