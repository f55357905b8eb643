"""Scores, selection, recorder and lists of a decode step, one program for each (request, KV head).

The same selection as `rheoserve_sgl.ops.plan.plan_torch`. The visit list and the query go to pinned memory; the program
that ends last rings the CPU's bell, if there is anything to visit. The resident list is made here only where it depends
on the selection; see `listing.py`.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.residency import ARRIVING
from rheoserve_sgl.ops.gpu.ask import ring
from rheoserve_sgl.ops.gpu.early import early, start
from rheoserve_sgl.ops.gpu.listing import Listing, blocks_of, length_of_last, list_resident, with_arrived
from rheoserve_sgl.ops.gpu.move import BESIDE
from rheoserve_sgl.ops.gpu.score import PAGES
from rheoserve_sgl.ops.gpu.tables import warps_of, width_of
from rheoserve_sgl.ops.plan import Rule, Select

QUERIES = 16  # query heads to a KV head, at most
FIRST, HALF_OCTAVE = 0x3D7FFFFF, 1 << 22  # -64 as `ordered` has it, and from there half octaves up: log-softmaxes
DIGITS = 16  # marks of a round of the search
MOST_PAGES = 1 << 16  # of a request: places in both lists are counted in one number


@triton.jit
def ordered(x):
    """uint32 that are ordered as the float32 are; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | (-2147483648))
    return tl.where(x != x, -1, bits).to(tl.uint32, bitcast=True)


