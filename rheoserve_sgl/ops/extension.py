"""The compiled extension, and the checks before a tensor's address is handed to it."""

import functools
import os

import torch

from rheoserve_sgl import environ

# The order of rheo::DType in csrc/block_attention.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def extension():
    """The pybind11 module `rheoserve_sgl._C` (imported late: SGLang's main process never needs it)."""
    from rheoserve_sgl import _C

    return _C


def address(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple, name: str) -> int:
    """The address of a contiguous CPU tensor of this dtype and shape, or ValueError naming what differs."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected {dtype} {tuple(shape)} on cpu"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()})")
    return tensor.data_ptr()


@functools.lru_cache(maxsize=8)
def worker_pool(threads: int, variant: str = ""):
    """The process's worker pool of this size, with the kernel variant chosen once.

    Raises:
        ValueError: a variant (argument or RHEOSERVE_CPU_VARIANT) that cannot run here
    """
    return extension().Attention(threads, variant or environ.cpu_variant())


def cpu_variant() -> str:
    """Which kernel variant CPU attention runs in this process, as RHEOSERVE_CPU_VARIANT names them."""
    return worker_pool(1).variant


def usable_threads() -> int:
    """Processors this process may use: its affinity, cut by a cgroup CPU quota."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 quota
    return count
