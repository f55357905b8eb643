"""The learned gate: its maths against float64, its keys however tokens come, its files."""

import json
from dataclasses import replace
from types import SimpleNamespace

import gate_reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rheoserve_sgl.gate.attn_gate import GateWeights, pool_blocks, project_key, project_query
from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.gate.checkpoint import K_POOLINGS, GateConfig, ModelShape, read_gate, take_heads, write_gate
from rheoserve_sgl.gate.oracle import OracleGate
from rheoserve_sgl.gate.seer import SeerGate
from rheoserve_sgl.ops.attn_gate import gate_keys_cpu, gate_keys_torch, gate_queries_cpu
from rheoserve_sgl.ops.score import score_cpu
from rheoserve_sgl.runtime.batch import Batch
from rheoserve_sgl.runtime.writes import Writes

THETA = 1e4
KV_HEADS, GROUP, DIM = 2, 3, 32
SHAPE = ModelShape(layers=2, heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, head_dim=DIM)


def rope(positions: int, width: int) -> torch.Tensor:
    angles = torch.arange(positions)[:, None] * THETA ** (-torch.arange(width // 2).double() / (width // 2))
    return torch.cat((angles.cos(), angles.sin()), 1)


def make_weights(
    q_pooling="Qproj", k_pooling="Kmaxminavg", norm=True, rotates=True, positions=4096, dim=DIM, group=GROUP
) -> GateWeights:
    config = GateConfig(64, dim, q_pooling, k_pooling, use_qk_norm=norm)
    shape = ModelShape(layers=2, heads=KV_HEADS * group, kv_heads=KV_HEADS, head_dim=dim)
    tensors = {name: torch.randn(shape) / 4 for name, shape in config.shapes(shape).items()}
    return GateWeights(
        *(tensors.get(name) for name in ("q", "k", "q_norm", "k_norm")),
        rope=rope(positions, dim).float() if rotates else None,
        parts=config.parts,
    )


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("q_pooling", ["Qproj", "Qavgproj", "Qavg"])
@pytest.mark.parametrize("k_pooling", sorted(K_POOLINGS))
def test_maths_equal_an_independent_float64(q_pooling, k_pooling, block, norm, rotates):
    torch.manual_seed(block)
    weights = make_weights(q_pooling, k_pooling, norm, rotates)
    blocks, at = 5, 5 * block - 1
    k = torch.randn(blocks, block, KV_HEADS, DIM)
    q = torch.randn(1, KV_HEADS, GROUP, DIM)
    gate_q = project_query(weights, q, torch.tensor([at]))[0]
    keys = project_key(weights, pool_blocks(k, weights.parts), torch.arange(blocks) * block)
    got = torch.softmax(torch.einsum("hd,nhd->hn", gate_q, keys) * DIM**-0.5, -1)
    theta = THETA if rotates else None
    np64 = {
        name: None if (t := getattr(weights, name)) is None else t.double().numpy()
        for name in GateWeights.__annotations__
        if name not in ("rope", "parts")
    }
    for head in range(KV_HEADS):
        own_q = gate_reference.query(
            q[0, head].double().numpy(), None if np64["q"] is None else np64["q"][head], np64["q_norm"], at, theta
        )
        own_k = [
            gate_reference.key(
                k[n, :, head].double().numpy(), weights.parts, np64["k"][head], np64["k_norm"], n * block, theta
            )
            for n in range(blocks)
        ]
        np.testing.assert_allclose(got[head], gate_reference.probabilities(own_q, own_k), rtol=2e-4, atol=1e-6)


def make_writes(before: list[int], new: list[int], pages: int):
    """A batch of requests that had `before` tokens each and get `new` more, and where those go."""
    lens = torch.tensor(before) + torch.tensor(new)
    width = int((lens.max() + 63) // 64)
    ids = torch.randperm(pages - 1)[: len(lens) * width].view(len(lens), width) + 1
    table = (ids[:, :, None] * 64 + torch.arange(64)).view(len(lens), -1).to(torch.int32)
    batch = Batch.build(table, torch.arange(len(lens)), lens, int(lens.max()), 1, 0)
    return batch, table, Writes.of_extend(batch, before, new)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=4).filter(
        lambda x: any(n for _, n in x)
    )
)
def test_writes_name_each_token_once(requests):
    before, new = map(list, zip(*requests, strict=True))
    before = [max(b, 1) if n == 0 else b for b, n in requests]
    _, table, writes = make_writes(before, new, 64)
    got = {}
    for page, token, had, has, at in zip(
        *(t.tolist() for t in (writes.pages, writes.token, writes.before, writes.filled, writes.key_position)),
        strict=True,
    ):
        assert at % 64 == 0 and 0 <= had < has <= 64
        for i in range(has - had):
            assert token + i not in got
            got[token + i] = page * 64 + had + i
    expected = [int(table[row, b + i]) for row, (b, n) in enumerate(zip(before, new, strict=True)) for i in range(n)]
    assert [got[i] for i in sorted(got)] == expected
    assert writes.most_new == min(max(new), 64)
    assert torch.equal(writes.fresh, writes.pages[writes.before == 0])


@pytest.mark.parametrize("k_pooling", ["Kmaxminavg", "Kmin", "Kmaxavg"])
@pytest.mark.parametrize("threads", [1, 3])
def test_keys_cpu_equal_torch(k_pooling, threads):
    torch.manual_seed(1)
    weights = make_weights(k_pooling=k_pooling)
    _, _, writes = make_writes([0, 70, 128, 10], [200, 58, 1, 100], 40)
    plain = torch.randn(359, KV_HEADS, DIM)
    running = torch.randn(5, KV_HEADS, 3, DIM)
    quick = torch.randn(40, KV_HEADS, DIM)
    mine, theirs = (running.clone(), quick.clone()), (running.clone(), quick.clone())
    gate_keys_cpu(weights, plain, writes, *mine, threads)
    gate_keys_torch(weights, plain, writes, *theirs)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(mine[0][:4], theirs[0][:4])  # the last slot is nobody's


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=8), st.sampled_from([gate_keys_cpu, gate_keys_torch]))
def test_keys_do_not_depend_on_how_the_tokens_came(chunks, build):
    """At once, in chunks of any length, token by token: the same bits (of C++; torch may differ by its shapes)."""
    total = sum(chunks)
    weights = make_weights()
    plain = torch.randn(total, KV_HEADS, DIM)
    table = (torch.arange(1, total // 64 + 2)[:, None] * 64 + torch.arange(64)).view(1, -1).to(torch.int32)

    def keys(lengths):
        quick, running = torch.zeros(total // 64 + 2, KV_HEADS, DIM), torch.zeros(2, KV_HEADS, 3, DIM)
        done = 0
        for length in lengths:
            lens = torch.tensor([done + length])
            batch = Batch.build(table, torch.tensor([0]), lens, done + length, 1, 0)
            writes = Writes.of_decode(batch) if length == 1 else Writes.of_extend(batch, [done], [length])
            build(weights, plain[done : done + length], writes, running, quick)
            done += length
        return quick

    at_once, in_chunks, by_token = keys([total]), keys(chunks), keys([1] * total)
    if build is gate_keys_cpu:
        assert torch.equal(at_once, in_chunks) and torch.equal(at_once, by_token)
    torch.testing.assert_close(in_chunks, at_once)
    torch.testing.assert_close(by_token, at_once)
    complete = total // 64
    assert bool((at_once[1 : complete + 1] != 0).any(-1).all())
    assert not at_once[complete + 1 :].any()
    expected = project_key(
        weights,
        pool_blocks(plain[: complete * 64].view(-1, 64, KV_HEADS, DIM), weights.parts),
        torch.arange(complete) * 64,
    )
    torch.testing.assert_close(at_once[1 : complete + 1], expected, rtol=1e-4, atol=1e-5)


def test_keys_rotated_at_the_last_token_while_decoding():
    _, _, writes = make_writes([63], [1], 9)
    batch, _, _ = make_writes([63], [1], 9)
    assert writes.key_position.tolist() == [0]
    assert Writes.of_decode(batch, rotate_last=True).key_position.tolist() == [63]


@pytest.mark.parametrize("q_pooling", ["Qproj", "Qavgproj", "Qavg"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rotates", [True, False])
def test_queries_cpu_equal_torch(q_pooling, norm, rotates):
    torch.manual_seed(2)
    weights = make_weights(q_pooling, norm=norm, rotates=rotates)
    q, positions = torch.randn(5, KV_HEADS, GROUP, DIM), torch.tensor([0, 1, 77, 4095, 12])
    expected = project_query(weights, q, positions)
    torch.testing.assert_close(gate_queries_cpu(weights, q, positions), expected, rtol=1e-4, atol=1e-5)


def test_what_is_outside_is_refused():
    weights = make_weights(positions=100)
    with pytest.raises(IndexError, match="position is 100"):
        gate_queries_cpu(weights, torch.randn(1, KV_HEADS, GROUP, DIM), torch.tensor([100]))
    _, _, writes = make_writes([0], [128], 9)
    plain, quick = torch.randn(128, KV_HEADS, DIM), torch.zeros(9, KV_HEADS, DIM)
    with pytest.raises(IndexError, match="request is 3"):
        elsewhere = replace(writes, requests=torch.tensor([0, 3]))
        gate_keys_cpu(weights, plain, elsewhere, torch.zeros(3, KV_HEADS, 3, DIM), quick)
    with pytest.raises(IndexError, match="token is"):
        gate_keys_cpu(weights, plain[:100], writes, torch.zeros(1, KV_HEADS, 3, DIM), quick)
    assert not quick.any()


def test_scores_are_the_softmax_over_blocks():
    torch.manual_seed(3)
    quick, gate_q = torch.randn(9, KV_HEADS, DIM), torch.randn(1, KV_HEADS, DIM)
    pages, n_pages = torch.arange(1, 8)[None], torch.tensor([7], dtype=torch.int32)
    scores = score_cpu(gate_q[:, :, None], quick, pages, n_pages, DIM**-0.5)
    for head in range(KV_HEADS):
        expected = gate_reference.probabilities(gate_q[0, head].double().numpy(), quick[1:8, head].double().numpy())
        np.testing.assert_allclose(scores[0, head].exp(), expected, rtol=1e-4)


def written(path, **changes):
    config = GateConfig(64, DIM, use_qk_norm=True)
    layers = [{name: torch.randn(shape).bfloat16() for name, shape in config.shapes(SHAPE).items()} for _ in range(2)]
    write_gate(path, config, layers, "base")
    stored = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(stored | changes))
    return config, layers


@pytest.mark.parametrize("safetensors", [False, True])
def test_files_hold_what_was_written(safetensors, tmp_path):
    config, layers = written(tmp_path)
    if safetensors:
        published = tmp_path / "attn_gate_weights.pth"
        save_file(torch.load(published, weights_only=True), published.with_suffix(".safetensors"))
        published.unlink()
    again, tensors = read_gate(tmp_path, SHAPE)
    assert again == config
    for before, after in zip(layers, tensors, strict=True):
        assert {name: t.float().tolist() for name, t in before.items()} == {n: t.tolist() for n, t in after.items()}


def test_a_rank_takes_its_heads(tmp_path):
    _, layers = written(tmp_path)
    _, tensors = read_gate(tmp_path, SHAPE)
    own = take_heads(tensors[1], slice(1, 2), ("max", "min", "avg"), None, "cpu")
    assert torch.equal(own.q, layers[1]["q"][1:].float())
    assert torch.equal(own.k, layers[1]["k"][1:].float())
    assert torch.equal(own.k_norm, layers[1]["k_norm"].float())


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"seerattn_gate_block_size": 32}, {}, "seerattn_gate_block_size is 32; legal: 64"),
        ({"seerattn_k_seq_pooling_type": "Kmed"}, {}, "seerattn_k_seq_pooling_type is 'Kmed'; legal: Kmax, "),
        ({"seerattn_q_head_pooling_type": "Qorig"}, {}, "legal: Qproj, Qavgproj, Qavg"),
        ({"seerattn_gate_hidden_size": 64}, {}, "seerattn_gate_hidden_size is 64; legal: 32, the model's head dim"),
        ({"seerattn_gate_hidden_size": "32"}, {}, "seerattn_gate_hidden_size is '32'; legal: a value of type int"),
        ({"seerattn_start_layer": 3}, {}, "seerattn_start_layer is 3; legal: 0 to 2"),
        ({"seerattn_use_qk_norm": False}, {}, r"attngate_qnorm.weight: \[32\]; no tensor fits"),
        ({}, {"layers": 3}, r"layers.2.self_attn.attn_gate.attngate_linear_q.weight: no tensor; \[2, 3, 32, 32\]"),
        ({}, {"layers": 1}, "it has layers up to 1; the model has 1"),
        ({}, {"heads": 8}, r"linear_q.weight: \[2, 3, 32, 32\]; \[2, 4, 32, 32\] fits"),
        ({}, {"head_dim": 64}, "legal: 64, the model's head dim"),
    ],
)
def test_gates_that_do_not_fit_are_refused_by_name(tmp_path, changes, model, message):
    written(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_gate(tmp_path, ModelShape(**vars(SHAPE) | model))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="which has no config.json"):
        read_gate(tmp_path / "nowhere", SHAPE)
    (tmp_path / "config.json").write_text(json.dumps({"seerattn_gate_hidden_size": DIM}))
    with pytest.raises(ValueError, match="attn_gate_weights.safetensors, attn_gate_weights.pth"):
        read_gate(tmp_path, SHAPE)