@triton.jit
def scores(
    logits, tile_max, tile_sum, pair, heads, count, at, max_pages, tiles,
    TILES: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The best log-softmax over the query heads, for each page of `at`; -inf beyond count."""
    # All heads at once: one after another would wait for memory and for a reduction each.
    head = tl.arange(0, HEADS)
    row = (pair * heads + head).to(tl.int64)[:, None]
    tile = tl.arange(0, TILES)[None, :]
    there = (head < heads)[:, None] & (tile * PAGES < count)
    tops = tl.load(tile_max + row * tiles + tile, mask=there, other=float("-inf"))
    sums = tl.load(tile_sum + row * tiles + tile, mask=there, other=0.0)
    top = tl.max(tops, 1)
    lse = top + tl.log(tl.sum(tl.where(there, sums * tl.exp(tops - top[:, None]), 0.0), 1))
    used = (head < heads)[:, None] & (at < count)[None, :]
    own = tl.load(logits + row * max_pages + at[None, :], mask=used, other=float("-inf"))
    own = tl.where(used, own - lse[:, None], float("-inf"))
    broken = tl.max((own != own).to(tl.int32), 0) > 0
    return tl.where(broken, float("nan"), tl.max(tl.where(own != own, float("-inf"), own), 0))


@triton.jit
def best(key, open_, room, first, STEP: tl.constexpr, DIGITS: tl.constexpr):
    """The `room` largest of the open ones, or all; of equal ones the first.

    Args:
        key: see `ordered`
        first, STEP: marks of the first round; values that lie within them are told apart in fewer rounds
        DIGITS: marks of a round
    """
    key = tl.where(open_, key, 0)  # less than any float's
    # The largest bound that at least `room` keys reach, or a lower one that just as many reach. Each round divides what
    # lies between two marks of the one before.
    digit = tl.arange(0, DIGITS).to(tl.uint32)
    bound = tl.zeros([], tl.uint32)
    step = tl.full([], STEP, tl.uint32)
    marks = tl.where(digit == 0, 0, first + (digit - 1) * STEP).to(tl.uint32)
    got = tl.full([], 0, tl.int32)
    rounds = 0
    while (step > 0) & (got != room):
        reach = tl.sum((key[:, None] >= marks[None, :]).to(tl.int32), 0)
        # The last digit whose mark enough keys reach, and how many do, in one reduction. (Marks may run over.)
        enough = (reach >= room) & (marks >= bound)
        found = tl.max(tl.where(enough, (digit.to(tl.int32) << 24) | reach, 0), 0)
        last = (found >> 24).to(tl.uint32)
        got = found & 0xFFFFFF
        width = step
        if rounds == 0:
            bound = tl.where(last == 0, 0, first + (last - 1) * STEP).to(tl.uint32)
            width = tl.where(last == 0, first, tl.where(last == DIGITS - 1, 0 - bound, STEP)).to(tl.uint32)
        else:
            bound += last * step
        step = tl.where(width > 1, (width - 1) // DIGITS + 1, 0).to(tl.uint32)
        marks = bound + digit * step
        rounds += 1
    chosen = open_ & (key >= bound)
    if got != room:
        equal = open_ & (key == bound)
        spare = got - room
        last_equal = tl.sum(equal.to(tl.int32), 0) - spare
        chosen = chosen & ((key > bound) | (tl.cumsum(equal.to(tl.int32), 0) <= last_equal))
    return chosen


@triton.jit
def _plan(
    logits, tile_max, tile_sum, pages, n_pages, tail_len, quiet, requests, frame_of, importance, weight, budgets,
    q, q_out, frames, frame_count, frame_last, visits, visit_count, visit_last, visited, totals, came,
    next_frame_of, next_came, next_frames, next_count, next_last, next_seen,
    counter, asks, rung, bell, layers, kv_heads, heads, q_heads, max_pages, tiles, sink, window, log_threshold,
    SELECT: tl.constexpr, SELECTED_ONLY: tl.constexpr, LISTS: tl.constexpr, RECORD: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr,
    NP: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr,
    RING: tl.constexpr, ARRIVING: tl.constexpr, COPIERS: tl.constexpr, NEXT: tl.constexpr, NEXT_COPIERS: tl.constexpr,
    FIRST: tl.constexpr, STEP: tl.constexpr, DIGITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # What neither the kernel in front nor the one before that writes is read while they run.
    pair = tl.program_id(0)
    row = pair // kv_heads
    head = pair % kv_heads
    count = tl.load(n_pages + row)
    said = tl.load(visited + pair)  # many barriers before it is written
    selects = tl.load(quiet + row) == 0
    tail = tl.load(tail_len + row)
    at = tl.arange(0, NP)
    valid = at < count
    block, newest = blocks_of(pages, row, head, kv_heads, count, max_pages, NP)
    frame = tl.load(frame_of + block, mask=valid, other=-1)
    newest_frame = tl.load(frame_of + newest)
    if COPIERS > 0:
        # (An atomic gives all threads one number, while the copying kernel counts on.)
        seen = tl.atomic_add(came, 0, sem="acquire") if LISTS else tl.load(came + pair)
        frame = with_arrived(frame, seen, ARRIVING, COPIERS)
        newest_frame = with_arrived(newest_frame, seen, ARRIVING, COPIERS)
    start(EARLY)
    forced = valid & ((at < sink) | (at >= count - 1 - window))
    n_forced = tl.minimum(count, sink + 1 + window)
    score = tl.zeros([NP], tl.float32)
    if RECORD:
        if selects:
            score = scores(logits, tile_max, tile_sum, pair, heads, count, at, max_pages, tiles, TILES, PAGES, HEADS)
    chosen, n_chosen = valid, count
    if SELECT == 1:
        chosen, n_chosen = forced, n_forced
    elif SELECT == 2:
        budget = tl.load(budgets + row)
        n_chosen = tl.minimum(count, tl.maximum(budget, n_forced))  # of a quiet request it would be so many
        if selects & (budget < count):
            chosen = forced
            if budget > n_forced:
                chosen = forced | best(ordered(score), valid & (forced == 0), budget - n_forced, FIRST, STEP, DIGITS)
    elif SELECT == 3:
        n_chosen = n_forced  # of a quiet request nobody knows, but that these are selected
        if selects:
            chosen = forced | (valid & ((score > log_threshold) | (score != score)))
            n_chosen = tl.sum(chosen.to(tl.int32), 0)
    resident = valid & (frame >= 0)
    outside = chosen & (frame < 0)
    if SELECTED_ONLY:
        resident = resident & chosen
    list_at = pair.to(tl.int64) * max_pages
    # Both lists at once: the one's places in 16 bits, the other's in the others.
    listed = resident.to(tl.uint32) + (outside.to(tl.uint32) << 16)
    place = tl.cumsum(listed, 0)
    if LISTS:
        tl.store(frames + list_at + (place & 0xFFFF).to(tl.int32) - 1, frame, mask=resident)
    tl.store(visits + list_at + (place >> 16).to(tl.int32) - 1, block.to(tl.int32), mask=outside)
    length = tl.sum(listed, 0)
    on_device, on_host = (length & 0xFFFF).to(tl.int32), (length >> 16).to(tl.int32)
    if LISTS:  # The newest page is always chosen.
        tl.store(frame_count + pair, on_device)
        tl.store(frame_last + pair, length_of_last(count, newest_frame, tail, TOKENS))
    # Pinned memory is far away: nothing is written where nothing was.
    says = (on_host > 0) | (said > 0)
    tl.store(visit_count + pair, on_host, mask=says)
    tl.store(visited + pair, on_host)
    tl.store(visit_last + pair, tl.where((count > 0) & (newest_frame < 0), tail, TOKENS), mask=says)
    if on_host > 0:
        query = tl.arange(0, QUERIES)
        dim = tl.arange(0, WIDE)
        used = (query < q_heads)[:, None] & (dim < DIM)[None, :]
        where = (pair * q_heads + query)[:, None] * DIM + dim[None, :]
        tl.store(q_out + where, tl.load(q + where, mask=used, other=0.0).to(tl.float32), mask=used)
    if RING:
        ring(on_host > 0, counter, asks, rung, bell, layers)
    own = totals + tl.load(requests + row) * 3
    tl.atomic_add(own, on_device.to(tl.int64), sem="relaxed")
    tl.atomic_add(own + 1, on_host.to(tl.int64), sem="relaxed")
    tl.atomic_add(own + 2, n_chosen.to(tl.int64), sem="relaxed")
    if RECORD:
        if selects:
            gain = tl.where(score == score, tl.exp(score), 0.0)
            if SELECT >= 2:
                gain += chosen.to(tl.float32)
            tl.atomic_add(importance + block, gain * tl.load(weight), mask=valid, sem="relaxed")
    if NEXT:
        list_resident(
            pair, block, newest, count, tail, max_pages, next_frame_of, next_came, next_frames, next_count, next_last,
            next_seen, NP, TOKENS, ARRIVING, NEXT_COPIERS,
        )  # fmt: skip


def plan_gpu(
    rule: Rule, q, tables, scratch, frame_of, importance, weight, budgets, exchange, device, visited, totals,
    asker=None, arrived=None, following: Listing | None = None,
):  # fmt: skip
    """Select, record, fill the lists, and ask the CPU.

    The kernel launched right before must not write to tables, frame_of, visited or arrived: they are read while it
    runs.

    Args:
        rule: Rule; its budget is in `budgets`
        q: `[batch, kv_heads, group, head_dim]`, any float dtype
        tables: Tables
        scratch: what `score_tiles` filled; None where the rule needs no scores and nothing is recorded
        frame_of: `[all_pages, kv_heads]` int32
        importance: `[all_pages, kv_heads]` float32; each page's gets weight * (exp(score), and 1 where scores
            select it) more, but for quiet requests
        weight: `[1]` float32
        budgets: `[batch]` int32, pages that a KV head may select
        exchange: Exchange, pinned: gets the visit lists, and the queries of those with any
        device: Visit, gets the resident lists; None: they have been made before, of all that is resident
        visited: `[batch, kv_heads]` int32 on the device, gets the lengths of the visit lists; holds what the exchange's
            lists have had since the last call
        totals: `[slots, 3]` int64, of each row of req_to_token: gets the blocks listed for the device, for the CPU, and
            selected
        asker: Asker; None: the CPU is not asked. Every call is a question with a number; those of nothing are passed
            over, but for a step's last, with which the CPU may go to sleep
        arrived: `[1]` int32, how many of the programs that copy beside the step are done with this layer; without
            `device`, `[batch, kv_heads]`, how many were when each list was made; None: nothing is copied
        following: Listing of another layer, the lists of which are made besides, of the same tables
    """
    if device is None and rule.selected_only:
        raise ValueError("the resident lists of a rule with selected_only are made from its selection")
    batch, kv_heads, group, dim = q.shape
    max_pages = tables.pages.shape[1]
    tiles = triton.cdiv(max_pages, PAGES)
    width = width_of(max_pages)
    lists = (q, q, q) if device is None else (device.blocks, device.count, device.last_len)
    others = (q,) * 6 if following is None else (following.frame_of, *following.outputs)
    bell = (asker.counter, asker.asks, asker.rung, asker.asked, asker.layers) if asker else (*[totals] * 4, 1)
    record = scratch is not None
    logits, tile_max, tile_sum = (scratch.logits, scratch.tile_max, scratch.tile_sum) if record else (q, q, q)
    heads = logits.shape[2] if record else 1
    _plan[(batch * kv_heads,)](
        logits, tile_max, tile_sum, tables.pages, tables.n_pages, tables.tail_len, tables.quiet, tables.requests,
        frame_of, importance, weight, budgets, q, exchange.q, *lists,
        exchange.visit.blocks, exchange.visit.count, exchange.visit.last_len, visited, totals,
        totals if arrived is None else arrived, *others, *bell, kv_heads, heads, group, max_pages, tiles,
        rule.sink_pages, rule.window_pages, rule.log_threshold,
        SELECT=int(rule.select), SELECTED_ONLY=rule.selected_only, LISTS=device is not None, RECORD=record,
        DIM=dim, WIDE=triton.next_power_of_2(dim), TILES=max(triton.next_power_of_2(tiles), 1), PAGES=PAGES,
        HEADS=triton.next_power_of_2(heads), NP=width, QUERIES=QUERIES, TOKENS=PAGE_TOKENS, RING=asker is not None,
        ARRIVING=ARRIVING, COPIERS=0 if arrived is None else BESIDE,
        NEXT=following is not None, NEXT_COPIERS=following.copiers if following else 0,
        FIRST=FIRST, STEP=HALF_OCTAVE, DIGITS=DIGITS, num_warps=warps_of(width), **early(q.device),
    )  # fmt: skip


assert list(Select) == [0, 1, 2, 3]  # SELECT in _plan
