"""The plan op: the C++ plan equals the torch one, and both mean what they should."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rheoserve_sgl.ops.plan import Rule, Select, plan_cpu, plan_torch

PAGES = 40


@st.composite
def cases(draw):
    batch, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n_pages = torch.tensor([draw(st.integers(1, 12)) for _ in range(batch)], dtype=torch.int32)
    width = int(n_pages.max()) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pages = torch.stack([torch.randperm(PAGES - 1, generator=generator)[:width] + 1 for _ in range(batch)])
    scores = torch.randn(batch, kv_heads, width, generator=generator)
    if draw(st.booleans()):
        scores = scores.round()  # ties
    if draw(st.booleans()):
        scores[0, 0, 0] = torch.nan
    frame_of = torch.randperm(PAGES * kv_heads, generator=generator).view(PAGES, kv_heads).to(torch.int32)
    frame_of = frame_of.masked_fill(
        torch.rand(frame_of.shape, generator=generator) < draw(st.sampled_from([0, 0.5, 1])), -1
    )
    tail_len = torch.randint(1, 65, (batch,), generator=generator, dtype=torch.int32)
    rule = Rule(
        draw(st.sampled_from(list(Select))),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 3)),
        budget_pages=draw(st.integers(0, 14)),
        log_threshold=draw(st.floats(-1, 1)),
        selected_only=draw(st.booleans()),
    )
    return rule, scores, pages, n_pages, tail_len, frame_of


@given(cases(), st.lists(st.integers(0, 2**31 - 1), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_each_request_may_have_a_budget_of_its_own(case, numbers):
    rule, scores, pages, n_pages, tail_len, frame_of = case
    budgets = torch.tensor([n if n % 3 == 0 else n % 14 for n in numbers[: len(pages)]], dtype=torch.int32)
    for run in (plan_cpu, plan_torch):
        together = run(*case, budgets=budgets)
        for b in range(len(pages)):
            alone = replace(rule, budget_pages=int(budgets[b]))
            row = slice(b, b + 1)
            single = run(alone, scores[row], pages[row], n_pages[row], tail_len[row], frame_of)
            for visit, its in ((together.device, single.device), (together.host, single.host)):
                assert [listed(visit, b, h) for h in range(frame_of.shape[1])] == [
                    listed(its, 0, h) for h in range(frame_of.shape[1])
                ]


def listed(visit, b, h):
    return visit.blocks[b, h, : visit.count[b, h]].tolist()


@given(cases())
@settings(max_examples=300, deadline=None)
def test_cpu_equals_torch(case):
    got, expected = plan_cpu(*case), plan_torch(*case)
    assert torch.equal(got.chosen, expected.chosen)
    for mine, theirs in ((got.device, expected.device), (got.host, expected.host)):
        assert torch.equal(mine.count, theirs.count)
        assert torch.equal(mine.last_len, theirs.last_len)
        for b in range(len(mine.count)):
            for h in range(mine.count.shape[1]):
                assert listed(mine, b, h) == listed(theirs, b, h)


def test_threads_change_nothing():
    torch.manual_seed(0)
    scores, pages = torch.randn(4, 8, 1000), torch.stack([torch.randperm(1000) for _ in range(4)])
    n_pages = torch.tensor([1000, 999, 500, 1], dtype=torch.int32)
    frame_of = torch.where(torch.rand(1000, 8) < 0.3, torch.arange(8000).view(1000, 8), -1).int()
    rule = Rule(Select.BUDGET, 1, 2, budget_pages=100)
    one, three = (plan_cpu(rule, scores, pages, n_pages, n_pages % 64 + 1, frame_of, threads) for threads in (1, 3))
    for mine, theirs in ((one.device, three.device), (one.host, three.host)):
        assert torch.equal(mine.count, theirs.count)
        for b, h in ((b, h) for b in range(4) for h in range(8)):
            assert listed(mine, b, h) == listed(theirs, b, h)


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_lists_are_what_they_say(case):
    rule, scores, pages, n_pages, tail_len, frame_of = case
    plan = plan_torch(*case)
    kv_heads = frame_of.shape[1]
    for b in range(len(pages)):
        n = int(n_pages[b])
        newest = int(pages[b, n - 1])
        for h in range(kv_heads):
            host_pages = [block // kv_heads for block in listed(plan.host, b, h)]
            assert all(block % kv_heads == h for block in listed(plan.host, b, h))
            frames = {int(frame_of[page, h]): int(page) for page in pages[b, :n]}
            device_pages = [frames[frame] for frame in listed(plan.device, b, h)]
            assert not set(host_pages) & set(device_pages)
            for page in host_pages:
                assert frame_of[page, h] < 0
            attended = set(host_pages) | set(device_pages)
            order = pages[b, :n].tolist()
            must = set(order[: rule.sink_pages]) | set(order[max(n - 1 - rule.window_pages, 0) :])
            assert must <= attended
            if rule.select == Select.ALL or (rule.select == Select.BUDGET and rule.budget_pages >= n):
                assert attended == set(order)
            if rule.select == Select.BUDGET and rule.selected_only:
                assert len(attended) == min(n, max(rule.budget_pages, len(must)))
            for visit, its in ((plan.device, device_pages), (plan.host, host_pages)):
                assert its == sorted(its, key=order.index)
                expected = int(tail_len[b]) if newest in its else 64
                assert int(visit.last_len[b, h]) == expected


@pytest.mark.parametrize("run", [plan_cpu, plan_torch])
def test_equal_scores_go_to_the_older_page(run):
    pages = torch.arange(1, 9).view(1, 8)
    plan = run(
        Rule(Select.BUDGET, 1, 0, budget_pages=4),
        torch.zeros(1, 1, 8),
        pages,
        torch.tensor([8], dtype=torch.int32),
        torch.tensor([5], dtype=torch.int32),
        torch.full((9, 1), -1, dtype=torch.int32),
    )
    assert listed(plan.host, 0, 0) == [1, 2, 3, 8]
    assert plan.host.last_len.tolist() == [[5]]


def test_a_page_outside_the_store_is_refused():
    with pytest.raises(IndexError, match="page 9 of request 0"):
        plan_cpu(
            Rule(Select.ALL, 1, 0),
            None,
            torch.tensor([[9]]),
            torch.tensor([1], dtype=torch.int32),
            torch.tensor([1], dtype=torch.int32),
            torch.zeros((9, 1), dtype=torch.int32),
        )
