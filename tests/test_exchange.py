"""The exchange policy: shares, ranking and what is wanted."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import LAYERS, make_pool

from rheoserve_sgl.coordinator import coordinator
from rheoserve_sgl.coordinator.exchange import equal_shares, layers_at_once, rank_blocks, wanted_blocks
from rheoserve_sgl.runtime.batch import Batch


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_shares_are_equal_and_use_what_there_is(pages, capacity):
    shares = equal_shares(torch.tensor(pages, dtype=torch.int32), capacity).tolist()
    assert all(0 <= share <= need for share, need in zip(shares, pages, strict=True))
    assert sum(shares) <= capacity
    cut = [share for share, need in zip(shares, pages, strict=True) if share < need]
    if cut:
        assert len(set(cut)) == 1  # all who are cut are cut alike
        assert all(share <= cut[0] for share in shares)  # and nobody has more
        assert capacity - sum(shares) < len(cut)  # and nothing to speak of is left
    else:
        assert shares == pages


def test_wanted_are_forced_blocks_then_the_most_important():
    importance = torch.rand(2, 10, 3)
    pages = torch.arange(1, 9).view(1, 8)
    valid = torch.ones(1, 8, dtype=torch.bool)
    forced = torch.tensor([[1, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    worth = rank_blocks(
        importance,
        torch.zeros(2, 10, 3, dtype=torch.bool),
        pages,
        valid,
        forced,
        ranks_by="importance",
        forced_only=False,
    )
    wanted = wanted_blocks(worth, pages, torch.tensor([5]), 10, 9)
    assert bool(wanted[:, [1, 7, 8]].all())
    assert not wanted[:, [0, 9]].any()
    assert (wanted.sum(1) == 5).all()
    middle = importance[:, 2:7]
    expected = torch.zeros_like(middle, dtype=torch.bool).scatter_(1, middle.topk(2, dim=1).indices, True)
    assert torch.equal(wanted[:, 2:7], expected)


def test_only_forced_blocks_in_window_and_retrieval():
    pages, valid = torch.tensor([[3, 4, 5, 0]]), torch.tensor([[True, True, True, False]])
    forced = torch.tensor([[True, False, True, False]])
    worth = rank_blocks(
        torch.rand(1, 6, 1),
        torch.zeros(1, 6, 1, dtype=torch.bool),
        pages,
        valid,
        forced,
        ranks_by="recency",
        forced_only=True,
    )
    wanted = wanted_blocks(worth, pages, torch.tensor([3]), 6, 9)
    assert wanted[0, :, 0].tolist() == [False, False, False, True, False, True]


def test_a_resident_block_is_not_evicted_for_an_equal_one():
    importance = torch.full((1, 4, 1), 0.5)
    resident = torch.tensor([False, False, True, False]).view(1, 4, 1)
    worth = rank_blocks(
        importance,
        resident,
        torch.tensor([[1, 2, 3]]),
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, 3, dtype=torch.bool),
        ranks_by="importance",
        forced_only=False,
    )
    wanted = wanted_blocks(worth, torch.tensor([[1, 2, 3]]), torch.tensor([1]), 4, 9)
    assert wanted[0, :, 0].tolist() == [False, False, True, False]


def test_heads_that_share_frames_have_as_many_as_they_need():
    worth = torch.tensor([[9.0, 2.0, 1.0, 0.0], [9.0, 5.0, 4.0, 3.0]])[None, None]
    pages, two = torch.tensor([[1, 2, 3, 4]]), torch.tensor([2])
    wanted = wanted_blocks(worth, pages, two, 5, 9)[0]
    assert [torch.nonzero(wanted[:, head])[:, 0].tolist() for head in (0, 1)] == [[1, 2], [1, 2]]
    wanted = wanted_blocks(worth, pages, two, 5, 9, joint=True)[0]
    assert [torch.nonzero(wanted[:, head])[:, 0].tolist() for head in (0, 1)] == [[1], [1, 2, 3]]
    worth[..., 1:] = -torch.inf  # must not have a frame
    assert int(wanted_blocks(worth, pages, two, 5, 9, joint=True).sum()) == 2


def test_no_share_wants_nothing():
    worth = torch.rand(2, 1, 1, 3)
    assert not wanted_blocks(worth, torch.tensor([[1, 2, 3]]), torch.tensor([0]), 4, 0).any()


def test_what_hardly_matters_fills_free_frames_but_evicts_nothing():
    importance = torch.tensor([0.0, 0.3, 0.2, 0.4, 0.9, 0.0]).view(1, 6, 1)
    resident = torch.tensor([False, False, True, False, False, True]).view(1, 6, 1)
    where = torch.arange(1, 6)[None], *(torch.full((1, 5), value) for value in (True, False))

    def wanted(share: int, least: float):
        options = {"ranks_by": "importance", "forced_only": False, "least": least}
        worth = rank_blocks(importance, resident, *where, **options)
        return torch.nonzero(wanted_blocks(worth, where[0], torch.tensor([share]), 6, 9)[0, :, 0])[:, 0].tolist()

    assert wanted(2, 0.0) == [3, 4]  # by importance alone
    assert wanted(2, 0.5) == [2, 4]  # 4 matters and comes for 5, which matters least; 3 does not come for 2
    assert wanted(4, 0.5) == [2, 3, 4, 5]  # 3 has a free frame


def test_a_layer_at_a_time_wants_the_same(monkeypatch):
    """As where one request of a million tokens decodes beside forty short ones."""
    pool, _ = make_pool(64 * 40, 64 * 12)
    pool.importance.uniform_()
    table = torch.arange(64, 64 * 33, dtype=torch.int32).view(1, -1).repeat(2, 1)
    table[1, : 64 * 3] += 64 * 32
    longest = 64 * 30 + 5
    batch = Batch.build(table, torch.tensor([0, 1]), torch.tensor([longest, 150]), longest, 1, 2)
    rows = batch.beside([], 1, 2)
    assert layers_at_once(rows.pages, pool.head_num, coordinator.RANKED_AT_ONCE) > LAYERS
    together = pool.coordinator._wanted(rows)
    monkeypatch.setattr(coordinator, "RANKED_AT_ONCE", 1)
    assert layers_at_once(rows.pages, pool.head_num, coordinator.RANKED_AT_ONCE) == 1
    assert together.any(2).any(1).all()
    assert torch.equal(pool.coordinator._wanted(rows), together)
