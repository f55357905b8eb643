"""Who decodes: the rules by themselves, over random histories."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rheoserve_sgl.runtime.admission import CALM, FORGETS, NO_BOUND, SLACK, Admission, Candidate
from rheoserve_sgl.runtime.transaction import Transaction

CANDIDATES = st.lists(
    st.builds(Candidate, need=st.floats(0, 300), decodes=st.booleans(), ends=st.booleans()), min_size=1, max_size=12
)


def waiting(*needs: float) -> list[Candidate]:
    return [Candidate(need, decodes=False) for need in needs]


def decoding(*needs: float) -> list[Candidate]:
    return [Candidate(need, decodes=True) for need in needs]


@given(CANDIDATES, st.floats(1, 500), st.booleans())
def test_those_that_fit_beside_older_ones_decode(candidates, capacity, more_coming):
    rows = Admission(capacity, 0.25).choose(candidates, more_coming)
    assert rows == sorted(set(rows)) and rows
    assert {row for row, one in enumerate(candidates) if one.ends} <= set(rows)
    chosen = [row for row in rows if not candidates[row].ends]
    if len(rows) > 1 and chosen:
        assert sum(candidates[row].need for row in chosen) <= max(SLACK * capacity, candidates[chosen[0]].need)
    for row in set(range(len(candidates))) - set(rows):  # whoever waits has no room beside the older ones
        assert sum(candidates[one].need for one in chosen if one < row) + candidates[row].need > capacity


@given(CANDIDATES, CANDIDATES, st.floats(1, 500), st.integers(1, 4), st.integers(0, 3), st.integers(0, 6), st.data())
def test_nobody_waits_for_those_that_came_later(older, newer, capacity, group, patience, steps, data):
    """Whatever the newer ones need, and whether they decode, each older one decodes that would without them."""
    alone, crowd = (Admission(capacity, 0.25, group, patience) for _ in range(2))
    for _ in range(steps + 1):
        allowed = data.draw(st.lists(st.booleans(), min_size=len(older), max_size=len(older)))
        allowed = [True, *allowed[1:], *[True] * len(newer)]
        first = alone.choose(older, True, allowed.__getitem__)
        rows = crowd.choose(older + newer, True, allowed.__getitem__)
        if alone._waited == 0:  # else they wait for their group, and newer ones may complete it
            assert first == [row for row in rows if row < len(older)]
        else:
            assert set(first) <= set(rows)


@given(CANDIDATES, st.floats(1, 500), st.data())
def test_what_is_not_loaded_yet_joins_later_if_others_decode_meanwhile(candidates, capacity, data):
    everybody, some = Admission(capacity, 0.25), Admission(capacity, 0.25)
    rows = everybody.choose(candidates, more_coming=False)
    assert not everybody.coming
    late = data.draw(st.sets(st.sampled_from(range(len(candidates)))))
    now = some.choose([replace(one, loaded=row not in late) for row, one in enumerate(candidates)], False)
    assert sorted(now + some.coming) == rows  # its room is kept for it
    assert all(row in late and not candidates[row].decodes and not candidates[row].ends for row in some.coming)
    assert not some.coming or any(not candidates[row].ends for row in now)


def test_loading_and_waiting_for_a_group_go_on_together():
    admission = Admission(100, 0.25, group=2, patience=3)
    late = [*decoding(10), Candidate(10, decodes=False, loaded=False)]
    ready = decoding(10) + waiting(10)
    seen = [(admission.choose(one, more_coming=True), admission.coming) for one in (late, late, ready, ready)]
    assert seen == [([0], [1]), ([0], [1]), ([0], [1]), ([0, 1], [])]
    seen = [admission.choose(late, more_coming=True) for _ in range(5)] + [admission.choose(ready, True)]
    assert seen == [[0]] * 5 + [[0, 1]]  # its patience was at its end


@pytest.mark.parametrize(
    ("candidates", "rows"),
    [
        (waiting(900), [0]),  # one always does
        (waiting(40, 60, 1), [0, 1]),
        (decoding(60, 45) + waiting(1), [0, 1]),  # what decodes may grow by a tenth
        (decoding(60, 55), [0]),  # not by more: the newest pauses
        (waiting(60) + decoding(30) + waiting(20), [0, 1]),
        (decoding(60) + waiting(50, 20, 30, 10), [0, 2, 4]),  # small ones pass one that has to wait
        (decoding(40) + waiting(50) + decoding(25, 10), [0, 1, 3]),  # which has its room back when it fits
    ],
)
def test_as_many_as_fit(candidates, rows):
    assert Admission(100, 0.25).choose(candidates, more_coming=False) == rows


def test_a_group_joins_together_but_waits_no_longer_than_its_patience():
    admission = Admission(100, 0.25, group=3, patience=2)
    two, three = decoding(10) + waiting(10, 10), decoding(10) + waiting(10, 10, 10)
    assert admission.choose(two, more_coming=True) == [0]
    assert admission.choose(three, more_coming=True) == [0, 1, 2, 3]
    assert [admission.choose(two, more_coming=True) for _ in range(3)] == [[0], [0], [0, 1, 2]]
    assert admission.choose(two, more_coming=False) == [0, 1, 2]  # nothing to wait for
    assert admission.choose(waiting(10), more_coming=True) == [0]  # nothing to go on with
    older = decoding(5) + waiting(10) + decoding(10)
    # Who is older than one that decodes waits for no group.
    assert admission.choose(older, more_coming=True) == [0, 1, 2]


def test_working_sets_that_vary_from_window_to_window_do_not_send_a_request_away_and_back():
    """Two of 32 pages in the mean, in 70: by single windows the second one comes and goes all the time."""
    draw = random.Random(0)

    def changes(learns: bool) -> int:
        admission, known, rows, changes = Admission(70, 0.25), [Transaction(), Transaction()], [0, 1], 0
        for _ in range(200):
            for one in known:
                one.measured = one.measured if learns else 0.0
                one.learn(draw.uniform(20, 44))
            candidates = [Candidate(one.measured, row in rows) for row, one in enumerate(known)]
            before, rows = rows, admission.choose(candidates, more_coming=False)
            changes += rows != before
        return changes

    assert changes(learns=False) > 20 and changes(learns=True) <= 2


def test_another_limit_leaves_its_room_to_others():
    few = {0, 2}
    assert Admission(100, 0.25).choose(waiting(40, 50, 30, 20), False, few.__contains__) == [0, 2]


def test_too_many_misses_pause_the_newest_until_they_are_few():
    admission = Admission(1000, 0.25)
    sixteen = decoding(*[10] * 16)
    admission.observe(0.3, 16)
    assert admission.choose(sixteen, more_coming=False) == list(range(16))  # one window tells nothing
    admission.observe(0.3, 16)
    assert admission.choose(sixteen, more_coming=False) == list(range(14))
    for _ in range(CALM):
        assert admission.choose(sixteen, more_coming=False) == list(range(14))
        admission.observe(0.2, 14)  # neither many nor few
    assert admission.bound == 14
    for _ in range(CALM):
        admission.choose(sixteen, more_coming=False)
        admission.observe(0.05, 14, steady=False)  # others came and went, and all found their blocks
    assert admission.choose(sixteen, more_coming=False) == list(range(15))
    for _ in range(3):
        admission.observe(0.9, 1)
        admission.observe(0.9, 12, steady=False)  # those that have just joined miss much
    assert admission.bound == 15
    admission.choose(sixteen, more_coming=False)
    admission.observe(0.2, 15)
    for _ in range(FORGETS):
        assert admission.bound == 15
        assert admission.choose(sixteen[:15], more_coming=False) == list(range(15))
        admission.observe(0.2, 15)
    assert admission.bound == NO_BOUND  # it stopped nobody for long


@pytest.mark.parametrize("windows", [(0.9, 0.6, 0.3, 0.1), (0.5, 0.39, 0.31, 0.24), (0.9, 0.2, 0.9, 0.1)])
def test_blocks_that_are_on_their_way_send_nobody_away(windows):
    """A whole batch that joins at once finds nothing in frames; they fill over the first windows."""
    admission = Admission(1000, 0.25)
    admission.observe(1.0, 12, steady=False)
    for missed in windows:
        admission.observe(missed, 12)
    assert admission.bound == NO_BOUND


def test_a_load_that_thrashes_is_cut_to_what_found_frames_at_once():
    admission = Admission(10_000, 0.25)
    for missed in (0.85, 0.8):
        admission.observe(missed, 24)
    assert admission.bound == 7
    windows = 0
    while admission.bound < 22:  # back to just below what was too much, by halves and then by eighths
        admission.choose(decoding(*[10] * 24), more_coming=False)
        admission.observe(0.0, admission.bound, steady=False)
        windows += 1
    assert windows <= 6 * CALM


def test_misses_that_last_count_although_somebody_joins_in_each_window():
    admission = Admission(capacity=100, most_missed=0.2)
    for _ in range(7):
        admission.observe(0.6, decoding=6, steady=False)
        assert len(admission.choose(decoding(*[1] * 6), False)) == 6
    admission.observe(0.6, decoding=6, steady=False)
    assert len(admission.choose(decoding(*[1] * 6), False)) == 3
    both = Admission(capacity=100, most_missed=0.2)  # a bound for another reason begins the count anew
    for steady in [False] * 5 + [True] * 2 + [False] * 7:
        both.observe(0.6, decoding=6, steady=steady)
        bound = both.bound
        assert bound in (1 << 30, 3)
    both.observe(0.6, decoding=3, steady=False)
    assert both.bound < bound == 3
    easy = Admission(capacity=100, most_missed=0.2)  # one good window between tells that it does not last
    for missed in [0.6] * 7 + [0.1] + [0.6] * 7:
        easy.observe(missed, decoding=6, steady=False)
    assert len(easy.choose(decoding(*[1] * 6), False)) == 6


def test_after_bad_windows_many_small_ones_soon_decode_together():
    admission, small, windows = Admission(1000, 0.25), decoding(*[10] * 64), 0
    for _ in range(2):
        admission.observe(0.5, 2)
    assert len(admission.choose(small, more_coming=False)) == 1
    while len(admission.choose(small, more_coming=False)) < 32:
        admission.observe(0.0, admission.bound, steady=False)
        windows += 1
    assert windows <= 10 * CALM


def test_after_middling_windows_an_eighth_more_is_tried_below_what_was_too_many():
    admission, sixteen = Admission(1000, 0.25), decoding(*[10] * 16)
    for missed in (0.5, 0.45):
        admission.observe(missed, 16)
    assert admission.bound == 12
    seen = []
    for _ in range(8 * CALM):
        admission.choose(sixteen, more_coming=False)
        admission.observe(0.2, admission.bound)
        seen.append(admission.bound)
    assert sorted(set(seen)) == [12, 13, 14, 15] and seen[2 * CALM - 2] == 12 and seen[-1] == 15


def test_a_new_bound_is_kept_for_some_windows_whatever_was_before():
    admission = Admission(1000, 0.25)
    for _ in range(3 * FORGETS):
        admission.observe(0.0, 4)
    for missed in (0.8, 0.8, 0.2):
        admission.observe(missed, 8)
    assert admission.bound == 3


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 64)), max_size=60))
def test_at_least_one_request_decodes_whatever_was_seen(history):
    admission = Admission(10, 0.1)
    for missed, count in history:
        admission.observe(missed, count)
        assert admission.bound >= 1
        assert admission.choose(decoding(5, 5, 5), more_coming=False)
