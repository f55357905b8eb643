"""The benchmarks' made-up scores select what they say they do (see test_triton.py)."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rheoserve_sgl.ops.gpu.tables import Scratch, Tables

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from synthetic_scores import SPREAD, Drawn, Traced
from traces.pack import pack

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KV_HEADS, HEADS, MAX_PAGES = 3, 2, 96


def tables_of(lens: list[int]) -> Tables:
    """Requests of these lengths, on pages of their own."""
    tables = Tables.make(len(lens), MAX_PAGES, DEVICE)
    for row, length in enumerate(lens):
        pages = (length + 63) // 64
        tables.pages[row, :pages] = torch.arange(pages, dtype=torch.int32) + 1 + 100 * row
        tables.n_pages[row], tables.tail_len[row] = pages, (length - 1) % 64 + 1
    return tables


def logits_of(source, layer: int, lens: list[int]) -> torch.Tensor:
    """`[batch, kv_heads, heads, max_pages]`, after a look at the tiles' sums."""
    tables, scratch = tables_of(lens), Scratch.make(len(lens), KV_HEADS, HEADS, MAX_PAGES, DEVICE)
    scratch.logits.fill_(-torch.inf)
    source.fill(layer, tables, scratch, KV_HEADS)
    logits, top, total = (part.cpu() for part in (scratch.logits, scratch.tile_max, scratch.tile_sum))
    lse = torch.where(total > 0, top + total.log(), -torch.inf).logsumexp(-1)
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-4)
    return logits


@pytest.mark.parametrize("stretch", [1, 3])
def test_a_trace_is_replayed_there_and_back(tmp_path, stretch):
    steps, layers, heads, prompt, budget = 5, 2, 2, 24, 7
    draw = np.random.default_rng(stretch)
    selected = np.zeros((steps, layers, heads, prompt + 1), bool)
    for place in np.ndindex(steps, layers, heads):
        selected[place][draw.permutation(prompt + 1)[:budget]] = True
    np.savez(tmp_path / "trace.npz", **pack(selected, prompt))
    source = Traced(tmp_path / "trace.npz")
    seen = []
    for step in range(2 * steps + 1):
        logits = logits_of(source, 3, [prompt * stretch * 64 + 1 + step])[0]
        assert torch.equal(logits[:, 0], logits[:, 1])  # of both query heads
        chosen = (logits[:, 0] >= SPREAD).numpy()
        trace_pages = np.stack([chosen[:, at::stretch] for at in range(stretch)]).sum(0)  # at most one of a stretch
        assert trace_pages.max() == 1
        found = trace_pages[:, :prompt].astype(bool)  # of a page begun since, the selected one may not exist yet
        lanes = [selected[:, 3 % layers, head % heads] for head in range(KV_HEADS)]
        seen.append(
            {at for at in range(steps) if all((found[h] == lanes[h][at][:prompt]).all() for h in range(KV_HEADS))}
        )
        assert seen[-1], f"step {step} is none of the trace's"
    order = [min(one) for one in seen]
    assert seen[0] == seen[-1] and set(order) == set(range(steps))
    assert all(abs(a - b) <= 1 for a, b in zip(order, order[1:], strict=False))


def test_drawn_scores_change_by_their_churn(tmp_path):
    budget, steps = 20, 16
    for churn in (0.0, 0.25):
        (tmp_path / "churn").write_text(str(churn))
        source = Drawn(tmp_path / "churn")
        picked = []
        for step in range(steps):
            logits = logits_of(source, 1, [90 * 64 + 1 + step, 33])
            assert torch.isneginf(logits[1, :, :, 1:]).all() and logits[1, :, :, 0].isfinite().all()
            picked.append(torch.topk(logits[0, :, 0], budget).indices)
        new = [len(set(b.tolist()) - set(a.tolist())) for x, y in zip(picked, picked[1:], strict=False)
               for a, b in zip(x, y, strict=True)]  # fmt: skip
        assert abs(np.mean(new) / budget - churn) <= 0.4 * churn
