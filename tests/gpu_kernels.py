"""The Triton kernels against torch: test_triton.py runs this file, interpreted or compiled for a GPU."""

import os

import pytest
import torch
from gpu_step import moved
from test_attention import check, make_visit, oracle

from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.ops.attention import attend_torch
from rheoserve_sgl.ops.doorbell import Exchange
from rheoserve_sgl.ops.gpu.attend import SplitRoom, attend_gpu, attend_split, merge_parts
from rheoserve_sgl.ops.gpu.plan import plan_gpu
from rheoserve_sgl.ops.gpu.quiet import mark_quiet
from rheoserve_sgl.ops.gpu.score import score_tiles
from rheoserve_sgl.ops.gpu.snapshot import snapshot
from rheoserve_sgl.ops.gpu.tables import Scratch, Tables
from rheoserve_sgl.ops.merge import merge_torch
from rheoserve_sgl.ops.plan import Rule, Select, Visit, plan_torch
from rheoserve_sgl.ops.score import score_torch
from rheoserve_sgl.runtime.batch import Batch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


no_bfloat16 = pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies the bits of bf16 as integers")


def attend(q, blocks, visit: Visit, scale: float):
    there = Visit(*(t.to(DEVICE) for t in (visit.blocks, visit.count, visit.last_len)))
    result = attend_gpu(q.to(DEVICE), blocks.to(DEVICE), there, scale)
    return [part.cpu() for part in result]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=no_bfloat16)])
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 5), (128, 4), (128, 16), (256, 7)])
def test_attention_over_lists_equals_the_oracle(dtype, dim, group):
    torch.manual_seed(dim + group)
    blocks = torch.randn(30, 2, 64, dim).to(dtype)
    q = torch.randn(2, 2, group, dim).to(dtype).float()
    visit = make_visit(2, 2, (1, 9, 0, 5), 30, group)
    expected = oracle(q, blocks, visit, dim**-0.5)
    check(attend(q, blocks, visit, dim**-0.5), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("last", [1, 17, 63, 64])
def test_nothing_behind_a_tail_is_read(last):
    torch.manual_seed(last)
    blocks, q = torch.randn(6, 2, 64, 64), torch.randn(1, 1, 4, 64)
    lists = torch.tensor([[[3, 5]]], dtype=torch.int32)
    visit = Visit(lists, torch.tensor([[2]], dtype=torch.int32), torch.tensor([[last]], dtype=torch.int32))
    expected = oracle(q, blocks, visit, 0.125)
    blocks[5, :, last:] = torch.nan
    check(attend(q, blocks, visit, 0.125), expected)


def make_batch(lens, slots=12, context=2048, pages=200):
    """Requests of these lengths in a token table: as SGLang has it, and as a Batch."""
    lens = torch.tensor(lens)
    table = torch.zeros(slots, context, dtype=torch.int32)
    ids = torch.randperm(pages - 1)[: len(lens) * (context // 64)].view(len(lens), -1) + 1
    where = torch.arange(1, len(lens) + 1) * 2
    table[where] = (ids[:, :, None] * 64 + torch.arange(64)).view(len(lens), -1).to(torch.int32)
    return table, where, lens, Batch.build(table, where, lens, int(lens.max()), 1, 1)


def tables_of(table, where, lens, rows_more=2, max_pages=16):
    tables = Tables.make(len(lens) + rows_more, max_pages, DEVICE)
    for tensor in vars(tables).values():
        tensor.fill_(7)  # of a step before
    snapshot(table.to(DEVICE), where.to(DEVICE), lens.to(DEVICE), len(lens), tables)
    return tables


def test_a_snapshot_is_the_batch():
    table, where, lens, batch = make_batch([1, 64, 65, 1000], context=1024, pages=100)
    tables = tables_of(table, where, lens)
    width = batch.pages.shape[1]
    assert torch.equal(tables.pages[:4, :width].cpu().long(), batch.pages)
    assert not tables.pages[:4, width:].any() and not tables.n_pages[4:].any()
    assert torch.equal(tables.n_pages[:4].cpu(), batch.n_pages)
    assert torch.equal(tables.tail_len.cpu(), torch.cat((batch.tail_len, torch.zeros(2, dtype=torch.int32))))
    assert torch.equal(tables.newest[:4].cpu(), batch.newest)
    assert torch.equal(tables.requests[:4].cpu(), where)


RULES = [
    Rule(Select.ALL, 1, 1),
    Rule(Select.FORCED, 1, 1, selected_only=True),
    Rule(Select.BUDGET, 1, 1, budget_pages=5),
    Rule(Select.BUDGET, 1, 1, budget_pages=5, selected_only=True),
    Rule(Select.BUDGET, 2, 0, budget_pages=2),
    Rule(Select.THRESHOLD, 1, 1, log_threshold=-3.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.select.name}-{rule.budget_pages}-{rule.selected_only}")
@pytest.mark.parametrize(
    ("selector", "heads", "dtype", "keys"),
    [
        ("quest", 4, torch.float32, torch.float32),
        ("quest", 5, torch.float16, torch.float16),
        ("mean", 4, torch.float16, torch.float16),
        pytest.param("quest", 16, torch.bfloat16, torch.bfloat16, marks=no_bfloat16),
        ("mean", 1, torch.float32, torch.bfloat16),  # a learned gate's, of a 16-bit model
        ("mean", 7, torch.float32, torch.float32),
    ],
)
def test_score_and_plan_equal_torch(rule, selector, heads, dtype, keys):
    torch.manual_seed(heads)
    dim, kv_heads, pages, gate = 64, 2, 200, make_gate(selector)
    table, where, lens, batch = make_batch([1, 64, 700, 1000, 513], context=1024, pages=pages)
    quick = torch.randn(pages, kv_heads, gate.key_dim(dim))
    quick[batch.pages[3, 3:6], 0] = 1.0  # equal scores
    q, quick = torch.randn(len(lens) + 2, kv_heads, heads, dim).to(dtype), quick.to(keys)
    frame_of = torch.randint(-99, 99, (pages, kv_heads), dtype=torch.int32).clamp(min=-1)
    scores = score_torch(gate.query(q[:5].float()), quick.float(), batch.pages, batch.n_pages, 0.125)
    expected = plan_torch(rule, scores, batch.pages, batch.n_pages, batch.tail_len, frame_of)
    importance = torch.rand(pages, kv_heads)

    tables = tables_of(table, where, lens)
    rows, max_pages = tables.pages.shape
    scratch = Scratch.make(rows, kv_heads, heads, max_pages, DEVICE)
    for part in vars(scratch).values():
        part.fill_(torch.nan)
    exchange = Exchange.make(rows, kv_heads, heads, dim, max_pages, pin=DEVICE == "cuda")
    pairs = (rows, kv_heads)
    lists = [torch.zeros(s, dtype=torch.int32, device=DEVICE) for s in ((*pairs, max_pages), pairs, pairs)]
    device, totals = Visit(*lists), torch.zeros((20, 3), dtype=torch.int64, device=DEVICE)
    there = [t.to(DEVICE) for t in (q, quick, frame_of, importance.clone())]
    visited = torch.full(pairs, 7, dtype=torch.int32, device=DEVICE)
    weight = torch.tensor([2.0], device=DEVICE)
    budgets = torch.full((rows,), rule.budget_pages, dtype=torch.int32, device=DEVICE)
    score_tiles(there[0], there[1], tables, scratch, 0.125, "range" if selector == "quest" else "dot")
    plan_gpu(rule, there[0], tables, scratch, there[2], there[3], weight, budgets, exchange, device, visited, totals)
    if DEVICE == "cuda":
        torch.cuda.synchronize()

    assert torch.equal(visited.cpu(), exchange.visit.count)
    for got, wanted in ((device, expected.device), (exchange.visit, expected.host)):
        assert torch.equal(got.count[:5].cpu(), wanted.count)
        assert torch.equal(got.last_len[:5].cpu(), wanted.last_len)
        assert not got.count[5:].any()
        lists = (part.flatten(0, 1) for part in (got.blocks[:5].cpu(), wanted.blocks))
        for mine, theirs, count in zip(*lists, wanted.count.flatten(), strict=True):
            assert torch.equal(mine[:count], theirs[:count])
    counted = (expected.device.count.sum(1), expected.host.count.sum(1), expected.chosen.sum((1, 2)))
    assert torch.equal(totals[where].cpu(), torch.stack(counted, 1)) and totals.sum() == sum(map(torch.sum, counted))
    visited = exchange.visit.count > 0
    assert torch.equal(exchange.q[visited], q[visited].float()) and not exchange.q[~visited].any()
    for row in range(5):
        ids = batch.pages[row, : batch.n_pages[row]]
        gained = importance[ids] + 2.0 * scores[row, :, : len(ids)].exp().T
        if rule.needs_scores:
            gained += 2.0 * expected.chosen[row, :, : len(ids)].T
        torch.testing.assert_close(there[3].cpu()[ids], gained, rtol=1e-4, atol=1e-5)


def test_requests_that_are_all_resident_are_quiet_but_for_every_eighth_step():
    layers, heads, pages = 3, 2, 100
    table, where, lens, batch = make_batch([700, 513, 1000, 1024], context=1024, pages=pages)
    tables = tables_of(table, where, lens)
    assert not tables.quiet.any()
    frame_of = torch.arange(layers * pages * heads, dtype=torch.int32).view(layers, pages, heads)
    frame_of[2, batch.pages[1, 8], 1] = -1  # of its newest page
    frame_of[0, batch.pages[0, 11]] = -1  # beyond its end
    frame_of = frame_of.to(DEVICE)
    mark_quiet(frame_of, tables)
    assert tables.quiet.tolist() == [1, 0, 0, 0, 0, 0]  # 1000 and 1024 are multiples of 8, the last two are padding

    rule = Rule(Select.BUDGET, 1, 1, budget_pages=3)
    scratch = Scratch.make(6, heads, 1, 16, DEVICE)
    for part in vars(scratch).values():
        part.fill_(torch.nan)
    exchange = Exchange.make(6, heads, 1, 64, 16, pin=DEVICE == "cuda")
    device = Visit(
        *(torch.zeros(s, dtype=torch.int32, device=DEVICE) for s in ((6, heads, 16), (6, heads), (6, heads)))
    )
    q, quick = torch.randn(6, heads, 1, 64).to(DEVICE), torch.randn(pages, heads, 64).to(DEVICE)
    importance, weight = torch.zeros(pages, heads, device=DEVICE), torch.ones(1, device=DEVICE)
    budgets = torch.full((6,), 3, dtype=torch.int32, device=DEVICE)
    totals, visited = torch.zeros((20, 3), dtype=torch.int64, device=DEVICE), torch.zeros_like(device.count)
    score_tiles(q, quick, tables, scratch, 0.125, "dot")
    frame_of[1, batch.pages[0, 3], 0] = -1  # a swap took it since
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # the plan reads it while the kernel in front runs
    plan_gpu(rule, q, tables, scratch, frame_of[1], importance, weight, budgets, exchange, device, visited, totals)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert device.count[0].tolist() == [10, 11] and exchange.visit.count[0].tolist() == [1, 0]
    assert int(exchange.visit.blocks[0, 0, 0]) == int(batch.pages[0, 3]) * heads
    recorded = torch.zeros(pages, dtype=torch.bool)
    for row in (1, 2, 3):
        recorded[batch.pages[row, : batch.n_pages[row]]] = True
    assert torch.equal((importance > 0).all(1).cpu(), recorded) and torch.isfinite(importance).all()
    assert scratch.logits[0].isnan().all()
    assert totals[where[0]].tolist() == [21, 1, 2 * 3]  # selected: what it would have been


@pytest.mark.parametrize("values", [3, 400])
@pytest.mark.parametrize("budget", [4, 5, 700, 2099])
def test_the_best_of_many_pages_with_ties(budget, values):
    """Of logits that are alike the older pages win, as torch's."""
    torch.manual_seed(values)
    pages, rule = 2100, Rule(Select.BUDGET, 1, 2, budget_pages=budget)
    table, where, lens, batch = make_batch([pages * 64 - 9], slots=3, context=pages * 64, pages=pages + 1)
    quick = torch.zeros(pages + 1, 1, 16)
    quick[:, 0, 0] = torch.randint(values, (pages + 1,)).float()
    q, frame_of = torch.ones(1, 1, 1, 16), torch.full((pages + 1, 1), -1, dtype=torch.int32)
    frame_of[::3] = 5
    scores = score_torch(q[:, :, 0][:, :, None], quick, batch.pages, batch.n_pages, 0.125)
    expected = plan_torch(rule, scores, batch.pages, batch.n_pages, batch.tail_len, frame_of)
    tables = tables_of(table, where, lens, rows_more=0, max_pages=pages)
    scratch, exchange = Scratch.make(1, 1, 1, pages, DEVICE), Exchange.make(1, 1, 1, 16, pages, DEVICE == "cuda")
    device = Visit(*(torch.zeros_like(part, device=DEVICE) for part in vars(exchange.visit).values()))
    totals, budgets = torch.zeros((3, 3), dtype=torch.int64, device=DEVICE), torch.tensor([budget], device=DEVICE)
    q, quick, frame_of = q.to(DEVICE), quick.to(DEVICE), frame_of.to(DEVICE)
    kept = torch.zeros(pages + 1, 1, device=DEVICE), torch.ones(1, device=DEVICE), budgets.to(torch.int32)
    score_tiles(q, quick, tables, scratch, 0.125, "dot")
    plan_gpu(rule, q, tables, scratch, frame_of, *kept, exchange, device, torch.zeros_like(device.count), totals)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for got, wanted in ((device, expected.device), (exchange.visit, expected.host)):
        count = int(wanted.count)
        assert int(got.count) == count
        assert torch.equal(got.blocks[0, 0, :count].cpu(), wanted.blocks[0, 0, :count])
    assert int(totals[2, 2]) == int(expected.chosen.sum()) == budget


def test_selection_with_nan_and_a_budget_beyond_the_pages():
    rule = Rule(Select.BUDGET, 1, 0, budget_pages=50)
    for nan in (False, True):
        table, where, lens, batch = make_batch([700], context=1024, pages=100)
        quick = torch.randn(100, 1, 64)
        if nan:
            quick[batch.pages[0, 4]] = torch.nan
        tables = tables_of(table, where, lens, rows_more=0)
        scratch = Scratch.make(1, 1, 1, 16, DEVICE)
        exchange = Exchange.make(1, 1, 1, 64, 16, pin=DEVICE == "cuda")
        device = Visit(*(torch.zeros(s, dtype=torch.int32, device=DEVICE) for s in ((1, 1, 16), (1, 1), (1, 1))))
        q, quick = torch.randn(1, 1, 1, 64).to(DEVICE), quick.to(DEVICE)
        frame_of = torch.full((100, 1), -1, dtype=torch.int32, device=DEVICE)
        importance, weight = torch.zeros(100, 1, device=DEVICE), torch.ones(1, device=DEVICE)
        budgets = torch.tensor([3 if nan else 50], dtype=torch.int32, device=DEVICE)
        totals, visited = torch.zeros((20, 3), dtype=torch.int64, device=DEVICE), torch.zeros_like(device.count)
        score_tiles(q, quick, tables, scratch, 0.125, "dot")
        plan_gpu(rule, q, tables, scratch, frame_of, importance, weight, budgets, exchange, device, visited, totals)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        # A NaN makes every score of its query head NaN, and NaN is the largest of scores: the older pages win.
        assert int(exchange.visit.count) == (3 if nan else 11)
        expected = batch.pages[0, [0, 1, 10]] if nan else batch.pages[0, :11]
        assert exchange.visit.blocks[0, 0, : len(expected)].tolist() == expected.tolist()


def test_the_cpus_answer_is_merged_where_there_is_one():
    torch.manual_seed(6)
    blocks, q = torch.randn(30, 2, 64, 64), torch.randn(2, 2, 4, 64)
    visit = make_visit(2, 2, (1, 9, 0, 5), 30, 4)
    theirs = make_visit(2, 2, (3, 0, 2, 0), 30, 5)
    host = attend_torch(q, blocks, theirs, 0.125)
    expected = merge_torch(*attend_torch(q, blocks, visit, 0.125), *host)
    host[0][theirs.count == 0], host[1][theirs.count == 0] = torch.nan, torch.nan  # a list without blocks has no answer
    own = moved(visit, DEVICE)
    split = SplitRoom(9, 4, 64, DEVICE).split(4)
    out, lse = torch.empty(2, 2, 4, 64, device=DEVICE), torch.empty(2, 2, 4, device=DEVICE)
    attend_split(q.to(DEVICE), blocks.to(DEVICE), own, split, 0.125)
    merge_parts(own, split, out, lse, (theirs.count.to(DEVICE), *(part.to(DEVICE) for part in host)))
    torch.testing.assert_close([out.cpu(), lse.cpu()], list(expected), rtol=1e-5, atol=1e-5)


def test_room_for_parts_is_enough_for_every_batch():
    for most in (1, 3, 40, 500, 5000):
        room = SplitRoom(most, 2, 16, "cpu")
        for pairs in range(1, most + 1, max(most // 50, 1)):
            split = room.split(pairs)
            assert split.acc.shape[0] == split.lse.shape[0] == pairs and split.lse.shape[1] >= 1
            assert split.acc.data_ptr() == room.split(1).acc.data_ptr()
