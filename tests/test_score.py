"""Gates, scores and the recorder: C++ against torch, and the properties they rest on."""

import pytest
import torch

from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.ops.pool_keys import pool_keys_cpu, pool_keys_torch
from rheoserve_sgl.ops.score import record_cpu, record_torch, score_cpu, score_torch

POOLED = ("mean", "quest")


def table(seed: int, batch: int, width: int, pages: int):
    generator = torch.Generator().manual_seed(seed)
    n_pages = torch.randint(1, width + 1, (batch,), generator=generator, dtype=torch.int32)
    ids = torch.stack([torch.randperm(pages - 1, generator=generator)[:width] + 1 for _ in range(batch)])
    valid = torch.arange(width) < n_pages[:, None]
    return torch.where(valid, ids, 0), n_pages


@pytest.mark.parametrize("selector", POOLED)
@pytest.mark.parametrize("group", [1, 4, 5, 7, 16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_score_cpu_equals_torch(selector, group, dim):
    gate = make_gate(selector)
    pages, n_pages = table(dim + group, 3, 21, 50)
    quick = torch.randn(50, 2, gate.key_dim(dim))
    q = gate.query(torch.randn(3, 2, group, dim))
    got = score_cpu(q, quick, pages, n_pages, dim**-0.5)
    torch.testing.assert_close(got, score_torch(q, quick, pages, n_pages, dim**-0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selected", [False, True])
def test_record_cpu_equals_torch_with_shared_pages(selected):
    pages, n_pages = table(1, 4, 9, 12)  # 4 rows of 9 out of 11 pages: shared ones for sure
    scores = torch.randn(4, 2, 9).masked_fill(torch.arange(9) >= n_pages[:, None, None], -torch.inf)
    scores[1, 0, 0] = torch.nan
    chosen = torch.rand(scores.shape) < 0.3 if selected else None
    before = torch.rand(12, 2)
    mine, theirs = before.clone(), before.clone()
    record_cpu(scores, chosen, mine, pages, n_pages, 3.0)
    record_torch(scores, chosen, theirs, pages, n_pages, 3.0)
    torch.testing.assert_close(mine[1:], theirs[1:])
    by_hand = before.double()
    for row in range(4):
        for at in range(n_pages[row]):
            by_hand[pages[row, at]] += 3.0 * scores[row, :, at].double().exp().nan_to_num(0.0)
            if selected:
                by_hand[pages[row, at]] += 3.0 * chosen[row, :, at]
    torch.testing.assert_close(mine[1:].double(), by_hand[1:], rtol=1e-5, atol=1e-6)


def test_threads_change_no_bit():
    torch.manual_seed(0)
    pages, n_pages = table(2, 5, 300, 400)  # enough work for several tasks of each operation
    quick, q = torch.randn(400, 4, 256), torch.randn(5, 4, 4, 256)
    one, three = (score_cpu(q, quick, pages, n_pages, 0.1, threads) for threads in (1, 3))
    assert torch.equal(one, three)
    importance = [torch.ones(400, 4) for _ in range(2)]
    keys = [torch.zeros(400, 4, 128) for _ in range(2)]
    host = torch.randn(400, 4, 2, 64, 64)
    for threads, recorded, pooled in zip((1, 3), importance, keys, strict=True):
        record_cpu(one, one > -5.0, recorded, pages, n_pages, 2.0, threads)
        filled = torch.full((399,), 64, dtype=torch.int32)
        pool_keys_cpu(make_gate("quest"), host, torch.arange(1, 400), filled, pooled, threads)
    assert torch.equal(*importance)
    assert torch.equal(*keys)
    assert bool((keys[0][1:, :, :64] >= host[1:, :, 0].amax(2)).all())


@pytest.mark.parametrize("selector", POOLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_pool_keys_cpu_equals_torch(selector, dtype, dim):
    torch.manual_seed(dim)
    gate = make_gate(selector)
    host = torch.randn(20, 3, 2, 64, dim).to(dtype)
    pages, filled = torch.tensor([3, 19, 7, 1]), torch.tensor([64, 1, 63, 17], dtype=torch.int32)
    host[7, 1, 0, 5, 3] = torch.nan  # a NaN key shows in its own channel
    host[7, :, 0, 63:] = torch.nan  # stale bytes do not
    mine, theirs = torch.zeros(2, 20, 3, gate.key_dim(dim))
    pool_keys_cpu(gate, host, pages, filled, mine)
    pool_keys_torch(gate, host, pages, filled, theirs)
    exact = {"rtol": 0, "atol": 0} if selector == "quest" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mine, theirs, equal_nan=True, **exact)
    assert int(mine.isnan().sum()) == (2 if selector == "quest" else 1)


def test_pool_keys_refuses_what_is_outside():
    host, quick = torch.zeros(2, 1, 2, 64, 64), torch.zeros(2, 1, 128)
    with pytest.raises(IndexError, match="page 2"):
        pool_keys_cpu(make_gate("quest"), host, torch.tensor([2]), torch.tensor([1], dtype=torch.int32), quick)
    with pytest.raises(IndexError, match="filled is 65"):
        pool_keys_cpu(make_gate("quest"), host, torch.tensor([1]), torch.tensor([65], dtype=torch.int32), quick)


def test_quest_bounds_every_logit_of_a_block():
    gate = make_gate("quest")
    keys, q = torch.randn(30, 2, 64, 64), torch.randn(100, 64)
    filled = torch.randint(1, 65, (30,))
    valid = (torch.arange(64) < filled[:, None])[:, None, :, None]
    pooled = gate.pool(keys, valid)
    bound = torch.einsum("qd,nhd->qnh", gate.query(q), pooled)
    logits = torch.einsum("qd,nhtd->qnht", q, keys).masked_fill(~valid[None, ..., 0], -torch.inf)
    assert bool((bound >= logits.amax(-1) - 1e-3).all())


def test_mean_is_the_logit_of_the_average_key():
    gate = make_gate("mean")
    keys = torch.randn(3, 2, 64, 64)
    valid = torch.ones(3, 1, 64, 1, dtype=torch.bool)
    valid[1, :, 10:] = False
    pooled = gate.pool(keys, valid)
    torch.testing.assert_close(pooled[1], keys[1, :, :10].mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled[0], keys[0].mean(1), rtol=1e-5, atol=1e-5)
