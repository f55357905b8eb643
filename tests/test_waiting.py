"""What was important to a request that waits does not fade while others decode."""

import pytest
import torch
from pools import HEADS, LAYERS, make_pool

from rheoserve_sgl.coordinator.coordinator import DECAY


@pytest.mark.parametrize("steps", [1, 10, 500])  # the last: the weight was scaled down several times
def test_importance_is_kept_over_a_wait(steps):
    pool, _ = make_pool(64 * 64, 1024)
    coordinator = pool.coordinator
    own, shared, other = torch.arange(1, 9), torch.arange(5, 9), torch.arange(20, 30)
    coordinator.weight = 3.0
    pool.importance[:, own] = torch.rand(LAYERS, len(own), HEADS) * 3
    before = pool.importance[:, own] / coordinator.weight
    kept = coordinator.begins_to_wait(own)
    coordinator.settle()
    for _ in range(steps):
        coordinator._fade()
        pool.importance[:, other] += coordinator.weight
        pool.importance[:, shared] += coordinator.weight  # a radix-shared prefix: another request goes on with it
    faded = pool.importance[:, own[:4]] / coordinator.weight
    assert torch.allclose(faded, before[:, :4] * DECAY**steps, rtol=1e-3, atol=1e-30)
    grown = pool.importance[:, shared] / coordinator.weight
    others = pool.importance[:, other].clone()
    coordinator.ends_to_wait(kept, own)
    coordinator.settle()
    now = pool.importance[:, own] / coordinator.weight
    assert torch.allclose(now[:, :4], before[:, :4], rtol=1e-4)
    assert torch.allclose(now[:, 4:], torch.maximum(grown, before[:, 4:]), rtol=1e-4)
    assert torch.equal(pool.importance[:, other], others)


def test_a_wait_that_ends_before_any_batch_changes_nothing():
    pool, _ = make_pool(64 * 64, 1024)
    pool.importance[:, 1:9] = torch.rand(LAYERS, 8, HEADS)
    before = pool.importance.clone()
    kept = pool.coordinator.begins_to_wait(torch.arange(1, 9))
    pool.coordinator.ends_to_wait(kept, torch.arange(1, 9))
    pool.coordinator.settle()
    assert torch.allclose(pool.importance, before)


def test_pages_that_were_exchanged_for_others_meanwhile_get_nothing():
    """The radix tree gave the request another copy of its first pages, and the old ones to somebody else."""
    pool, _ = make_pool(64 * 64, 1024)
    pool.importance[:, 1:9] = 1.0
    kept = pool.coordinator.begins_to_wait(torch.arange(1, 9))
    pool.coordinator.settle()
    pool.importance[:, 1:9] = 0.0
    pool.coordinator.ends_to_wait(kept, torch.tensor([11, 12, 3, 4, 5, 6, 7, 8]))
    pool.coordinator.settle()
    assert pool.importance[:, [1, 2, 11, 12]].sum() == 0 and (pool.importance[:, 3:9] == 1.0).all()


def test_a_prompt_that_shares_pages_with_a_request_takes_no_importance_from_it():
    pool, _ = make_pool(64 * 64, 1024)
    coordinator = pool.coordinator
    coordinator.idle.held = lambda: torch.tensor([3, 4, 5, 6])
    pool.importance[:, 1:12] = torch.rand(LAYERS, 11, HEADS) + 0.1
    before = pool.importance.clone()
    prompt = torch.tensor([3, 4, 7, 8, 9])
    shared = coordinator.idle.holds(prompt, torch.zeros(1, 2, dtype=torch.int64))
    assert shared.tolist() == [True, True, False, False, False]
    coordinator.forget(1, prompt, shared)
    before[1, 7:10] = 0.0
    assert torch.equal(pool.importance, before)
