"""Attention of one query position over listed blocks, with its log-sum-exp.

The same op serves both tiers: a block is `[2, 64, head_dim]` whether it lies in a frame or in the host
store. `attend_torch` is the documentation, the oracle, and what runs on a GPU's frames for now (gpu/attend.py
will); `attend_cpu` is the C++ kernel; `attend_tiers` is what a decode step calls.
"""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.extension import DTYPES, address
from rheoserve_sgl.ops.merge import merge_torch
from rheoserve_sgl.ops.plan import Plan, Visit
from rheoserve_sgl.ops.workers import worker_pool


def attend_torch(q: torch.Tensor, blocks: torch.Tensor, visit: Visit, scale: float):
    """Attention over listed blocks.

    Args:
        q: `[batch, kv_heads, group, head_dim]` float32
        blocks: `[n, 2, 64, head_dim]`, K then V of each block
        visit: the lists
        scale: softmax scale

    Returns:
        out: `[batch, kv_heads, group, head_dim]` float32, zero where the list is empty
        lse: `[batch, kv_heads, group]` float32, natural log, -inf where the list is empty
    """
    batch, kv_heads, group, dim = q.shape
    width = int(visit.count.max()) if visit.count.numel() else 0
    if width == 0:
        return torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, device=q.device)
    slot = torch.arange(width, device=q.device)
    listed = slot < visit.count[..., None]
    ids = torch.where(listed, visit.blocks[..., :width], 0).long()
    picked = blocks[ids].float()  # [batch, kv_heads, width, 2, 64, dim]
    is_last = slot == visit.count[..., None] - 1
    length = torch.where(is_last, visit.last_len[..., None], PAGE_TOKENS)
    valid = (torch.arange(PAGE_TOKENS, device=q.device) < length[..., None]) & listed[..., None]
    valid = valid.reshape(batch, kv_heads, 1, -1)
    keys = picked[..., 0, :, :].reshape(batch, kv_heads, -1, dim)
    values = picked[..., 1, :, :].reshape(batch, kv_heads, -1, dim)
    # Whatever lies beyond a block's valid tokens must not reach a product, where NaN would survive.
    values = values.masked_fill(~valid.transpose(2, 3), 0)
    logits = (q * scale) @ keys.transpose(2, 3)
    logits = logits.masked_fill(~valid, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    empty = (visit.count == 0)[..., None]
    weights = torch.exp(logits - torch.where(empty, 0.0, lse)[..., None])
    return weights @ values, lse


def attend_cpu(q: torch.Tensor, tiers, scale: float, threads: int, variant: str = ""):
    """Attention over the union of one or two tiers' lists by the C++ kernel.

    Args:
        q: `[batch, kv_heads, group, head_dim]` float32
        tiers: pairs of blocks (fp32, fp16 or bf16, all alike) and Visit, on the host; lists are disjoint
        scale: softmax scale
        threads: size of the worker pool
        variant: kernel variant, "" for the best

    Returns:
        out, lse as `attend_torch`
    """
    out = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    worker_pool(threads, variant).attend(attention_arguments(q, tiers, out, lse, scale))
    return out, lse


def attention_arguments(q: torch.Tensor, tiers, out: torch.Tensor, lse: torch.Tensor, scale: float) -> tuple:
    """What the C++ kernel takes: addresses and sizes of tensors as `attend_cpu` has them."""
    batch, kv_heads, group, dim = q.shape
    pairs = (batch, kv_heads)
    dtype = tiers[0][0].dtype
    if dtype not in DTYPES:
        raise ValueError(f"blocks are {dtype}; legal: {', '.join(map(str, DTYPES))}")
    lists = [
        (
            address(blocks, dtype, (len(blocks), 2, PAGE_TOKENS, dim), "blocks"),
            len(blocks),
            address(visit.blocks, torch.int32, (*pairs, visit.blocks.shape[-1]), "visit.blocks"),
            address(visit.count, torch.int32, pairs, "visit.count"),
            address(visit.last_len, torch.int32, pairs, "visit.last_len"),
            visit.blocks.shape[-1],
        )
        for blocks, visit in tiers
    ]
    return (
        address(q, torch.float32, (*pairs, group, dim), "q"),
        lists,
        DTYPES[dtype],
        address(out, torch.float32, (*pairs, group, dim), "out"),
        address(lse, torch.float32, (*pairs, group), "lse"),
        (batch, kv_heads, group, dim),
        scale,
    )


def attend_tiers(q: torch.Tensor, frames: torch.Tensor, host: torch.Tensor, plan: Plan, scale: float, threads: int):
    """One decode step's attention of one layer: frames and host blocks, merged by LSE.

    Where frames are in host memory too, one kernel call attends to both tiers, so that its threads
    share the work whatever the split; otherwise each tier is attended where it is.

    Args:
        q: `[batch, kv_heads, group, head_dim]` float32
        frames: `[frames + 1, 2, 64, head_dim]`
        host: `[blocks, 2, 64, head_dim]`, in host memory
        plan: this step's lists

    Returns:
        out: like q
    """
    if frames.device.type == "cpu":
        return attend_cpu(q, ((frames, plan.device), (host, plan.host)), scale, threads)[0]
    visit = Visit(plan.host.blocks.cpu(), plan.host.count.cpu(), plan.host.last_len.cpu())
    queries = q.cpu()
    on_device = attend_torch(q, frames, plan.device, scale)
    on_host = attend_cpu(queries, ((host, visit),), scale, threads)
    return merge_torch(*on_device, *(part.to(q.device) for part in on_host))[0]
