"""The Triton kernels that move blocks against torch (see test_triton.py)."""

import os
from types import SimpleNamespace

import pytest
import torch
from gpu_step import moved

from rheoserve_sgl.cache.pool import addresses
from rheoserve_sgl.cache.residency import RESERVED, Moves, Residency
from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.coordinator.swap import Ranking, swap_torch
from rheoserve_sgl.ops.gpu.move import fill_frames
from rheoserve_sgl.ops.gpu.swap import swap_gpu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_frames_are_filled_from_the_host_store(dim, dtype):
    host = [torch.randn(20, 2, 64, dim).to(dtype) for _ in range(3)]
    frames = [torch.randn(9, 2, 64, dim).to(dtype) for _ in range(3)]
    moves = Moves(
        torch.tensor([[7, 19, 0], [0, 0, 0], [3, 0, 0]]),
        torch.tensor([[2, 0, 8], [9, 9, 9], [4, 9, 9]]),
        torch.tensor([3, 0, 1]),
    )
    expected = [layer.clone() for layer in frames]
    for layer, count in enumerate(moves.count.tolist()):
        expected[layer][moves.frame[layer, :count]] = host[layer][moves.block[layer, :count]]
    own = [layer.to(DEVICE) for layer in frames]
    pinned = [layer.pin_memory() for layer in host] if DEVICE == "cuda" else host
    where = (addresses(tensors, DEVICE) for tensors in (pinned, own))
    arrived = torch.tensor([0, 5, 0], dtype=torch.int32, device=DEVICE)
    fill_frames(*where, host[0][0].nbytes, moved(moves, DEVICE), programs=2, arrived=arrived)
    assert arrived.tolist() == [2, 7, 2]
    for layer, right in zip(own, expected, strict=True):
        assert torch.equal(layer.cpu(), right)


@pytest.mark.parametrize("mode", ["balanced", "full", "window"])
@pytest.mark.parametrize("shared", [False, True])
def test_swaps_equal_torch(mode, shared):
    """Two requests that share pages may want the same block, or each other's: which of them wins is free."""
    torch.manual_seed(shared)
    layers, heads, all_pages, frames = 3, 2, 60, 40
    config = RheoConfig(mode=mode, device_tokens=64, window_tokens=128, token_budget=256)
    counts = torch.tensor([14, 1, 9], dtype=torch.int32)
    pages = torch.randperm(all_pages - 1)[:48].view(3, 16).int() + 1
    if shared:
        pages[2, :8] = pages[0, :8]
    pages = pages.where(torch.arange(16) < counts[:, None], 0)
    residency = Residency(layers, all_pages, heads, frames, "cpu")
    wanted = (torch.rand(layers, all_pages, heads) < 0.5) & torch.zeros(all_pages, dtype=torch.bool).index_fill_(
        0, pages[pages > 0].long(), True
    )[:, None]
    residency.admit(residency.reserve(wanted, frames))
    mine = Residency(layers, all_pages, heads, frames, DEVICE)
    mine.frame_of.copy_(residency.frame_of), mine.owners.copy_(residency.owners)
    importance = torch.rand(layers, all_pages, heads)
    tables = SimpleNamespace(pages=pages, n_pages=counts)
    theirs = SimpleNamespace(pages=pages.to(DEVICE), n_pages=counts.to(DEVICE))
    for most, least in ((3, 0.5), (32, 0.0)):
        expected = swap_torch(Ranking.of(config), residency, importance, tables, most, least)
        got = swap_gpu(Ranking.of(config), mine, importance.to(DEVICE), theirs, most, least)
        for ours, others in zip(got, expected, strict=True):
            for layer in range(layers):
                lists = [sorted(moves.block[layer, : int(moves.count[layer])].tolist()) for moves in (ours, others)]
                assert lists[0] == lists[1] or shared
                assert len(set(lists[0])) == len(lists[0])
        if not shared:
            assert torch.equal(mine.frame_of.cpu(), residency.frame_of)
            assert torch.equal(mine.owners.cpu(), residency.owners)
        for moves in got:
            mine.admit(moves)
        for moves in expected:
            residency.admit(moves)
        held = torch.nonzero(mine.frame_of >= 0).tolist()
        assert len(held) == int((mine.owner >= 0).sum()) == int((residency.owner >= 0).sum())
        assert not (mine.frame_of < -1).any() and not (mine.owner == RESERVED).any()
        for layer, page, head in held:
            assert mine.owner[layer, mine.frame_of[layer, page, head]] == page * heads + head
        if shared:  # from the same state again
            residency.frame_of.copy_(mine.frame_of), residency.owners.copy_(mine.owners)
