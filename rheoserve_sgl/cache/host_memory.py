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
LESS = "lower --rheoserve-host-size (or --rheoserve-host-ratio)"


def zeroed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in anonymous memory of its own, whose pages are mapped at their first touch.

    An unused store so costs address space only. The system is asked for huge pages, because blocks are read in no
    order; where it has none the tensor works all the same.

    Args:
        shape: any shape without a zero

    Raises:
        MemoryError: the system refuses so much address space
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    # One huge page more, because a mapping need not start at the boundary of one.
    try:
        memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"the system refuses {size / GIB:.2f} GiB of host memory for a layer of the host store ({error}); "
            f"{LESS}, or raise the limit on address space (ulimit -v)"
        ) from error
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
        MemoryError: the driver refuses to pin so much
    """
    began = reported = time.perf_counter()
    cudart = torch.cuda.cudart()
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0
    pinned: list[int] = []
    weakref.finalize(owner, _unpin, pinned).atexit = False
    for tensor in tensors:
        worker_pool(threads).touch(tensor.data_ptr(), tensor.nbytes)
        error = int(cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        if error:
            raise MemoryError(
                f"the GPU's driver refuses to pin more than {done / GIB:.2f} of the host store's {total / GIB:.2f} GiB "
                f"(cudaHostRegister answers {error}); {LESS}, or raise the limits on memory and on locked memory "
                "(ulimit -l, a container's)"
            )
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
