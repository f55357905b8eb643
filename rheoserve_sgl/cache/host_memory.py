"""Memory for the host store: huge pages, spread over the NUMA nodes, pinned for a GPU."""

import logging
import mmap
import time
import weakref

import torch

from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.workers import worker_pool

logger = logging.getLogger(__name__)
HUGE_PAGE = 2 << 20
GIB = 1 << 30
REPORT_SECONDS = 5.0


def zeroed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in anonymous memory of its own, whose pages are mapped at their first touch.

    An unused store so costs address space only. The system is asked for huge pages, because blocks are read in no
    order; where it has none the tensor works all the same.

    Args:
        shape: any shape without a zero
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    # One huge page more, because a mapping need not start at the boundary of one.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    extension().interleave(whole.data_ptr(), whole.nbytes)
    start = -whole.data_ptr() % HUGE_PAGE
    # Its storage starts where it does: torch asks the storage's address whether a tensor is pinned.
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)


def pin_all(owner, tensors: list[torch.Tensor], threads: int):
    """Pin tensors of `zeroed` for a GPU, until `owner` is collected.

    Their pages are first touched by `threads` threads; cudaHostRegister alone would map them one by one. (torch's own
    pinned memory is rounded up to a power of two.)

    Raises:
        torch.cuda.CudaError: the driver's refusal, for example for want of memory
    """
    began = reported = time.perf_counter()
    cudart = torch.cuda.cudart()
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    pinned: list[int] = []
    weakref.finalize(owner, _unpin, pinned).atexit = False
    for tensor in tensors:
        worker_pool(threads).touch(tensor.data_ptr(), tensor.nbytes)
        torch.cuda.check_error(int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)))
        pinned.append(tensor.data_ptr())
        done += tensor.nbytes
        if time.perf_counter() - reported > REPORT_SECONDS:
            reported = time.perf_counter()
            logger.info("RheoServe: pinned %.1f of %.1f GiB, %.0f s", done / GIB, total / GIB, reported - began)


def _unpin(addresses: list[int]):
    for address in addresses:
        error = int(torch.cuda.cudart().cudaHostUnregister(address))
        if error:
            logger.warning("RheoServe: cudaHostUnregister of %#x failed with error %d", address, error)
