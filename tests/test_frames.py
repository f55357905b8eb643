"""Which blocks are in frames, after a prefill and until others need them; and what a pool holds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pools import DIM, HEADS, LAYERS, SlowLane, make_pool, refresh_keys

from rheoserve_sgl.coordinator import working_set
from rheoserve_sgl.coordinator.working_set import UNKNOWN, WorkingSets
from rheoserve_sgl.runtime.batch import Batch

SLOTS, CONTEXT = 4, 64 * 8


def stored_request(pool, pages: list[int], slot: int) -> Batch:
    """A prompt of whole pages, prefilled into them."""
    at = torch.tensor(pages)
    pool.coordinator.begin_extend(at, at)
    loc = (at[:, None] * 64 + torch.arange(64)).flatten()
    for layer in range(LAYERS):
        pool.write(layer, loc, *torch.randn(2, len(loc), HEADS, DIM))
    return batch_of(pages, slot)


def batch_of(pages: list[int], slot: int) -> Batch:
    """One request of whole pages."""
    table = torch.zeros(SLOTS, CONTEXT, dtype=torch.int32)
    table[slot, : 64 * len(pages)] = (torch.tensor(pages)[:, None] * 64 + torch.arange(64)).flatten().to(torch.int32)
    return Batch.build(table, torch.tensor([slot]), torch.tensor([64 * len(pages)]), 64 * len(pages), 1, 1)


def hold(pool, pages: list[int]) -> list[int]:
    """Let the requests that have not ended hold these pages, and what is added to the list."""
    pool.coordinator.idle.held = lambda: torch.tensor(pages, dtype=torch.int64)
    return pages


def resident(pool, pages) -> list[int]:
    return [page for page in pages if bool((pool.residency.frame_of[:, page] >= 0).all())]


def test_a_prompt_is_written_to_free_frames_and_stays_there_for_the_next_turn_until_others_need_them():
    pool, _ = make_pool(64 * 20, 64 * 6, exchange_interval=1000)
    held = hold(pool, [])
    first = stored_request(pool, [1, 2, 3, 4], 0)
    assert resident(pool, range(20)) == [1, 2, 3, 4] and int(pool.moved) == 0
    for layer in range(LAYERS):
        frames = pool.frames.layers[layer][pool.residency.frame_of[layer, 1:5].long()]
        assert torch.equal(frames, pool.host.layers[layer][1:5])
    pool.coordinator.begin_decode(lambda: first)
    pool.coordinator.batch_changed()  # the radix tree keeps all of it
    second = stored_request(pool, [7, 8, 9], 1)
    assert resident(pool, range(20)) == [1, 2, 3, 7, 8, 9]
    held += [7, 8, 9]
    pool.coordinator.begin_decode(lambda: second)
    assert resident(pool, range(20)) == [1, 2, 3, 7, 8, 9]
    third = stored_request(pool, [10, 11, 12, 13, 14, 15, 16], 2)
    assert resident(pool, range(20)) == [7, 8, 9, 10, 11, 12]  # those that decode keep theirs
    held += range(10, 17)
    pool.coordinator.begin_decode(lambda: third)
    assert len(resident(pool, range(10, 17))) == 6 and not resident(pool, range(10))
    pool.coordinator.page_freed(torch.arange(10, 17))
    pool.coordinator.settle()
    assert pool.residency.used == 0


def both(tokens: int) -> Batch:
    """A request with pages 1 to 8, full, and one of so many tokens with pages 11 to 18."""
    pages = torch.stack((torch.arange(1, 9), torch.arange(11, 19)))
    table = (pages[:, :, None] * 64 + torch.arange(64)).flatten(1).int()
    return Batch.build(table, torch.arange(2), torch.tensor([512, tokens]), 512, 1, 1)


def test_what_matters_of_a_request_that_joins_soon_comes_into_frames_before_it_does():
    pool, _ = make_pool(64 * 30, 64 * 8, exchange_interval=1000, window_tokens=64)
    held = hold(pool, [])
    first = stored_request(pool, list(range(1, 9)), 0)
    held += range(1, 9)
    stored_request(pool, list(range(11, 19)), 1)  # finds no free frame
    held += range(11, 19)
    pool.importance[:, 12:14] = 1.0
    pool.coordinator.begin_decode(lambda: first)
    assert resident(pool, held) == list(range(1, 9))
    pool.coordinator.coming = lambda: [torch.arange(11, 19)]
    pool.coordinator.batch_changed()
    pool.coordinator.begin_decode(lambda: first)
    # Frames are shared as if it decoded: its first and last two pages are forced, and one of the two others matters.
    assert len(resident(pool, range(1, 9))) == 4
    assert resident(pool, range(11, 19)) in ([11, 12, 17, 18], [11, 13, 17, 18])
    moved, there = int(pool.moved), resident(pool, held)
    pool.coordinator.coming = list
    pool.coordinator.batch_changed()
    joined = both(512)
    pool.coordinator.begin_decode(lambda: joined)
    assert resident(pool, held) == there and int(pool.moved) == moved


def test_a_request_that_joins_before_its_blocks_are_seen_to_have_come_has_what_it_wrote_meanwhile():
    pool, _ = make_pool(64 * 30, 64 * 8, exchange_interval=1000, window_tokens=64)
    lane = pool.coordinator.lane = SlowLane(pool)
    held = hold(pool, [])
    first = stored_request(pool, list(range(1, 9)), 0)
    held += range(1, 9)
    stored_request(pool, list(range(11, 19)), 1)
    held += range(11, 19)
    pool.coordinator.begin_decode(lambda: first)
    lane.copy()
    pool.coordinator.coming, pool.coordinator.expecting = lambda: [torch.arange(11, 19)], True
    pool.coordinator.batch_changed()
    for _ in range(2):
        pool.coordinator.begin_decode(lambda: first)
        if lane.busy:
            break
    lane.copy()
    lane.unseen = True
    joined = both(510)
    pool.coordinator.coming, pool.coordinator.expecting = list, False
    pool.coordinator.begin_decode(lambda: joined)
    assert lane.busy
    where = torch.tensor([18 * 64 + 61])  # its 510th token
    for layer in range(LAYERS):
        pool.write(layer, where, *torch.randn(2, 1, HEADS, DIM))
    lane.unseen = False
    pool.coordinator.begin_decode(lambda: joined)
    frame_of = pool.residency.frame_of[:, 18]
    assert (frame_of >= 0).all()
    for layer in range(LAYERS):
        assert torch.equal(pool.frames.layers[layer][frame_of[layer].long()], pool.host.layers[layer][18])


@given(own=st.lists(st.integers(1, 9), min_size=1, max_size=3), others=st.lists(st.integers(1, 9), max_size=3))
def test_rows_beside_a_batch_are_those_of_a_larger_batch(own, others):
    lens = torch.tensor([*own, *others]) * 64 - 5
    table = (torch.randperm(20)[: len(lens)] + 1)[:, None] * 1024 + torch.arange(64 * 9)
    whole, part = (
        Batch.build(table.int(), torch.arange(n), lens[:n], int(lens[:n].max()), 1, 2) for n in (len(lens), len(own))
    )
    pages = [row[:count].clone() for row, count in zip(whole.pages[len(own) :], others, strict=True)]
    rows = part.beside(pages, 1, 2)
    for name in ("pages", "n_pages", "valid", "forced"):
        assert torch.equal(getattr(rows, name), getattr(whole, name)), name


def test_what_was_used_last_keeps_its_frames_longest_and_the_first_of_those_that_wait():
    pool, _ = make_pool(64 * 20, 64 * 8, exchange_interval=1000)
    held = hold(pool, [])
    chats = [stored_request(pool, pages, 0) for pages in ([9, 10, 11], [5, 6], [1, 2, 3])]
    for chat in chats:
        pool.coordinator.batch_changed()
        pool.coordinator.begin_decode(lambda chat=chat: chat)
    assert resident(pool, range(20)) == [1, 2, 3, 5, 6, 9, 10, 11]
    pool.coordinator.batch_changed()
    stored_request(pool, [12, 13], 1)
    assert resident(pool, range(20)) == [1, 2, 3, 5, 6, 9, 12, 13]  # the end of the oldest makes room
    held += [12, 13]
    stored_request(pool, [14], 2)
    assert resident(pool, range(20)) == [1, 2, 3, 5, 6, 12, 13, 14]
    held += [14, 1, 2, 3]
    pool.coordinator.begin_decode(lambda: chats[2])
    assert resident(pool, range(20)) == [1, 2, 3, 5, 6, 12, 13, 14]
    stored_request(pool, [15, 16, 17], 3)
    assert resident(pool, range(20)) == [1, 2, 3, 12, 13, 14, 15, 16]  # none of those that wait gives its own
    held += [15, 16, 17]
    pool.coordinator.batch_changed()
    pool.coordinator.begin_decode(lambda: batch_of([1, 2, 3, 4, 18, 19], 0))
    assert resident(pool, range(20)) == [1, 2, 3, 4, 12, 13, 18, 19]  # 14 and after it 15 decode later


@pytest.mark.parametrize("mode", ["window", "retrieval"])
def test_where_only_a_window_may_be_resident_a_prompt_gets_no_frames(mode):
    pool, _ = make_pool(64 * 20, 64 * 6, mode=mode)
    stored_request(pool, [1, 2, 3, 4], 0)
    assert pool.residency.used == 0


@pytest.mark.parametrize("length", [65, 64, 64 * 3 + 1, 64 * 7 + 1])
def test_a_new_page_gets_frames_where_all_fit(length):
    """Without waiting for the next exchange, and without another block giving its own."""
    pool, _ = make_pool(64 * 20, 64 * 6, exchange_interval=1000)
    table = torch.arange(64, 64 * 20, dtype=torch.int32)[None]
    slot, lens = torch.tensor([0]), torch.tensor([length - 1])
    pool.coordinator.begin_decode(lambda: Batch.build(table, slot, lens, length - 1, 1, 1), lens)
    before = pool.residency.used
    lens = torch.tensor([length])
    pool.coordinator.begin_decode(lambda: Batch.build(table, slot, lens, length, 1, 1), lens)
    fits = -(-length // 64) <= 6
    assert pool.residency.used == before + (LAYERS * HEADS if length % 64 == 1 and fits else 0)


@pytest.mark.parametrize(("frames", "exchanges"), [(6, 2), (2, 11)])
def test_exchanges_end_where_all_fit(frames, exchanges):
    """One to begin with and one for the page that starts; with too few frames one every fourth step, as well."""
    pool, _ = make_pool(64 * 20, 64 * frames, exchange_interval=4)
    table, slot = torch.arange(64, 64 * 20, dtype=torch.int32)[None], torch.tensor([0])
    for length in range(160, 200):
        lens = torch.tensor([length])
        pool.coordinator.begin_decode(lambda lens=lens: Batch.build(table, slot, lens, int(lens), 1, 1), lens)
    assert pool.coordinator.counts["exchanges"] == exchanges
    assert pool.residency.used == min(frames, 4) * LAYERS * HEADS


def test_where_all_fit_an_exchange_that_failed_is_tried_again(monkeypatch):
    pool, _ = make_pool(64 * 20, 64 * 6, exchange_interval=4)
    table, slot = torch.arange(64, 64 * 20, dtype=torch.int32)[None], torch.tensor([0])
    fill, failures = pool.fill, []

    def fails_once(*args, **kwargs):
        if not failures:
            failures.append(1)
            raise RuntimeError("no memory for it")
        return fill(*args, **kwargs)

    monkeypatch.setattr(pool, "fill", fails_once)
    for length in range(160, 165):
        lens = torch.tensor([length])
        pool.coordinator.begin_decode(lambda lens=lens: Batch.build(table, slot, lens, int(lens), 1, 1), lens)
    assert failures and pool.coordinator.counts["exchanges_failed"] == 1
    assert pool.residency.used == 3 * LAYERS * HEADS


def test_a_prompt_that_finds_no_memory_for_its_reservation_is_in_the_host_store_only(monkeypatch):
    pool, _ = make_pool(64 * 20, 64 * 6)

    def fails(*_):
        raise MemoryError("no memory for it")

    monkeypatch.setattr(pool.residency, "admit", fails)
    stored_request(pool, [1, 2, 3, 4], 0)
    assert pool.coordinator.counts["exchanges_failed"] == 1
    assert pool.residency.used == 0 and int(pool.residency.free.min()) == 6 * HEADS
    monkeypatch.undo()
    stored_request(pool, [5, 6], 1)
    assert pool.residency.used == 2 * LAYERS * HEADS


def test_pages_are_held_by_what_waits_and_by_what_decodes_in_the_same_batch():
    pool, _ = make_pool(64 * 20, 64 * 6)
    hold(pool, [3, 4])
    decoding = torch.tensor([[5, 6], [0, 0]])
    assert pool.coordinator.idle.holds(torch.tensor([2, 3, 5, 7]), decoding).tolist() == [False, True, True, False]


@pytest.mark.parametrize("at_once", [1, 48, 1 << 24], ids=["layer", "two", "all"])
def test_of_a_request_that_is_all_resident_no_working_set_is_measured(at_once, monkeypatch):
    """Where such requests select in some steps only: `frame_of` says of which."""
    monkeypatch.setattr(working_set, "MOST_AT_ONCE", at_once)
    layers, heads, sets = 2, 2, WorkingSets(5, "cpu")
    batch = batch_of([1, 2, 3, 4, 5, 6], 0)
    importance = torch.zeros(layers, 20, heads)
    importance[:, [2, 5]] = 1.0
    counts, frame_of = torch.zeros(5, 3, dtype=torch.int64), torch.zeros(layers, 20, heads, dtype=torch.int32)
    slot = int(batch.requests[0])
    others = [UNKNOWN] * 4
    for missing, found in ((None, 2.0), (False, UNKNOWN), (True, 2.0)):
        frame_of[1, 6, 1] = -1 if missing else 0
        sets.measure(importance, batch, 0.5, counts, None if missing is None else frame_of)
        told = sets.read()[:5]
        assert told.pop(slot) == found and told == others


def test_where_all_fit_other_pages_of_a_request_get_frames():
    """As when the radix tree has had the same tokens before, and its pages take the place of the request's own."""
    pool, _ = make_pool(64 * 20, 64 * 6, exchange_interval=1000)
    table, slot, lens = torch.arange(64, 64 * 20, dtype=torch.int32)[None], torch.tensor([0]), torch.tensor([170])
    pool.coordinator.begin_decode(lambda: Batch.build(table, slot, lens, 170, 1, 1), lens)
    table[0, :128] += 64 * 10
    pool.coordinator.page_freed(torch.tensor([1, 2]))
    lens = lens + 1
    pool.coordinator.begin_decode(lambda: Batch.build(table, slot, lens, 171, 1, 1), lens)
    assert bool((pool.residency.frame_of[:, [11, 12, 3]] >= 0).all()) and pool.residency.used == 3 * LAYERS * HEADS


