"""Kernels that are launched before the one in front of them has ended, so that starting them costs no time.

CUDA's programmatic dependent launch, from compute capability 9.0 on. A kernel is launched with `**early(device)` and
calls `start` before it writes anything, and before it reads what the kernel in front writes. What older kernels wrote
it may read at once, if the one in front calls `start` as well or is no such kernel: then those have ended. One that
needs nothing of what the kernel in front writes may call `let_next` first and `wait` last, and work beside it: what
follows waits for both.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def start(EARLY: tl.constexpr):
    """Wait for the kernel in front, and let the next one be launched."""
    wait(EARLY)
    let_next(EARLY)


@triton.jit
def wait(EARLY: tl.constexpr):
    """Wait until the kernel in front has ended."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next(EARLY: tl.constexpr):
    """Let the next kernel be launched once all programs have come this far."""
    if EARLY:
        gdc_launch_dependents()


@cache
def early(device: torch.device) -> dict:
    """Launch options of a kernel on a device."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}
