"""Attention over the resident lists, split over each list, and the merge of the parts with the CPU's answer.

Static shapes and no synchronisation, so that it can be captured in a CUDA graph; a program whose part of a list is
empty ends at once. The split-KV scheme is that of Flash-Decoding (Dao et al., 2023).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.gpu.ask import load_acquire, load_acquire_own, nanoseconds
from rheoserve_sgl.ops.gpu.early import early, let_next, start, wait
from rheoserve_sgl.ops.plan import Visit

FEWEST = 2  # blocks of a list to a program, at least
PARTS = 64  # programs to a list, at most
PROGRAMS = 2048  # to all lists of a batch, roughly: some for each multiprocessor of any GPU
HEADS = 16  # the smallest tile of tl.dot


@triton.jit
def _part_length(count, parts, FEWEST: tl.constexpr):
    """Blocks of each part of a list."""
    return tl.maximum((count + parts - 1) // parts, FEWEST)


@triton.jit
def _attend_split(
    q, blocks, lists, counts, last_len, acc_out, lse_out, scale, max_list, group,
    DIM: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, FEWEST: tl.constexpr,
    BESIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next(EARLY)
    if not BESIDE:
        wait(EARLY)
    pair = tl.program_id(0)
    part = tl.program_id(1)
    count = tl.load(counts + pair)
    split = _part_length(count, tl.num_programs(1), FEWEST)
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
    if BESIDE:
        wait(EARLY)  # the next kernel waits for this one only


@triton.jit
def _wait(counter, seen, late, report, waited, answered, limit):
    """Until the CPU has answered the last question, or too late; then tell the other programs by `seen`."""
    number = tl.load(counter)
    answered_at = answered.to(tl.int64)
    began = nanoseconds(answered_at)
    # After one answer too late nothing is waited for: the step is lost, and the server is told.
    waiting = tl.load(late) == 0
    while waiting:
        if load_acquire(answered_at) == number:
            waiting = False
        elif nanoseconds(answered_at) - began > limit:
            tl.store(late, number)
            tl.store(report, number)
            waiting = False
    tl.atomic_xchg(seen, number, sem="release", scope="gpu")
    tl.atomic_add(waited, nanoseconds(answered_at) - began, sem="relaxed")


@triton.jit
def _merge(
    counts, acc_in, lse_in, host_counts, host_out, host_lse, out, lse, parts, group,
    counter, rung, seen, late, report, waited, answered, limit,
    WAIT: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, FEWEST: tl.constexpr, PARTS: tl.constexpr,
    BESIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, WIDE)
    count = 0
    if BESIDE:  # made by a kernel that the plan has waited for, and attention began after the plan had
        count = tl.load(counts + pair)
    start(EARLY)
    if not BESIDE:
        count = tl.load(counts + pair)
    # (Before the parts, so that nothing waits for them later.)
    visited = tl.load(host_counts + pair) > 0
    asked = tl.load(rung) > 0
    split = _part_length(count, parts, FEWEST)
    part = tl.arange(0, PARTS)
    there = part < (count + split - 1) // split
    at = (pair * parts + part).to(tl.int64) * group + head
    lses = tl.load(lse_in + at, mask=there, other=float("-inf"))
    values = tl.load(acc_in + at[:, None] * DIM + dim[None, :], mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
    top = tl.max(lses, 0)
    # (Of no parts at all the weights are 0, not NaN.)
    weights = tl.exp(lses - tl.where(top == float("-inf"), 0.0, top))
    acc, total = tl.sum(weights[:, None] * values, 0), tl.sum(weights, 0)
    if WAIT:
        # One program looks over PCIe, the first to start; all others, where the CPU visited, look at it.
        if pair + head == 0:
            if asked:
                _wait(counter, seen, late, report, waited, answered, limit)
        elif visited:
            number = tl.load(counter)
            while load_acquire_own(seen.to(tl.int64)) != number:
                pass
    row = pair * group + head
    if visited:
        value = tl.load(host_lse + row)
        new_top = tl.maximum(top, value)
        weight = tl.exp(value - new_top)
        older = tl.exp(top - new_top)
        host_acc = tl.load(host_out + row.to(tl.int64) * DIM + dim, mask=dim < DIM, other=0.0)
        acc = acc * older + weight * host_acc
        total = total * older + weight
        top = new_top
    empty = total == 0.0
    acc = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total))
    tl.store(out + row.to(tl.int64) * DIM + dim, acc.to(out.dtype.element_ty), mask=dim < DIM)
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))))


@dataclass(frozen=True)
class Split:
    """Where the results of lists' parts lie.

    acc: `[batch * kv_heads, parts, group, head_dim]` float32
    lse: `[batch * kv_heads, parts, group]` float32
    """

    acc: torch.Tensor
    lse: torch.Tensor


class SplitRoom:
    """Room for the parts of any batch up to a size; the fewer the lists, the more parts each has."""

    def __init__(self, pairs: int, group: int, dim: int, device):
        if group > HEADS:
            raise ValueError(f"group is {group}; legal: 1 to {HEADS}")
        rows = max(count * parts_of(count) for count in {pairs, min(pairs, PROGRAMS), min(pairs, PROGRAMS // PARTS)})
        self._acc = torch.empty((rows, group, dim), dtype=torch.float32, device=device)
        self._lse = torch.empty((rows, group), dtype=torch.float32, device=device)

    def split(self, pairs: int) -> Split:
        """For a batch with so many lists, in the same memory each time."""
        rows = pairs * parts_of(pairs)
        return Split(*(room[:rows].unflatten(0, (pairs, -1)) for room in (self._acc, self._lse)))


def parts_of(pairs: int) -> int:
    return min(max(PROGRAMS // max(pairs, 1), 1), PARTS)


def attend_split(q, blocks, visit: Visit, split: Split, scale: float, beside: bool = False):
    """Attend to each part of each list.

    Products are of the blocks' dtype: queries and weights are rounded to it.

    Args:
        q: `[batch, kv_heads, group, head_dim]`, any float dtype, group at most 16
        blocks: `[n, 2, 64, head_dim]`, where the GPU can read it
        beside: whether the kernel launched right before, a `plan_gpu`, writes none of this, so that both run at once
    """
    batch, kv_heads, group, dim = q.shape
    _attend_split[(batch * kv_heads, split.lse.shape[1])](
        q, blocks, visit.blocks, visit.count, visit.last_len, split.acc, split.lse, scale,
        visit.blocks.shape[-1], group,
        DIM=dim, WIDE=max(triton.next_power_of_2(dim), 16), TOKENS=PAGE_TOKENS, HEADS=HEADS, FEWEST=FEWEST,
        BESIDE=beside, **early(q.device),
    )  # fmt: skip


def merge_parts(visit: Visit, split: Split, out, lse, host=None, asker=None, beside: bool = False):
    """Merge the parts, and the CPU's part of the lists that have one.

    Args:
        visit: the lists that were split
        out: `[batch, kv_heads, group, head_dim]`, any float dtype; lse: `[batch, kv_heads, group]` float32
        host: (count `[batch, kv_heads]`, out, lse float32), the CPU's; None: there is none
        asker: Asker, whose last question is to be answered first; None: nothing is waited for
        beside: as `attend_split` was called; then the lists are read at once
    """
    batch, kv_heads, group, dim = out.shape
    count, host_out, host_lse = host or (torch.zeros_like(visit.count), split.acc, split.lse)
    if asker:
        bell = (
            asker.counter,
            asker.rung,
            asker.seen,
            asker.lost,
            asker.report,
            asker.waited,
            asker.answered,
            asker.limit,
        )
    else:
        bell = (*[count] * 7, 0)
    _merge[(batch * kv_heads, group)](
        visit.count, split.acc, split.lse, count, host_out, host_lse, out, lse, split.lse.shape[1], group, *bell,
        WAIT=asker is not None, DIM=dim, WIDE=max(triton.next_power_of_2(dim), 16), FEWEST=FEWEST,
        PARTS=triton.next_power_of_2(split.lse.shape[1]), BESIDE=beside, **early(out.device),
    )  # fmt: skip


def attend_gpu(q, blocks, visit: Visit, scale: float):
    """As `attend_torch`, by both kernels."""
    batch, kv_heads, group, dim = q.shape
    split = SplitRoom(batch * kv_heads, group, dim, q.device).split(batch * kv_heads)
    attend_split(q, blocks, visit, split, scale)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    merge_parts(visit, split, out, lse)
    return out, lse
