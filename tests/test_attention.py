"""CPU attention kernels against a float64 oracle: every variant, dtype, group size and head dim."""

import zlib

import pytest
import torch

from rheoserve_sgl.ops.attention import attend_cpu, attend_tiers, attend_torch
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.merge import merge_torch
from rheoserve_sgl.ops.plan import Plan, Visit

VARIANTS = extension().cpu_variants()
# fp32 inputs leave only accumulation; 16-bit inputs are exact in the oracle as well, so the bound is the same.
TOLERANCE = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GROUPS = [4, 5, 8, 12]  # kernels take different ways for up to 4, up to 8 and more heads


@pytest.fixture(autouse=True)
def own_numbers(request):
    """Each test's own, whichever ran before."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


def make_visit(batch, kv_heads, counts, blocks, seed) -> Visit:
    """Random distinct blocks in the lists, random tails; unused entries are poisoned."""
    generator = torch.Generator().manual_seed(seed)
    width = max(max(counts), 1)
    lists = torch.full((batch, kv_heads, width), -12345, dtype=torch.int32)
    count = torch.tensor(counts, dtype=torch.int32).expand(batch * kv_heads)[: batch * kv_heads].view(batch, kv_heads)
    for b in range(batch):
        for h in range(kv_heads):
            n = int(count[b, h])
            lists[b, h, :n] = torch.randperm(blocks, generator=generator)[:n].to(torch.int32)
    last = torch.randint(1, 65, (batch, kv_heads), generator=generator, dtype=torch.int32)
    return Visit(lists, count.contiguous(), last)


def oracle(q, blocks, visit, scale):
    """float64, one request and head at a time."""
    batch, kv_heads, group, dim = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(kv_heads):
            n = int(visit.count[b, h])
            if n == 0:
                continue
            picked = blocks[visit.blocks[b, h, :n].long()].double()
            length = (n - 1) * 64 + int(visit.last_len[b, h])
            keys, values = (picked[:, i].reshape(-1, dim)[:length] for i in (0, 1))
            logits = q[b, h].double() @ keys.T * scale
            lse[b, h] = torch.logsumexp(logits, -1)
            out[b, h] = torch.softmax(logits, -1) @ values
    return out, lse


def check(result, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(result[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result[1].double(), expected[1], rtol=tolerance, atol=tolerance)


def run(impl, q, blocks, visit, scale):
    if impl == "torch":
        return attend_torch(q, blocks, visit, scale)
    return attend_cpu(q, ((blocks, visit),), scale, 2, impl)


@pytest.mark.parametrize("impl", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_matches_oracle(impl, dtype, dim):
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
        torch.manual_seed(group)
        blocks = torch.randn(80, 2, 64, dim).to(dtype)
        q = torch.randn(2, 3, group, dim)
        visit = make_visit(2, 3, (1, 17, 0, 33, 16, 2), 80, group)
        check(run(impl, q, blocks, visit, dim**-0.5), oracle(q, blocks, visit, dim**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_tokens_of_one_head(dtype):
    torch.manual_seed(0)
    store = torch.randn(1 << 14, 2, 64, 64).to(dtype)
    visit = Visit(
        torch.randperm(len(store), dtype=torch.int32).view(1, 1, -1),
        torch.tensor([[len(store)]], dtype=torch.int32),
        torch.tensor([[33]], dtype=torch.int32),
    )
    q = 3 * torch.randn(1, 1, 4, 64)
    expected = oracle(q, store, visit, 0.125)
    for variant in VARIANTS:
        check(run(variant, q, store, visit, 0.125), expected)


@pytest.mark.parametrize("impl", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 62, 63, 64])
def test_every_tail_ignores_what_lies_behind_it(impl, dtype, last):
    blocks = torch.randn(6, 2, 64, 64).to(dtype)
    visit = Visit(
        torch.tensor([[[3, 5]]], dtype=torch.int32),
        torch.tensor([[2]], dtype=torch.int32),
        torch.tensor([[last]], dtype=torch.int32),
    )
    for group in GROUPS:
        q, poisoned = torch.randn(1, 1, group, 64), blocks.clone()
        poisoned[5, :, last:] = torch.nan
        check(run(impl, q, poisoned, visit, 0.125), oracle(q, blocks, visit, 0.125))


@pytest.mark.parametrize("impl", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_lists(impl, dtype):
    visit = make_visit(2, 2, (0,), 4, 0)
    for group in GROUPS:
        out, lse = run(impl, torch.randn(2, 2, group, 64), torch.randn(4, 2, 64, 64).to(dtype), visit, 1.0)
        assert torch.equal(out, torch.zeros_like(out))
        assert bool(torch.isneginf(lse).all())


@pytest.mark.parametrize("impl", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_ten_thousand(impl, dtype):
    visit = make_visit(1, 1, (4,), 4, 0)
    error = 0.1  # of a logit: fp32 has steps of 1e-3 there, queries of two bf16 terms of 0.04
    for group in GROUPS:
        blocks, q = torch.randn(4, 2, 64, 64).to(dtype), 1e3 * torch.randn(1, 1, group, 64)
        scale = 1e4 / float(oracle(q, blocks, visit, 1.0)[1].abs().max())
        found, expected = run(impl, q, blocks, visit, scale), oracle(q, blocks, visit, scale)
        # A merge goes by the difference.
        torch.testing.assert_close(found[1].double(), expected[1], rtol=0, atol=error)
        # Where two logits nearly tie, the output moves between their values by what is missing in the logits.
        picked = blocks[visit.blocks[0, 0, :4].long()].double()
        length = 192 + int(visit.last_len[0, 0])
        keys, values = (picked[:, i].reshape(-1, 64)[:length] for i in (0, 1))
        weights = torch.softmax(q[0, 0].double() @ keys.T * scale, -1)
        moved = torch.einsum("ht,htd->hd", weights, (values - expected[0][0, 0][:, None]).abs())
        allowed = 1e-3 * (1 + expected[0][0, 0].abs()) + error * moved
        assert bool(((found[0][0, 0].double() - expected[0][0, 0]).abs() <= allowed).all())


@pytest.mark.parametrize("impl", [*VARIANTS, "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_poisons_its_own_head_only(impl, dtype):
    for group in GROUPS:
        blocks, visit = torch.randn(8, 2, 64, 64).to(dtype), make_visit(1, 2, (3,), 8, 1)
        q = torch.randn(1, 2, group, 64).to(dtype).float()  # (one term, and a NaN beside it must not make it two)
        clean, _ = run(impl, q, blocks, visit, 0.125)
        q[0, 1, 2, 7] = torch.nan
        out, _ = run(impl, q, blocks, visit, 0.125)
        assert bool(out[0, 1, 2].isnan().all())
        out[0, 1, 2] = clean[0, 1, 2]
        assert torch.equal(out, clean)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3, 16])
def test_answer_does_not_depend_on_the_batch(variant, dtype, threads):
    visit = make_visit(4, 2, (2300, 3, 77, 16, 1, 0, 9, 24), 2400, 2)  # of more than 2,175 blocks tasks are longer
    for group in GROUPS:
        blocks, q = torch.randn(2400, 2, 64, 16).to(dtype), torch.randn(4, 2, group, 16)
        together = attend_cpu(q, ((blocks, visit),), 0.125, threads, variant)
        for row in range(4):
            alone = Visit(*(t[row : row + 1] for t in (visit.blocks, visit.count, visit.last_len)))
            single = attend_cpu(q[row : row + 1], ((blocks, alone),), 0.125, threads, variant)
            assert torch.equal(together[0][row : row + 1], single[0])
            assert torch.equal(together[1][row : row + 1], single[1])


@pytest.mark.parametrize(("threads", "kv_heads"), [(3, 2), (5, 2), (16, 1)])
def test_lists_of_every_length_on_many_threads(threads, kv_heads):
    """These are cut into tasks of other lengths."""
    blocks, rows = torch.randn(40, 2, 64, 64), range(1, 31)
    visit = make_visit(30, kv_heads, tuple(n for n in rows for _ in range(kv_heads)), 40, 5)
    q = torch.randn(30, kv_heads, 4, 64)
    expected = oracle(q, blocks, visit, 0.125)
    check(attend_cpu(q, ((blocks, visit),), 0.125, threads), expected)
    for row in (0, 3, 8, 11, 12, 29):
        alone = Visit(*(t[row : row + 1] for t in (visit.blocks, visit.count, visit.last_len)))
        answer = attend_cpu(q[row : row + 1], ((blocks, alone),), 0.125, threads)
        check(answer, tuple(part[row : row + 1] for part in expected))


@pytest.mark.parametrize("empty", ["neither", "device", "host"])
def test_two_tiers_equal_one(empty):
    """However a list is split between the tiers, the merged answer is that of the whole."""
    q, blocks = torch.randn(2, 2, 4, 64), torch.randn(40, 2, 64, 64)
    whole = make_visit(2, 2, (20,), 40, 3)
    expected, _ = oracle(q, blocks, whole, 0.125)
    cut = {"neither": 7, "device": 0, "host": 20}[empty]
    full = torch.full((2, 2), 64, dtype=torch.int32)
    device = Visit(whole.blocks[..., :cut].contiguous(), full - 64 + cut, whole.last_len if cut == 20 else full)
    host = Visit(whole.blocks[..., cut:].contiguous(), full - 44 - cut, whole.last_len)
    merged = attend_tiers(q, blocks, blocks, Plan(device, host), 0.125, 2)
    torch.testing.assert_close(merged.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    parts = merge_torch(*attend_torch(q, blocks, device, 0.125), *attend_torch(q, blocks, host, 0.125))
    torch.testing.assert_close(parts[0].double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_merge_of_two_empty_sets():
    out, lse = merge_torch(
        torch.zeros(3, 8), torch.full((3,), -torch.inf), torch.zeros(3, 8), torch.full((3,), -torch.inf)
    )
    assert torch.equal(out, torch.zeros(3, 8))
    assert bool(torch.isneginf(lse).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": torch.tensor([[[9]]], dtype=torch.int32)}, "block 9"),
        ({"blocks": torch.tensor([[[-1]]], dtype=torch.int32)}, "block -1"),
        ({"count": torch.tensor([[2]], dtype=torch.int32)}, "count 2"),
        ({"last_len": torch.tensor([[65]], dtype=torch.int32)}, "last_len 65"),
        ({"last_len": torch.tensor([[0]], dtype=torch.int32)}, "last_len 0"),
    ],
)
def test_bad_lists_are_refused_by_name(change, message):
    good = {
        "blocks": torch.zeros((1, 1, 1), dtype=torch.int32),
        "count": torch.ones((1, 1), dtype=torch.int32),
        "last_len": torch.full((1, 1), 64, dtype=torch.int32),
    }
    with pytest.raises(IndexError, match=message):
        attend_cpu(torch.randn(1, 1, 1, 64), ((torch.randn(9, 2, 64, 64), Visit(**good | change)),), 1.0, 1)


def test_bad_tensors_are_refused_by_name():
    visit = make_visit(1, 1, (1,), 4, 0)
    blocks = torch.randn(4, 2, 64, 64)
    with pytest.raises(ValueError, match="q is torch.float64"):
        attend_cpu(torch.randn(1, 1, 1, 64, dtype=torch.float64), ((blocks, visit),), 1.0, 1)
    with pytest.raises(ValueError, match="float64"):
        attend_cpu(torch.randn(1, 1, 1, 64), ((blocks.double(), visit),), 1.0, 1)
    with pytest.raises(ValueError, match="group is 17"):
        attend_cpu(torch.randn(1, 1, 17, 64), ((blocks, visit),), 1.0, 1)
    with pytest.raises(ValueError, match="dim is 40"):
        attend_cpu(torch.randn(1, 1, 1, 40), ((torch.randn(4, 2, 64, 40), visit),), 1.0, 1)
