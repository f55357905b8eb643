"""Write-through: host store and frames get every token, in every implementation."""

import pytest
import torch

from rheoserve_sgl.ops.append import append_cpu, append_torch


@pytest.mark.parametrize("run", [append_cpu, append_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80])
def test_tokens_land_in_both_tiers(run, dtype, dim):
    torch.manual_seed(dim)
    host, frames = torch.zeros(6, 3, 2, 64, dim, dtype=dtype), torch.zeros(5, 2, 64, dim, dtype=dtype)
    frame_of = torch.full((6, 3), -1, dtype=torch.int32)
    frame_of[2, 1], frame_of[4, 0] = 3, 0
    loc = torch.tensor([2 * 64 + 63, 4 * 64, 5 * 64 + 7, 2 * 64])
    k, v = torch.randn(2, 4, 3, dim).to(dtype)
    run(host, frames, frame_of, loc, k, v)
    for i, at in enumerate(loc.tolist()):
        page, offset = divmod(at, 64)
        for head in range(3):
            assert torch.equal(host[page, head, 0, offset], k[i, head])
            assert torch.equal(host[page, head, 1, offset], v[i, head])
            if frame_of[page, head] >= 0:
                assert torch.equal(frames[frame_of[page, head], :, offset], host[page, head, :, offset])
    assert int((host != 0).any(-1).sum()) == 4 * 3 * 2
    assert int((frames[:4] != 0).any(-1).sum()) == 3 * 2


def test_strided_rows_of_a_fused_projection():
    qkv = torch.randn(4, 5, 64)
    host, frames = torch.zeros(2, 2, 2, 64, 64), torch.zeros(1, 2, 64, 64)
    append_cpu(
        host,
        frames,
        torch.full((2, 2), -1, dtype=torch.int32),
        torch.arange(64, 68),
        qkv[:, 1:3],
        qkv[:, 3:5],
    )
    assert torch.equal(host[1, :, 0, :4].transpose(0, 1), qkv[:, 1:3])
    assert torch.equal(host[1, :, 1, :4].transpose(0, 1), qkv[:, 3:5])


def test_a_location_outside_the_store_is_refused_and_nothing_is_written():
    host, frames = torch.zeros(2, 1, 2, 64, 64), torch.zeros(1, 2, 64, 64)
    with pytest.raises(IndexError, match="location 128 of token 1"):
        append_cpu(
            host,
            frames,
            torch.full((2, 1), -1, dtype=torch.int32),
            torch.tensor([3, 128]),
            torch.ones(2, 1, 64),
            torch.ones(2, 1, 64),
        )
    assert not host.any()


def test_wrong_dtype_is_refused_by_name():
    host, frames = torch.zeros(2, 1, 2, 64, 64), torch.zeros(1, 2, 64, 64)
    with pytest.raises(ValueError, match="k is torch.bfloat16"):
        append_cpu(
            host,
            frames,
            torch.full((2, 1), -1, dtype=torch.int32),
            torch.tensor([3]),
            torch.ones(1, 1, 64, dtype=torch.bfloat16),
            torch.ones(1, 1, 64),
        )
