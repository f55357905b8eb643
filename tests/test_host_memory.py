"""Memory of the host store."""

import gc
import subprocess
import sys

import pytest
import torch

from rheoserve_sgl.cache.host_memory import HUGE_PAGE, pin_all, zeroed
from rheoserve_sgl.cache.host_store import HostStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (1 << 20, 3)])
def test_zeroed_memory_is_aligned_and_lives_as_long_as_its_views(dtype, shape):
    tensor = zeroed(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.data_ptr() % HUGE_PAGE == 0
    assert not tensor.any()
    view = tensor.flatten()[-1:]
    view.fill_(3)
    del tensor
    gc.collect()
    assert float(view) == 3.0


REFUSED = """
import resource, torch
from rheoserve_sgl.cache.host_store import HostStore
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), resource.RLIM_INFINITY))
try:
    HostStore(2, 10_000, 2, 64, torch.bfloat16, pin=False)
except MemoryError as error:
    print(error)
"""


def test_memory_that_the_system_refuses_is_named_with_the_flag():
    out = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=300)
    assert "the system refuses 0.31 GiB of host memory" in out.stdout, out.stdout + out.stderr
    assert "lower --rheoserve-host-size" in out.stdout


def test_a_driver_that_refuses_to_pin_is_named_with_the_limits(monkeypatch):
    """What was pinned before is given back with the store."""
    calls = []

    class Driver:
        def cudaHostRegister(self, address, size, flags):
            calls.append(address)
            return 0 if len(calls) < 3 else 2

        def cudaHostUnregister(self, address):
            calls.remove(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    tensors = [zeroed((1 << 18,), torch.float32) for _ in range(4)]

    class Owner:
        pass

    owner = Owner()
    with pytest.raises(MemoryError, match=r"refuses to pin more than 0.00 of the host store's 0.00 GiB .*answers 2.*"):
        pin_all(owner, tensors, 1)
    assert len(calls) == 3
    del owner
    gc.collect()
    assert len(calls) == 1  # the one that was refused


@pytest.mark.gpu
def test_a_pinned_store_is_pinned_until_it_goes():
    store = HostStore(2, 40, 2, 64, torch.bfloat16, pin=True, threads=2)
    layer = store.layers[0]
    assert layer.is_pinned() and not layer.any()
    there = torch.empty_like(layer, device="cuda")
    layer.fill_(2)
    there.copy_(layer, non_blocking=True)
    torch.cuda.synchronize()
    assert bool((there == 2).all())
    del store
    gc.collect()
    assert not layer.is_pinned()
