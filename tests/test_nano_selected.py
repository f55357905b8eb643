"""Training with attention as it is served: against dense attention, and against a plain form of the selection."""

import pytest
import torch

from benchmarks.nano.gates import WINDOW, Gates
from benchmarks.nano.model import Nano, Size
from benchmarks.nano.selected import ALWAYS, QUERIES, Selected, draw_blocks, draw_run
from rheoserve_sgl.gate.attn_gate import pool_blocks, project_key, project_query

SIZE = Size(vocabulary=50, hidden=32, inner=32, layers=1, heads=4, kv_heads=2, head_dim=16, context=1024)


def attention_inputs(length: int) -> tuple[Gates, tuple]:
    """Gates, and what a layer gives to what changes its attention; dense attention is last."""
    torch.manual_seed(0)
    model, gates, kept = Nano(SIZE), Gates(SIZE), []

    def keep(layer, *inputs):
        kept.extend(inputs)
        return inputs[-1]

    with torch.no_grad():
        model(torch.randint(SIZE.vocabulary, (2, length)), None, keep)
    return gates, tuple(kept)


def picked(gates: Gates, plain, angles, position: int, kv_head: int, near: list[int], count: int) -> list[int]:
    """The blocks of one sequence that a query's gate puts first, of those that are not near."""
    q, k = plain
    weights = gates.weights(0, angles)
    far = [block for block in range(position // 64) if block not in near]
    query = project_query(weights, q[position].view(1, 2, 2, -1), torch.tensor([position]))[0, kv_head]

    def score(block: int) -> float:
        pooled = pool_blocks(k[None, 64 * block : 64 * block + 64], weights.parts)
        return float(project_key(weights, pooled, torch.tensor([64 * block]))[0, kv_head] @ query)

    return sorted(far, key=score, reverse=True)[:count]


@pytest.mark.parametrize("length", [640, 1000])
@torch.no_grad()
def test_all_blocks_are_dense_attention(length):
    gates, (*inputs, dense) = attention_inputs(length)
    recalls = torch.rand(2, length) < 0.5
    got = Selected(gates, recalls, -(-length // 64))(0, *inputs, dense)
    torch.testing.assert_close(got, dense)


@pytest.mark.parametrize(("length", "more"), [(640, 1), (1000, 2)])
@torch.no_grad()
def test_what_recalls_attends_to_the_blocks_that_its_gate_picks(length, more):
    gates, (*inputs, dense) = attention_inputs(length)
    plain, (q, k), v, angles = inputs
    recalls = torch.rand(2, length) < 0.2
    recalls[1] = False
    got = Selected(gates, recalls, ALWAYS + more)(0, *inputs, dense)
    assert torch.equal(got[1], dense[1])
    assert torch.equal(got[0, :, ~recalls[0]], dense[0, :, ~recalls[0]])
    left_out = 0
    for position in torch.nonzero(recalls[0])[:, 0].tolist():
        near = [0, *range(max(position // 64 - WINDOW // 64, 0), position // 64 + 1)]
        for head in range(4):
            best = picked(gates, [tensor[0] for tensor in plain], angles, position, head // 2, near, more)
            tokens = [t for block in {*near, *best} for t in range(64 * block, 64 * block + 64) if t <= position]
            share = torch.softmax(k[0, tokens, head // 2] @ q[0, position, head] / 4, 0)
            torch.testing.assert_close(got[0, head, position], share @ v[0, tokens, head // 2], rtol=1e-4, atol=1e-5)
            left_out += len(tokens) <= position
    assert left_out > 20


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match=f"blocks is {ALWAYS - 1}: at least {ALWAYS}"):
        Selected(Gates(SIZE), torch.ones(1, 8, dtype=torch.bool), ALWAYS - 1)


def test_positions_are_a_run_of_those_that_recall():
    recalls = torch.zeros(5000, dtype=torch.bool)
    recalls[::3] = True
    for _ in range(20):
        run = draw_run(recalls)
        assert len(run) == QUERIES and (run.diff() == 3).all() and recalls[run].all()
    assert draw_run(recalls[:30]).tolist() == list(range(0, 30, 3))
    assert draw_run(torch.zeros(9, dtype=torch.bool)).tolist() == []


def test_blocks_are_about_a_sixteenth():
    torch.manual_seed(0)
    assert {draw_blocks(32768) for _ in range(50)} == {16, 32, 64}
    assert {draw_blocks(256) for _ in range(20)} == {ALWAYS + 2}
