"""Write-through of new tokens: into the host store, and into the frames of resident blocks."""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.ops.extension import address, extension


def append(host, frames, frame_of, loc, k, v):
    """Store tokens of one layer.

    Args:
        host: `[all_pages, kv_heads, 2, 64, head_dim]`, in host memory
        frames: `[frames + 1, 2, 64, head_dim]`; the last row takes what is meant for no frame
        frame_of: `[all_pages, kv_heads]` int32, -1 where not resident
        loc: `[tokens]` int64, page * 64 + offset
        k, v: `[tokens, kv_heads, head_dim]` in the store's dtype
    """
    run = append_cpu if frames.device.type == "cpu" else append_torch
    run(host, frames, frame_of, loc, k, v)


def append_torch(host, frames, frame_of, loc, k, v):
    page, offset = loc // PAGE_TOKENS, loc % PAGE_TOKENS
    frame = frame_of[page]
    row = torch.where(frame < 0, len(frames) - 1, frame).long()
    frames[row, 0, offset[:, None]] = k
    frames[row, 1, offset[:, None]] = v
    page, offset = page.cpu(), offset.cpu()
    host[page, :, 0, offset] = k.cpu()
    host[page, :, 1, offset] = v.cpu()


def check_rows(host, k, v):
    """Raise ValueError unless k and v are alike, of the store's dtype, with contiguous `[kv_heads, head_dim]`."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != host.dtype or tensor.shape != k.shape or tensor.stride()[1:] != (k.shape[-1], 1):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}")


def append_cpu(host, frames, frame_of, loc, k, v):
    tokens, kv_heads, dim = k.shape
    itemsize = host.element_size()
    check_rows(host, k, v)
    extension().append(
        address(host, host.dtype, (len(host), kv_heads, 2, PAGE_TOKENS, dim), "host"),
        address(frames, host.dtype, (len(frames), 2, PAGE_TOKENS, dim), "frames"),
        address(frame_of, torch.int32, (len(host), kv_heads), "frame_of"),
        address(loc, torch.int64, (tokens,), "loc"),
        k.data_ptr(),
        v.data_ptr(),
        k.stride(0) * itemsize,
        v.stride(0) * itemsize,
        tokens,
        len(host),
        kv_heads,
        dim * itemsize,
    )