def test_files_that_are_cut_short_are_named(tmp_path):
    written(tmp_path)
    (tmp_path / "attn_gate_weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="attn_gate_weights.pth cannot be read"):
        read_gate(tmp_path, SHAPE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        read_gate(tmp_path, SHAPE)


@pytest.mark.parametrize("stored", [[1], {"a": 1}, torch.ones(2)], ids=["list", "number", "tensor"])
def test_weights_that_are_no_tensors_by_name_are_refused(stored, tmp_path):
    written(tmp_path)
    torch.save(stored, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(ValueError, match="attn_gate_weights.pth holds something else; legal: tensors by name"):
        read_gate(tmp_path, SHAPE)


@pytest.mark.parametrize("text", ["null", "3", "[]", '"x"'])
def test_a_configuration_that_is_no_object_is_refused(text, tmp_path):
    written(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json holds .*; legal: an object"):
        read_gate(tmp_path, SHAPE)


def test_no_code_of_a_gate_file_is_run(tmp_path):
    written(tmp_path)
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self):
            return ran.touch, ()

    torch.save({"model": Harmful()}, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(ValueError, match="attn_gate_weights.pth cannot be read"):
        read_gate(tmp_path, SHAPE)
    assert not ran.exists()


def test_a_model_may_give_views_of_one_projection():
    """As Llama and Qwen2 do: q and k are parts of wider rows."""
    torch.manual_seed(8)
    _, _, writes = make_writes([0], [130], 9)
    batch, _, _ = make_writes([129], [1], 9)
    q, k = torch.randn(130, KV_HEADS * GROUP * DIM), torch.randn(130, KV_HEADS * DIM)
    fused = torch.cat((q, k), 1)
    views = Tapped(fused[:, : q.shape[1]], fused[:, q.shape[1] :], torch.arange(130))
    results = []
    for tapped in (Tapped(q, k, torch.arange(130)), views):
        torch.manual_seed(9)
        gate = SeerGate([make_weights()])
        gate.prepare(rope(4096, DIM).float(), 4, DIM)
        pool = SimpleNamespace(threads=1, quick=SimpleNamespace(layers=[torch.zeros(9, KV_HEADS, DIM)]))
        gate.refresh(pool, 0, writes, tapped.k, tapped)
        last = tapped.take(torch.tensor([129]))
        heads = torch.zeros(1, KV_HEADS, GROUP, DIM)
        results += [pool.quick.layers[0], gate.score(pool, 0, heads, 1.0, batch, last)]
        results += [gate.score(pool, 0, heads, 1.0, batch, Tapped(*(t[129:] for t in vars(tapped).values())))]
    assert results[0].any()
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        assert torch.equal(mine, theirs)


def test_the_oracle_is_the_attention_itself():
    torch.manual_seed(10)
    host = torch.randn(9, KV_HEADS, 2, 64, DIM)
    table = (torch.tensor([[5, 2, 7], [4, 8, 1]])[:, :, None] * 64 + torch.arange(64)).flatten(1).to(torch.int32)
    lens = torch.tensor([150, 64])
    batch = Batch.build(table, torch.arange(2), lens, 150, 1, 0)
    heads = torch.randn(2, KV_HEADS, GROUP, DIM)
    scores = OracleGate().score(SimpleNamespace(host=SimpleNamespace(layers=[host])), 0, heads, 0.2, batch)
    for row, length in enumerate(lens.tolist()):
        for head in range(KV_HEADS):
            keys = host[batch.pages[row], head, 0].flatten(0, 1)[:length].double()
            p = torch.softmax(heads[row, head].double() @ keys.T * 0.2, -1)
            for page in range(3):
                own = p[:, page * 64 : (page + 1) * 64]
                expected = own.max().log() if own.numel() else torch.tensor(-torch.inf, dtype=torch.float64)
                torch.testing.assert_close(scores[row, head, page].double(), expected, rtol=1e-4, atol=1e-4)
