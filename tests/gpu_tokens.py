"""What a decode step is told and writes, by Triton kernels, against torch (see test_triton.py)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_kernels import DEVICE, TOLERANCE, make_batch, no_bfloat16, tables_of
from gpu_step import moved
from test_attn_gate import make_weights

from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.gate.attn_gate import project_query
from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.ops.append import append_torch
from rheoserve_sgl.ops.attn_gate import gate_keys_torch
from rheoserve_sgl.ops.doorbell import Exchange
from rheoserve_sgl.ops.gpu.append import NewTokens, append_gpu
from rheoserve_sgl.ops.gpu.begin import tell_step
from rheoserve_sgl.ops.gpu.gate import gate_queries_gpu, gate_tap_gpu
from rheoserve_sgl.ops.gpu.score import score_tiles
from rheoserve_sgl.ops.gpu.tables import Scratch
from rheoserve_sgl.runtime.writes import Writes


def moved_all(tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("asks", [True, False])
def test_a_step_is_told_what_each_request_may_select(asks):
    table, where, lens, _ = make_batch([1, 64, 65], context=1024, pages=100)
    where = where.flip(0)  # rows of the token table in another order than the batch's
    limits, tables = torch.randint(1, 99, (12,), dtype=torch.int32), tables_of(table, where, lens)
    exchange = Exchange.make(8, 2, 1, 64, 16, pin=DEVICE == "cuda")
    budgets, weight = torch.full((8,), -1, dtype=torch.int32, device=DEVICE), torch.zeros(1, device=DEVICE)
    begun = exchange.bell[3, :1]
    asker = SimpleNamespace(counter=torch.tensor([77], device=DEVICE), begun=begun) if asks else None
    before = int(begun)
    tell_step(limits.to(DEVICE), tables.requests, budgets, weight, exchange, 3, 1.5, asker)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(budgets[:3].cpu(), limits[where]) and (budgets[5:] == -1).all()  # two rows of padding
    assert float(weight) == 1.5 and int(exchange.batch) == 3 and int(begun) == (77 if asks else before)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_append_equals_torch(dtype, dim):
    torch.manual_seed(dim)
    loc = torch.tensor([2 * 64 + 63, 4 * 64, 5 * 64 + 7, 2 * 64])
    frame_of = torch.full((6, 3), -1, dtype=torch.int32)
    frame_of[2, 1], frame_of[4, 0] = 3, 0
    qkv = torch.randn(4, 9, dim).to(dtype)  # as a fused projection gives them: rows with gaps between
    k, v = qkv[:, 3:6], qkv[:, 6:9]
    host, frames = torch.zeros(6, 3, 2, 64, dim, dtype=dtype), torch.zeros(5, 2, 64, dim, dtype=dtype)
    expected = host.clone(), frames.clone()
    append_torch(*expected, frame_of, loc, k, v)
    if DEVICE == "cuda":
        host, frames, frame_of, loc, qkv = host.pin_memory(), *(t.cuda() for t in (frames, frame_of, loc, qkv))
    append_gpu(NewTokens(host, frames, frame_of, loc, qkv[:, 3:6], qkv[:, 6:9]))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected[0])
    assert torch.equal(frames.cpu()[:-1], expected[1][:-1])  # the last row is nobody's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_pooling", ["Qproj", "Qavgproj", "Qavg"])
@pytest.mark.parametrize("k_pooling", ["Kmaxminavg", "Kminavg", "Kmaxavg", "Kavg"])
def test_the_gates_kernels_equal_torch(q_pooling, k_pooling, dtype):
    """Where keys are bf16 the matrices are as well."""
    if DEVICE == "cpu" and dtype != torch.float32 and (q_pooling, k_pooling) != ("Qproj", "Kmaxminavg"):
        pytest.skip("rounding to bf16 is the same for every pooling: interpreted for one of them, on a GPU for all")
    norm = "max" in k_pooling
    torch.manual_seed(5)
    weights = make_weights(q_pooling, k_pooling, norm, rotates=norm, positions=2048)
    weights = replace(weights, q=weights.q if weights.q is None else weights.q.to(dtype), k=weights.k.to(dtype))
    table, where, lens, batch = make_batch([1, 64, 128, 1000, 2], context=1024, pages=100)
    plain = torch.randn(5, 2, 3, 32)
    positions = lens - 1
    expected = project_query(weights, plain, positions)
    out = torch.zeros(5, 2, 32, device=DEVICE)
    gate_queries_gpu(moved(weights, DEVICE), plain.to(DEVICE), positions.to(DEVICE), out)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)

    keys, running, quick = torch.randn(5, 2, 32), torch.randn(13, 2, 3, 32), torch.randn(100, 2, 32).to(dtype)
    theirs = running.clone(), quick.clone()
    gate_keys_torch(weights, keys, Writes.of_decode(batch), *theirs)
    mine = running.to(DEVICE), quick.to(DEVICE)
    nothing = torch.full((2, 2, 3, 32), torch.nan)  # padding
    padded = (torch.cat((plain, nothing)), torch.cat((keys, nothing[:, :, 0])), torch.cat((positions, positions[:2])))
    q, k, at = (part.flatten(1) if part.ndim > 1 else part for part in moved_all(padded))
    # As a fused projection gives them: rows with gaps between.
    tapped = Tapped(*torch.cat((q, k, k), 1).split((q.shape[1], k.shape[1], k.shape[1]), 1)[:2], at)
    asked, tables = torch.zeros(7, 2, 32, device=DEVICE), tables_of(table, where, lens)
    tables.quiet[2] = 1
    gate_tap_gpu(moved(weights, DEVICE), tapped, tables, *mine, asked)
    expected[2] = 0
    torch.testing.assert_close(asked[:5].cpu(), expected, rtol=1e-4, atol=1e-5)
    rounding = 1e-4 if dtype == torch.float32 else 2**-7  # a last bit that the order of a sum decides
    torch.testing.assert_close(mine[1].cpu(), theirs[1], rtol=rounding, atol=1e-5)
    incomplete = where[[0, 3, 4]]
    assert torch.equal(mine[0].cpu()[incomplete], theirs[0][incomplete])


@pytest.mark.parametrize(("dim", "width", "quiet"), [(64, 64, 0), (128, 48, 0), (32, 64, 1)])
def test_a_token_is_appended_where_its_pages_key_is_there(dim, width, quiet):
    """As with a learned gate, whose width may be another than the heads'."""
    table, where, lens, batch = make_batch([1, 64, 700], context=1024, pages=100)
    keys, q = torch.randn(100, 2, width).bfloat16(), torch.randn(3, 2, 1, width)
    frame_of, loc = torch.full((100, 2), -1, dtype=torch.int32), batch.newest * 64 + batch.tail_len - 1
    frame_of[batch.newest[2], 1] = 0
    tiers = [torch.zeros(shape) for shape in ((100, 2, 2, 64, dim), (2, 2, 64, dim))]
    right, (k, v) = [tier.clone() for tier in tiers], torch.randn(2, 3, 2, dim)
    append_torch(*right, frame_of, loc, k, v)
    host, (frames, *rest) = tiers[0], moved_all((tiers[1], frame_of, loc, k, v))
    new = NewTokens(host.pin_memory() if DEVICE == "cuda" else host, frames, *rest)
    tables, scratch, quick = tables_of(table, where, lens), Scratch.make(3, 2, 1, 16, DEVICE), keys.to(DEVICE)
    tables.quiet.fill_(quiet)
    score_tiles(q.to(DEVICE), quick, tables, scratch, 0.5, "dot", new, pooled=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(new.host, right[0]) and torch.equal(frames[:1].cpu(), right[1][:1])
    assert torch.equal(quick.cpu(), keys)
    if not quiet:
        logits = (q[2, :, 0] * keys.float()[batch.pages[2]]).sum(-1) * 0.5
        torch.testing.assert_close(scratch.logits[2, :, 0, : batch.n_pages[2]].cpu().T, logits[: batch.n_pages[2]])


@pytest.mark.parametrize(
    ("selector", "group", "dtype", "dim", "quiet"),
    [
        ("quest", 1, torch.float32, 64, 0),
        ("quest", 4, torch.float16, 80, 0),
        ("quest", 5, torch.float16, 64, 1),
        pytest.param("quest", 4, torch.bfloat16, 128, 0, marks=no_bfloat16),
        ("mean", 1, torch.float32, 80, 1),
        ("mean", 4, torch.float16, 64, 0),
    ],
)
def test_a_token_is_appended_before_its_page_is_scored(selector, group, dtype, dim, quiet):
    """Token by token, the last of 33 pages: the first of a tile, on which no other program waits."""
    gate, heads, at = make_gate(selector), 2, 32 * 64
    k, v = torch.randn(2, 64, heads, dim).to(dtype)
    table, where, lens, _ = make_batch([at + 64], context=at + 64, pages=40)
    newest = int(table[where[0], at]) // 64
    host, expected = torch.zeros(2, 40, heads, 2, 64, dim, dtype=dtype)
    host = host.pin_memory() if DEVICE == "cuda" else host
    frames = torch.zeros(2, 2, 64, dim, dtype=dtype, device=DEVICE)
    frame_of = torch.full((40, heads), -1, dtype=torch.int32)
    frame_of[newest, 1] = 0
    quick = torch.randn(40, heads, gate.key_dim(dim)).to(dtype if selector == "quest" else torch.float32).to(DEVICE)
    before, scratch = quick.clone(), Scratch.make(3, heads, group, 40, DEVICE)
    q = torch.randn(3, heads, group, dim).to(dtype)
    for t in range(64):
        tables = tables_of(table, where, torch.tensor([at + t + 1]), max_pages=40)
        tables.quiet.fill_(quiet)
        new = torch.zeros(2, 3, heads, dim, dtype=dtype, device=DEVICE)
        new[:, 0] = torch.stack((k[t], v[t]))
        loc = torch.tensor([newest * 64 + t, 0, 0], device=DEVICE)
        tokens = NewTokens(host, frames, frame_of.to(DEVICE), loc, *new)
        score_tiles(q.to(DEVICE), quick, tables, scratch, 0.125, "range" if selector == "quest" else "dot", tokens)
        if t in (0, 20, 63):
            own = gate.pool(k[: t + 1].float().transpose(0, 1)[None], torch.ones(1, 1, t + 1, 1, dtype=torch.bool))[0]
            torch.testing.assert_close(quick[newest].cpu().float(), own, rtol=1e-5, atol=1e-6)
            if not quiet:
                logits = (gate.query(q.float())[0] * own[:, None]).sum(-1) * 0.125
                torch.testing.assert_close(scratch.logits[0, :, :, 32].cpu(), logits, rtol=1e-4, atol=1e-4)
    expected[newest] = torch.stack((k, v)).permute(2, 0, 1, 3)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected) and torch.equal(frames[0].cpu(), expected[newest, 1])
    others = torch.arange(40) != newest
    assert torch.equal(quick[others], before[others]) and not frames[1].any()
