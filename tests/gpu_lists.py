"""Resident lists, made with a plan or before it, against torch (see test_triton.py)."""

import pytest
import torch
from gpu_kernels import DEVICE, make_batch, tables_of

from rheoserve_sgl.cache.residency import ARRIVING
from rheoserve_sgl.ops.doorbell import Exchange
from rheoserve_sgl.ops.gpu.listing import Listing, list_gpu
from rheoserve_sgl.ops.gpu.move import BESIDE
from rheoserve_sgl.ops.gpu.plan import plan_gpu
from rheoserve_sgl.ops.plan import Rule, Select, Visit, plan_torch


@pytest.mark.parametrize("lists", ["of the selection", "made before", "made by another plan"])
@pytest.mark.parametrize("done", [0, BESIDE - 1, BESIDE])
def test_blocks_that_came_to_this_layer_are_read_from_their_frames(done, lists):
    """Only once every program that copies is done with the layer; until then the CPU visits them."""
    rule = Rule(Select.ALL, 1, 1)
    table, where, lens, batch = make_batch([700, 1000], context=1024, pages=100)
    frame_of = torch.randint(-99, 99, (100, 2), dtype=torch.int32).clamp(min=-1)
    coming = torch.rand(100, 2) < 0.5
    given = frame_of.where(~coming | (frame_of < 0), ARRIVING - frame_of).to(DEVICE)
    known = frame_of if done == BESIDE else frame_of.where(~coming, -1)
    expected = plan_torch(rule, None, batch.pages, batch.n_pages, batch.tail_len, known)
    tables, exchange = tables_of(table, where, lens), Exchange.make(4, 2, 1, 64, 16, DEVICE == "cuda")
    device, other = (Visit(*(torch.zeros_like(t, device=DEVICE) for t in vars(exchange.visit).values())) for _ in "ab")
    totals, count = torch.zeros((20, 3), dtype=torch.int64, device=DEVICE), torch.zeros_like(device.count)
    others = (torch.zeros(s, device=DEVICE) for s in ((100, 2), 1))
    q, arrived = torch.randn(4, 2, 1, 64, device=DEVICE), torch.tensor([done], dtype=torch.int32, device=DEVICE)
    rest = (*others, torch.zeros_like(count[:, 0]), exchange)
    own = device
    if lists != "of the selection":
        seen = torch.zeros_like(count)
        listing = Listing(tables, given, arrived, device, seen)
        if lists == "made before":
            list_gpu(listing)
        else:  # of a layer of which nothing is resident
            nowhere = torch.full_like(given, -1)
            plan_gpu(rule, q, tables, None, nowhere, *rest, other, count.clone(), totals, following=listing)
            assert not other.count.any()
        arrived.fill_(0)  # what it is later does not matter
        own, arrived = None, seen
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    plan_gpu(rule, q, tables, None, given, *rest, own, count, totals, arrived=arrived)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for got, wanted in ((device, expected.device), (exchange.visit, expected.host)):
        assert torch.equal(got.count[:2].cpu(), wanted.count) and not got.count[2:].any()
        assert torch.equal(got.last_len[:2].cpu(), wanted.last_len)
        parts = zip(
            got.blocks[:2].flatten(0, 1).cpu(), wanted.blocks.flatten(0, 1), wanted.count.flatten(), strict=True
        )
        assert all(torch.equal(mine[:count], theirs[:count]) for mine, theirs, count in parts)


def test_lists_that_depend_on_the_selection_cannot_be_made_before():
    rule = Rule(Select.FORCED, 1, 1, selected_only=True)
    with pytest.raises(ValueError, match="selected_only"):
        plan_gpu(rule, *[None] * 11)
