"""The Triton kernels against torch: test_triton.py runs this file, interpreted or compiled for a GPU."""

import os

import pytest
import torch
from test_attention import check, make_visit, oracle

from rheoserve_sgl.ops.append import append_torch
from rheoserve_sgl.ops.append_gpu import append_gpu
from rheoserve_sgl.ops.attend_gpu import attend_gpu
from rheoserve_sgl.ops.plan import Visit

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def attend(q, blocks, visit: Visit, scale: float):
    there = Visit(*(t.to(DEVICE) for t in (visit.blocks, visit.count, visit.last_len)))
    result = attend_gpu(q.to(DEVICE), blocks.to(DEVICE), there, scale)
    return [part.cpu() for part in result]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 5), (128, 4), (128, 16), (256, 7)])
def test_attention_over_lists_equals_the_oracle(dtype, dim, group):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as integers")
    torch.manual_seed(dim + group)
    blocks = torch.randn(30, 2, 64, dim).to(dtype)
    q = torch.randn(2, 2, group, dim).to(dtype).float()
    visit = make_visit(2, 2, (1, 9, 0, 5), 30, group)
    expected = oracle(q, blocks, visit, dim**-0.5)
    check(attend(q, blocks, visit, dim**-0.5), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("last", [1, 17, 63, 64])
def test_nothing_behind_a_tail_is_read(last):
    torch.manual_seed(last)
    blocks, q = torch.randn(6, 2, 64, 64), torch.randn(1, 1, 4, 64)
    lists = torch.tensor([[[3, 5]]], dtype=torch.int32)
    visit = Visit(lists, torch.tensor([[2]], dtype=torch.int32), torch.tensor([[last]], dtype=torch.int32))
    expected = oracle(q, blocks, visit, 0.125)
    blocks[5, :, last:] = torch.nan
    check(attend(q, blocks, visit, 0.125), expected)


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
    append_gpu(host, frames, frame_of, loc, qkv[:, 3:6], qkv[:, 6:9])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected[0])
    assert torch.equal(frames.cpu()[:-1], expected[1][:-1])  # the last row is nobody's
