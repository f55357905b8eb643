"""Scores, selection, recorder and both lists of a decode step, one program for each (request, KV head).

The same selection as `rheoserve_sgl.ops.plan.plan_torch`. The visit list and the query go to pinned memory; the
program that ends last rings the CPU's bell, if there is anything to visit.
"""

import triton
import triton.language as tl

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.residency import ARRIVING
from rheoserve_sgl.ops.gpu.ask import store_release
from rheoserve_sgl.ops.gpu.move import BESIDE
from rheoserve_sgl.ops.gpu.score import PAGES
from rheoserve_sgl.ops.plan import Rule, Select

QUERIES = 16  # query heads to a KV head, at most


@triton.jit
def _ordered(x):
    """uint32 that are ordered as the float32 are; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | (-2147483648))
    return tl.where(x != x, -1, bits).to(tl.uint32, bitcast=True)


@triton.jit
def _scores(
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
def _best(key, open_, room):
    """The `room` largest of the open ones; of equal ones the first."""
    # The largest bound that at least `room` keys reach, four bits of it at a time.
    digit = tl.arange(0, 16).to(tl.uint32)
    bound = tl.zeros([], tl.uint32)
    for place in tl.static_range(7, -1, -1):
        marks = bound + (digit << (4 * place))
        reach = tl.sum((open_[:, None] & (key[:, None] >= marks[None, :])).to(tl.int32), 0)
        bound = tl.max(tl.where(reach >= room, marks, bound), 0)
    above = open_ & (key > bound)
    equal = open_ & (key == bound)
    left = room - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


@triton.jit
def _ring(counter, arrived, rung, bell, layers, asks, says):
    """Count a program as ended; the last one numbers the question, and rings if any program asks, or a step ends."""
    tl.debug_barrier()  # all of this program's threads have written
    ended = 1 + (asks.to(tl.int64) << 32)
    if says:
        before = tl.atomic_add(arrived, ended, sem="acq_rel", scope="sys")
    else:
        before = tl.atomic_add(arrived, ended, sem="relaxed")
    if (before & 0x7FFFFFFF) == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        # An atomic gives all threads one number; loading and storing it would not.
        number = tl.atomic_add(counter, 1, sem="relaxed") + 1
        asked = ((before + ended) >> 32) > 0
        tl.store(rung, tl.where(asked, number, 0))
        if asked | (number % layers == 0):
            tl.atomic_add(arrived, 0, sem="acq_rel", scope="sys")  # what the other programs wrote
            store_release(bell.to(tl.int64), number)


@triton.jit
def _plan(
    logits, tile_max, tile_sum, pages, n_pages, tail_len, quiet, requests, frame_of, importance, weight, budgets,
    q, q_out, frames, frame_count, frame_last, visits, visit_count, visit_last, visited, totals, came,
    counter, arrived, rung, bell, layers, kv_heads, heads, q_heads, max_pages, tiles, sink, window, log_threshold,
    SELECT: tl.constexpr, SELECTED_ONLY: tl.constexpr, RECORD: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    TILES: tl.constexpr, PAGES: tl.constexpr, HEADS: tl.constexpr, NP: tl.constexpr, QUERIES: tl.constexpr,
    TOKENS: tl.constexpr, RING: tl.constexpr, ARRIVING: tl.constexpr, COPIERS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = pair // kv_heads
    head = pair % kv_heads
    count = tl.load(n_pages + row)
    said = tl.load(visited + pair)  # here, many barriers before it is written
    at = tl.arange(0, NP)
    valid = at < count
    forced = valid & ((at < sink) | (at >= count - 1 - window))
    page = tl.load(pages + row * max_pages + at, mask=valid, other=0).to(tl.int64)
    block = page * kv_heads + head
    selects = tl.load(quiet + row) == 0
    best = tl.zeros([NP], tl.float32)
    if RECORD:
        if selects:
            best = _scores(logits, tile_max, tile_sum, pair, heads, count, at, max_pages, tiles, TILES, PAGES, HEADS)
    if SELECT == 0:
        chosen = valid
    elif SELECT == 1:
        chosen = forced
    elif SELECT == 2:
        room = tl.load(budgets + row) - tl.sum(forced.to(tl.int32), 0)
        rest = valid & (forced == 0)
        chosen = forced
        if selects & (room > 0):
            chosen = forced | _best(_ordered(best), rest, room)
    else:
        chosen = forced | (valid & ((best > log_threshold) | (best != best)))
    if SELECT >= 2:
        chosen = tl.where(selects, chosen, valid)
    if RECORD:
        gain = tl.where(best == best, tl.exp(best), 0.0)
        if SELECT >= 2:
            gain += chosen.to(tl.float32)
        tl.atomic_add(importance + block, gain * tl.load(weight), mask=valid & selects, sem="relaxed")
    frame = tl.load(frame_of + block, mask=valid, other=-1)
    if COPIERS > 0:
        # What has come to this layer meanwhile is in its frame; the next kernel reads it.
        here = tl.load(came, volatile=True) >= COPIERS
        frame = tl.where((frame <= ARRIVING) & here, ARRIVING - frame, frame)
    resident = valid & (frame >= 0)
    outside = chosen & (frame < 0)
    if SELECTED_ONLY:
        resident = resident & chosen
    tail = tl.load(tail_len + row)
    list_at = pair.to(tl.int64) * max_pages
    place = tl.cumsum(resident.to(tl.int32), 0) - 1
    tl.store(frames + list_at + place, frame, mask=resident)
    on_device = tl.sum(resident.to(tl.int32), 0)
    tl.store(frame_count + pair, on_device)
    has_tail = tl.sum((resident & (at == count - 1)).to(tl.int32), 0) > 0
    tl.store(frame_last + pair, tl.where(has_tail, tail, TOKENS))
    place = tl.cumsum(outside.to(tl.int32), 0) - 1
    tl.store(visits + list_at + place, block.to(tl.int32), mask=outside)
    on_host = tl.sum(outside.to(tl.int32), 0)
    # What is written to pinned memory must arrive before the bell rings, which takes time: none where none was.
    says = (on_host > 0) | (said > 0)
    tl.store(visit_count + pair, on_host, mask=says)
    tl.store(visited + pair, on_host)
    has_tail = tl.sum((outside & (at == count - 1)).to(tl.int32), 0) > 0
    tl.store(visit_last + pair, tl.where(has_tail, tail, TOKENS), mask=says)
    own = totals + tl.load(requests + row) * 3
    tl.atomic_add(own, on_device.to(tl.int64), sem="relaxed")
    tl.atomic_add(own + 1, on_host.to(tl.int64), sem="relaxed")
    tl.atomic_add(own + 2, tl.sum(chosen.to(tl.int64), 0), sem="relaxed")
    if on_host > 0:
        query = tl.arange(0, QUERIES)
        dim = tl.arange(0, WIDE)
        used = (query < q_heads)[:, None] & (dim < DIM)[None, :]
        where = (pair * q_heads + query)[:, None] * DIM + dim[None, :]
        tl.store(q_out + where, tl.load(q + where, mask=used, other=0.0).to(tl.float32), mask=used)
    if RING:
        _ring(counter, arrived, rung, bell, layers, on_host > 0, says)


def plan_gpu(
    rule: Rule, q, tables, scratch, frame_of, importance, weight, budgets, exchange, device, visited, totals,
    asker=None, arrived=None,
):  # fmt: skip
    """Select, record, fill both lists, and ask the CPU.

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
        device: Visit, gets the resident lists
        visited: `[batch, kv_heads]` int32 on the device, gets the lengths of the visit lists; holds what the exchange's
            lists have had since the last call
        totals: `[slots, 3]` int64, of each row of req_to_token: gets the blocks listed for the device, for the CPU, and
            selected
        asker: Asker; None: the CPU is not asked. Every call is a question with a number; those of nothing are passed
            over, but for a step's last, with which the CPU may go to sleep
        arrived: `[1]` int32, how many of the programs that copy beside the step are done with this layer; None: nothing
            is copied
    """
    batch, kv_heads, group, dim = q.shape
    max_pages = tables.pages.shape[1]
    tiles = triton.cdiv(max_pages, PAGES)
    width = max(triton.next_power_of_2(max_pages), 16)
    record = scratch is not None
    logits, tile_max, tile_sum = (scratch.logits, scratch.tile_max, scratch.tile_sum) if record else (q, q, q)
    heads = logits.shape[2] if record else 1
    bell = (asker.counter, asker.arrived, asker.rung, asker.asked, asker.layers) if asker else (*[totals] * 4, 1)
    _plan[(batch * kv_heads,)](
        logits, tile_max, tile_sum, tables.pages, tables.n_pages, tables.tail_len, tables.quiet, tables.requests,
        frame_of, importance, weight, budgets, q, exchange.q, device.blocks, device.count, device.last_len,
        exchange.visit.blocks, exchange.visit.count, exchange.visit.last_len, visited, totals,
        totals if arrived is None else arrived, *bell,
        kv_heads, heads, group, max_pages, tiles,
        rule.sink_pages, rule.window_pages, rule.log_threshold,
        SELECT=int(rule.select), SELECTED_ONLY=rule.selected_only, RECORD=record,
        DIM=dim, WIDE=triton.next_power_of_2(dim), TILES=max(triton.next_power_of_2(tiles), 1), PAGES=PAGES,
        HEADS=triton.next_power_of_2(heads), NP=width, QUERIES=QUERIES, TOKENS=PAGE_TOKENS, RING=asker is not None,
        ARRIVING=ARRIVING, COPIERS=0 if arrived is None else BESIDE,
        num_warps=min(max(width // 128, 4), 16),
    )  # fmt: skip


assert list(Select) == [0, 1, 2, 3]  # SELECT in _plan
