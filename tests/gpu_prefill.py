"""A prefill's Triton kernels against torch: test_triton.py runs this file, interpreted or compiled for a GPU."""

from types import SimpleNamespace

import pytest
import torch
from gpu_kernels import DEVICE, make_batch
from gpu_step import GROUP, MAX_PAGES, SCALE, make, moved, table_of
from pools import DIM, HEADS, LAYERS

from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.gate.seer import SeerGate
from rheoserve_sgl.ops.append import append_torch
from rheoserve_sgl.ops.attn_gate import fold_torch
from rheoserve_sgl.ops.doorbell import Exchange
from rheoserve_sgl.ops.gpu.append_pages import append_pages_gpu
from rheoserve_sgl.ops.gpu.first import FirstScores
from rheoserve_sgl.ops.gpu.fold import fold_gpu, pool_gpu
from rheoserve_sgl.ops.gpu.gather import gather_prefix
from rheoserve_sgl.ops.gpu.step import GpuStep
from rheoserve_sgl.ops.plan import Rule, Select
from rheoserve_sgl.ops.pool_keys import pool_keys_torch
from rheoserve_sgl.ops.score import record
from rheoserve_sgl.runtime.batch import Batch
from rheoserve_sgl.runtime.writes import Writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80])
def test_the_pages_of_a_prefill_are_written_as_its_tokens(dtype, dim):
    torch.manual_seed(dim)
    prefixes, lengths = [0, 70, 64, 130, 63], [1, 130, 0, 60, 1]
    table, where, lens, batch = make_batch([a + b for a, b in zip(prefixes, lengths, strict=True)], 12, 256, 30)
    writes, tokens = Writes.of_extend(batch, prefixes, lengths), sum(lengths)
    rows = [table[row, had : had + new] for row, had, new in zip(where, prefixes, lengths, strict=True)]
    loc = torch.cat(rows).long()
    frame_of = torch.randint(-30, 15, (30, 3), dtype=torch.int32).clamp(min=-1)
    frame_of[frame_of >= 0] = torch.randperm(90)[: int((frame_of >= 0).sum())].to(torch.int32)
    qkv = torch.randn(tokens + 3, 9, dim).to(dtype)
    host, frames = torch.zeros(30, 3, 2, 64, dim, dtype=dtype), torch.zeros(91, 2, 64, dim, dtype=dtype)
    expected = host.clone(), frames.clone()
    append_torch(*expected, frame_of, loc, qkv[:tokens, 3:6], qkv[:tokens, 6:9])
    qkv[tokens:] = torch.nan  # padding of the batch
    if DEVICE == "cuda":
        host = host.pin_memory()
    frames, there = frames.to(DEVICE), qkv.to(DEVICE)
    append_pages_gpu(host, frames, frame_of.to(DEVICE), moved(writes, DEVICE), there[:, 3:6], there[:, 6:9])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected[0])
    assert torch.equal(frames.cpu()[:-1], expected[1][:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_folding_the_keys_of_a_prefill_has_torchs_bits(dtype):
    torch.manual_seed(8)
    prefixes, lengths = [0, 70, 64, 130, 0], [1, 130, 0, 60, 200]
    _, _, _, batch = make_batch([max(a + b, 1) for a, b in zip(prefixes, lengths, strict=True)], 12, 512, 60)
    writes = Writes.of_extend(batch, prefixes, lengths)
    plain, running = torch.randn(sum(lengths), 2, 80).to(dtype), torch.randn(20, 2, 3, 80)
    plain[40, 1, 7] = torch.nan
    folded = fold_gpu(plain.to(DEVICE), moved(writes, DEVICE), running.to(DEVICE))
    expected = fold_torch(plain.float(), writes, running)
    assert torch.equal(folded.cpu().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    nothing = Writes.of_extend(batch, prefixes, [0] * 5)
    assert fold_gpu(plain[:0].to(DEVICE), moved(nothing, DEVICE), running.to(DEVICE)).shape == (0, 2, 3, 80)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("selector", ["quest", "mean"])
def test_pooling_the_keys_of_a_prefill_equals_torch(selector, dtype):
    """From the keys that pages had and the new tokens, as from all of a page's stored tokens."""
    torch.manual_seed(9)
    gate, pages = make_gate(selector), 60
    prefixes, lengths = [0, 70, 64, 130, 63], [1, 130, 0, 60, 1]
    _, _, _, batch = make_batch([a + b for a, b in zip(prefixes, lengths, strict=True)], 12, 512, pages)
    writes = Writes.of_extend(batch, prefixes, lengths)
    host = torch.randn(pages, 2, 2, 64, 80).to(dtype)
    host[int(writes.pages[3]), 1, 0, 5, 7] = torch.nan
    k = torch.full((sum(lengths), 6, 80), torch.nan, dtype=dtype)  # keys lie between other things
    for page, token, had, has in zip(
        *(t.tolist() for t in (writes.pages, writes.token, writes.before, writes.filled)), strict=True
    ):
        k[token : token + has - had, 2:4] = host[page, :, 0, had:has].transpose(0, 1)
    expected = torch.full((pages, 2, gate.key_dim(80)), 3.0)
    had = writes.before > 0
    pool_keys_torch(gate, host, writes.pages[had], writes.before[had], expected)
    mine = expected.to(DEVICE)
    pool_keys_torch(gate, host, writes.pages, writes.filled, expected)
    pool_gpu(gate.kind, k[:, 2:4].to(DEVICE), moved(writes, DEVICE), mine)
    exact = {"rtol": 0, "atol": 0} if selector == "quest" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mine.cpu(), expected, equal_nan=True, **exact)


def test_a_step_that_selects_in_no_layer_has_no_room_for_first_scores():
    exchange = Exchange.make(6, HEADS, GROUP, DIM, MAX_PAGES, pin=DEVICE == "cuda")
    with pytest.raises(ValueError, match="step.selects is False"):
        FirstScores(GpuStep(make(DEVICE, "quest"), [Rule(Select.ALL, 1, 1)] * LAYERS, exchange, None))


@pytest.mark.parametrize("selector", ["quest", "mean", "seer"])
def test_the_first_importance_is_the_last_querys_scores(selector):
    """Added to what the blocks have, for requests of all lengths, as score and record do it."""
    torch.manual_seed(3)
    pool, lens = make(DEVICE, selector), torch.tensor([62, 700, 128, 1000])
    pages = torch.randperm(80)[: 4 * MAX_PAGES].view(4, -1) + 1
    table, slots = table_of(pages), torch.tensor([2, 0, 1, 3])
    batch = Batch.build(table, slots, lens, 1000, 1, 1)
    layer, weight, rows = 1, 3.0, len(lens)
    pool.quick.layers[layer].copy_(torch.randn(pool.quick.layers[layer].shape))
    heads, plain = torch.randn(2, rows, HEADS, GROUP, DIM)
    tapped = Tapped(plain.flatten(1), plain.flatten(1), lens - 1)
    had = torch.rand(pool.importance[layer].shape)
    gate = pool.gate if selector != "seer" else SeerGate([moved(one, "cpu") for one in pool.gate.layers])
    quick = pool.quick.layers[layer].cpu()
    here = SimpleNamespace(quick=SimpleNamespace(layers=[quick] * 2), threads=1)
    expected = had.clone()
    record(gate.score(here, layer, heads, SCALE, batch, tapped), None, expected, batch.pages, batch.n_pages, weight)

    rule = Rule(Select.BUDGET, 1, 1, budget_pages=5)
    exchange = Exchange.make(6, HEADS, GROUP, DIM, MAX_PAGES, pin=DEVICE == "cuda")
    first = FirstScores(GpuStep(pool, [rule] * LAYERS, exchange, None))
    pool.importance[layer].copy_(had)
    first.begin(table.to(DEVICE), slots.to(DEVICE), lens.to(DEVICE), rows)
    first.layer(layer, heads.to(DEVICE), SCALE, weight, moved(tapped, DEVICE))
    used = torch.zeros(len(had), dtype=torch.bool)
    for row in range(rows):
        used[batch.pages[row, : batch.n_pages[row]]] = True
    torch.testing.assert_close(pool.importance[layer].cpu()[used], expected[used], rtol=1e-4, atol=1e-5)
    assert torch.equal(pool.importance[layer].cpu()[~used], had[~used])


@pytest.mark.parametrize("dim", [64, 80])
def test_a_prefix_comes_from_both_tiers(dim):
    host, frames = torch.randn(20, 2, 2, 64, dim), torch.randn(6, 2, 64, dim)
    frame_of = torch.randint(-6, 6, (20, 2), dtype=torch.int32).clamp(min=-1)
    pages = torch.tensor([7, 3, 19, 4])
    expected = torch.stack([host[pages, head] for head in range(2)], 1)  # [page, head, 2, 64, dim]
    for at, page in enumerate(pages):
        for head in range(2):
            if frame_of[page, head] >= 0:
                expected[at, head] = frames[frame_of[page, head]]
    expected = expected.permute(2, 0, 3, 1, 4).reshape(2, 4 * 64, 2, dim)
    pinned = host.pin_memory() if DEVICE == "cuda" else host
    for count in (1, 4):
        got = torch.zeros(2, 300, 2, dim, device=DEVICE)[:, : count * 64]  # in a larger room
        gather_prefix(pinned, frames.to(DEVICE), frame_of.to(DEVICE), pages[:count].to(DEVICE), got)
        assert torch.equal(got.cpu(), expected[:, : count * 64])
