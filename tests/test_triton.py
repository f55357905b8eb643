"""The Triton kernels: under Triton's interpreter on any machine, compiled on a GPU."""

import importlib.util
import sys

import pytest
import torch
from test_attention import check, make_visit, oracle

from rheoserve_sgl.ops.append import append_torch
from rheoserve_sgl.ops.plan import Visit

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


def kernels(name: str, device: str):
    """The module rheoserve_sgl.ops.<name>; on a CPU, a copy whose kernels are interpreted."""
    spec = importlib.util.find_spec(f"rheoserve_sgl.ops.{name}")
    if device == "cuda":
        return importlib.import_module(spec.name)
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"{name}_here", spec.origin))
    sys.modules[module.__name__] = module  # Triton looks the source up there
    module.__spec__.loader.exec_module(module)
    return module


def attend(device: str, q, blocks, visit: Visit, scale: float):
    there = Visit(*(t.to(device) for t in (visit.blocks, visit.count, visit.last_len)))
    result = kernels("attend_gpu", device).attend_gpu(q.to(device), blocks.to(device), there, scale)
    return [part.cpu() for part in result]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 5), (128, 4), (128, 16), (256, 7)])
def test_attention_over_lists_equals_the_oracle(device, dtype, dim, group):
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 as integers")
    torch.manual_seed(dim + group)
    blocks = torch.randn(30, 2, 64, dim).to(dtype)
    q = torch.randn(2, 2, group, dim).to(dtype).float()
    visit = make_visit(2, 2, (1, 9, 0, 5), 30, group)
    expected = oracle(q, blocks, visit, dim**-0.5)
    check(attend(device, q, blocks, visit, dim**-0.5), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("last", [1, 17, 63, 64])
def test_nothing_behind_a_tail_is_read(device, last):
    torch.manual_seed(last)
    blocks, q = torch.randn(6, 2, 64, 64), torch.randn(1, 1, 4, 64)
    lists = torch.tensor([[[3, 5]]], dtype=torch.int32)
    visit = Visit(lists, torch.tensor([[2]], dtype=torch.int32), torch.tensor([[last]], dtype=torch.int32))
    expected = oracle(q, blocks, visit, 0.125)
    blocks[5, :, last:] = torch.nan
    check(attend(device, q, blocks, visit, 0.125), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_append_equals_torch(device, dtype, dim):
    torch.manual_seed(dim)
    loc = torch.tensor([2 * 64 + 63, 4 * 64, 5 * 64 + 7, 2 * 64])
    frame_of = torch.full((6, 3), -1, dtype=torch.int32)
    frame_of[2, 1], frame_of[4, 0] = 3, 0
    qkv = torch.randn(4, 9, dim).to(dtype)  # as a fused projection gives them: rows with gaps between
    k, v = qkv[:, 3:6], qkv[:, 6:9]
    host, frames = torch.zeros(6, 3, 2, 64, dim, dtype=dtype), torch.zeros(5, 2, 64, dim, dtype=dtype)
    expected = host.clone(), frames.clone()
    append_torch(*expected, frame_of, loc, k, v)
    if device == "cuda":
        host, frames, frame_of, loc, qkv = host.pin_memory(), *(t.cuda() for t in (frames, frame_of, loc, qkv))
    kernels("append_gpu", device).append_gpu(host, frames, frame_of, loc, qkv[:, 3:6], qkv[:, 6:9])
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected[0])
    assert torch.equal(frames.cpu()[:-1], expected[1][:-1])  # the last row is nobody's