def test_frames_are_counted_for_real():
    """2048 device tokens are 32 frames for each KV head of a layer and not a byte of KV more, but for one
    row a layer that takes writes meant for no frame."""
    pool, _ = make_pool(64 * 1024, 2048)
    frames = 2048 // 64 * HEADS
    assert pool.residency.owner.shape == (LAYERS, frames)
    for layer in pool.frames.layers:
        assert layer.shape == (frames + 1, 2, 64, DIM)
    assert pool.frames.nbytes == LAYERS * (frames + 1) * pool.block_bytes


def test_quick_keys_do_not_depend_on_how_a_page_was_filled():
    """Token by token (decode) and at once (prefill) give the same bits, for every gate."""
    for selector in ("quest", "mean"):
        pool, _ = make_pool(64 * 4, 64, selector=selector)
        k, v = torch.randn(2, 64, HEADS, DIM)
        pool.write(0, torch.arange(64, 128), k, v)
        refresh_keys(pool, 0, torch.tensor([1]), torch.tensor([64]))
        for i in range(64):
            pool.write(0, torch.tensor([128 + i]), k[i : i + 1], v[i : i + 1])
            refresh_keys(pool, 0, torch.tensor([2]), torch.tensor([i + 1]))
        assert torch.equal(pool.quick.layers[0][1], pool.quick.layers[0][2])


def test_cpu_copy_round_trip():
    pool, allocator = make_pool(64 * 4, 64)
    loc = allocator.alloc(64)
    k, v = torch.randn(2, 64, HEADS, DIM)
    for layer in range(LAYERS):
        pool.write(layer, loc, k, v)
    copy = pool.get_cpu_copy(loc[:40])
    other = allocator.alloc(64)[:40]
    pool.load_cpu_copy(copy, other)
    page = int(other[0]) // 64
    assert torch.equal(pool.host.layers[1][page, :, 0, :40].transpose(0, 1), k[:40])
    assert torch.equal(pool.host.layers[1][page, :, 1, :40].transpose(0, 1), v[:40])


def test_token_rows_are_refused_in_words():
    pool, _ = make_pool(64 * 4, 64)
    with pytest.raises(NotImplementedError, match="in blocks"):
        pool.get_kv_buffer(0)
