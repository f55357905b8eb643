"""Attention over listed blocks on a GPU: split over the list, partial results merged by log-sum-exp.

Static shapes and no synchronisation, so it can be captured in a CUDA graph; a program whose part of a list
is empty ends at once. The split-KV scheme is that of Flash-Decoding (Dao et al., 2023).

Not in use yet: so far it ran under Triton's interpreter only.
"""

import torch
import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.plan import Visit

FEWEST = 4  # blocks of a list to a program, at least
PARTS = 64  # programs to a list, at most
HEADS = 16  # the smallest tile of tl.dot


@triton.jit
def _attend_split(
    q, blocks, lists, counts, last_len, acc_out, lse_out, scale, max_list, split, group,
    DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    part = tl.program_id(1)
    count = tl.load(counts + pair)
    first = part * split
    if first < count:
        head = tl.arange(0, HEADS)
        dim = tl.arange(0, WIDE)
        token = tl.arange(0, TOKENS)
        used = (head < group)[:, None] & (dim < DIM)[None, :]
        queries = tl.load(q + (pair * group + head)[:, None] * DIM + dim[None, :], mask=used, other=0.0)
        queries = queries.to(blocks.dtype.element_ty)
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, WIDE], tl.float32)
        for i in range(first, tl.minimum(first + split, count)):
            block = tl.load(lists + pair.to(tl.int64) * max_list + i).to(tl.int64)
            at = blocks + block * (2 * TOKENS * DIM)
            valid = token < tl.where(i + 1 == count, tl.load(last_len + pair), TOKENS)
            # Whatever lies beyond the valid tokens must not reach a product, where NaN would survive.
            keys = tl.load(
                at + token[None, :] * DIM + dim[:, None], mask=(dim < DIM)[:, None] & valid[None, :], other=0.0
            )
            logits = tl.dot(queries, keys, input_precision="ieee") * scale
            logits = tl.where(valid[None, :], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            weights = tl.exp(logits - new_top[:, None])
            older = tl.exp(top - new_top)
            total = total * older + tl.sum(weights, 1)
            values = tl.load(
                at + TOKENS * DIM + token[:, None] * DIM + dim[None, :],
                mask=valid[:, None] & (dim < DIM)[None, :],
                other=0.0,
            )
            acc = acc * older[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            top = new_top
        row = (pair * tl.num_programs(1) + part).to(tl.int64) * group + head
        tl.store(acc_out + row[:, None] * DIM + dim[None, :], acc / total[:, None], mask=used)
        tl.store(lse_out + row, top + tl.log(total), mask=head < group)


@triton.jit
def _merge_splits(
    counts, acc_in, lse_in, out, lse, parts, split, group,
    DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, WIDE)
    used = (tl.load(counts + pair) + split - 1) // split
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([WIDE], tl.float32)
    for part in range(0, used):
        row = (pair * parts + part).to(tl.int64) * group + head
        value = tl.load(lse_in + row)
        new_top = tl.maximum(top, value)
        weight = tl.exp(value - new_top)
        older = tl.exp(top - new_top)
        acc = acc * older + weight * tl.load(acc_in + row * DIM + dim, mask=dim < DIM, other=0.0)
        total = total * older + weight
        top = new_top
    row = pair * group + head
    empty = used == 0
    acc = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total))
    tl.store(out + row.to(tl.int64) * DIM + dim, acc, mask=dim < DIM)
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(total)))


def attend_gpu(q: torch.Tensor, blocks: torch.Tensor, visit: Visit, scale: float):
    """As `attend_torch`; products are of the blocks' dtype, so queries and weights are rounded to it.

    Args:
        q: `[batch, kv_heads, group, head_dim]` float32, group at most 16
        blocks: `[n, 2, 64, head_dim]`, where the GPU can read it
    """
    batch, kv_heads, group, dim = q.shape
    if group > HEADS:
        raise ValueError(f"group is {group}; legal: 1 to {HEADS}")
    pairs, max_list = batch * kv_heads, visit.blocks.shape[-1]
    split = max(FEWEST, triton.cdiv(max_list, PARTS))
    parts = triton.cdiv(max_list, split)
    wide = max(triton.next_power_of_2(dim), 16)
    partial = torch.empty((pairs, parts, group, dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((pairs, parts, group), dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if parts:
        _attend_split[(pairs, parts)](
            q, blocks, visit.blocks, visit.count, visit.last_len, partial, partial_lse, scale, max_list, split, group,
            DIM=dim, WIDE=wide, TOKENS=PAGE_TOKENS, HEADS=HEADS,
        )  # fmt: skip
    _merge_splits[(pairs, group)](visit.count, partial, partial_lse, out, lse, parts, split, group, DIM=dim, WIDE=wide)
    return out, lse
