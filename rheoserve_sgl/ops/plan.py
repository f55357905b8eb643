"""The plan of a decode step: which blocks are attended, and in which tier.

For each (request, KV head): the *selection* by a rule, then two lists in page order, resident frames for
the device and host blocks for the CPU to visit. `plan` picks the implementation by the tensors' device;
`plan_torch` is the documentation and the oracle.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.extension import address
from rheoserve_sgl.ops.workers import worker_pool


class Select(IntEnum):
    ALL = 0  # every page
    FORCED = 1  # sink, window and the newest page
    BUDGET = 2  # forced, then the best scores, `budget_pages` in all
    THRESHOLD = 3  # forced, and every score above `log_threshold`


@dataclass(frozen=True)
class Rule:
    """How blocks are selected. Pages, not tokens; `selected_only` drops resident blocks outside the selection."""

    select: Select
    sink_pages: int
    window_pages: int
    budget_pages: int = 0
    log_threshold: float = 0.0
    selected_only: bool = False

    @property
    def needs_scores(self) -> bool:
        return self.select in (Select.BUDGET, Select.THRESHOLD)


@dataclass(frozen=True)
class Visit:
    """Listed blocks of one tier.

    blocks: `[batch, kv_heads, max_pages]` int32, the first `count` are valid, in page order
    count: `[batch, kv_heads]` int32
    last_len: `[batch, kv_heads]` int32, valid tokens of the last listed block
    """

    blocks: torch.Tensor
    count: torch.Tensor
    last_len: torch.Tensor


@dataclass(frozen=True)
class Plan:
    device: Visit  # `blocks` are frames
    host: Visit  # `blocks` are `page * kv_heads + head`
    chosen: torch.Tensor | None = None  # `[batch, kv_heads, max_pages]` bool, the selection


def plan(rule: Rule, scores, pages, n_pages, tail_len, frame_of, threads: int = 1, budgets=None) -> Plan:
    """Select blocks and split them by residency.

    Args:
        scores: `[batch, kv_heads, max_pages]` float32, log probabilities; None if the rule needs none
        pages: `[batch, max_pages]` int64 logical pages
        n_pages: `[batch]` int32, at least 1
        tail_len: `[batch]` int32, valid tokens of each newest page
        frame_of: `[all_pages, kv_heads]` int32, this layer's residency
        threads: size of the worker pool, where tensors are on a CPU
        budgets: `[batch]` int32, each request's budget in pages; None: the rule's for all
    """
    if pages.device.type == "cpu":
        return plan_cpu(rule, scores, pages, n_pages, tail_len, frame_of, threads, budgets)
    return plan_torch(rule, scores, pages, n_pages, tail_len, frame_of, budgets)


def forced_pages(at: torch.Tensor, n_pages: torch.Tensor, sink_pages: int, window_pages: int) -> torch.Tensor:
    """Which places among so many pages are sink, window or the newest page, or behind it."""
    return (at < sink_pages) | (at >= n_pages - 1 - window_pages)


def plan_torch(rule: Rule, scores, pages, n_pages, tail_len, frame_of, budgets=None) -> Plan:
    kv_heads = frame_of.shape[1]
    at = torch.arange(pages.shape[1], device=pages.device)
    valid = (at < n_pages[:, None])[:, None]  # [batch, 1, max_pages]
    newest = n_pages[:, None] - 1
    forced = forced_pages(at, n_pages[:, None], rule.sink_pages, rule.window_pages)[:, None] & valid
    if rule.select == Select.ALL:
        chosen = valid
    elif rule.select == Select.FORCED:
        chosen = forced
    else:
        # A NaN score is attended, so that it shows in the output as it would with dense attention.
        scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if rule.select == Select.THRESHOLD:
            chosen = forced | (scores > rule.log_threshold) & valid
        else:
            rest = valid & ~forced
            # Stable, so that equal scores go to the older page; what is not in question ranks last.
            ranked = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~rest, -torch.inf)
            order = torch.argsort(ranked, dim=2, descending=True, stable=True)
            place = torch.empty_like(order).scatter_(2, order, at.expand_as(order))
            budget = rule.budget_pages if budgets is None else budgets[:, None, None]
            room = budget - forced.sum(2, keepdim=True)
            chosen = forced | rest & (place < room)
    chosen = chosen.expand(-1, kv_heads, -1)
    frame = frame_of[pages].transpose(1, 2)  # [batch, kv_heads, max_pages]
    resident = (frame >= 0) & valid
    on_device = resident & chosen if rule.selected_only else resident
    block = (
        pages[:, None].to(torch.int32) * kv_heads
        + torch.arange(kv_heads, device=pages.device, dtype=torch.int32)[:, None]
    )
    last = at == newest[:, None]
    return Plan(
        _compact(on_device, frame, last, tail_len),
        _compact(chosen & ~resident, block, last, tail_len),
        chosen,
    )


def _compact(mask, values, last, tail_len) -> Visit:
    """Move the masked values to the front of their rows, in order."""
    order = torch.argsort((~mask).to(torch.uint8), dim=2, stable=True)
    has_tail = (mask & last).any(2)
    return Visit(
        values.expand_as(mask).gather(2, order).to(torch.int32).contiguous(),
        mask.sum(2, dtype=torch.int32),
        torch.where(has_tail, tail_len[:, None], PAGE_TOKENS).to(torch.int32),
    )


def plan_cpu(rule: Rule, scores, pages, n_pages, tail_len, frame_of, threads: int = 1, budgets=None) -> Plan:
    batch, max_pages = pages.shape
    all_pages, kv_heads = frame_of.shape
    shape = (batch, kv_heads)
    visits = [
        Visit(
            torch.empty((*shape, max_pages), dtype=torch.int32),
            torch.empty(shape, dtype=torch.int32),
            torch.empty(shape, dtype=torch.int32),
        )
        for _ in range(2)
    ]
    chosen = torch.empty((*shape, max_pages), dtype=torch.bool)
    worker_pool(threads).plan(
        select=int(rule.select),
        sink_pages=rule.sink_pages,
        window_pages=rule.window_pages,
        budget_pages=rule.budget_pages,
        budgets=0 if budgets is None else address(budgets, torch.int32, (batch,), "budgets"),
        log_threshold=rule.log_threshold,
        selected_only=rule.selected_only,
        scores=0 if scores is None else address(scores, torch.float32, (*shape, max_pages), "scores"),
        pages=address(pages, torch.int64, (batch, max_pages), "pages"),
        n_pages=address(n_pages, torch.int32, (batch,), "n_pages"),
        tail_len=address(tail_len, torch.int32, (batch,), "tail_len"),
        frame_of=address(frame_of, torch.int32, (all_pages, kv_heads), "frame_of"),
        outputs=[t.data_ptr() for visit in visits for t in (visit.blocks, visit.count, visit.last_len)],
        chosen=chosen.data_ptr(),
        batch=batch,
        kv_heads=kv_heads,
        max_pages=max_pages,
        all_pages=all_pages,
    )
    return Plan(*visits, chosen)
