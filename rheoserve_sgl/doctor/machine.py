"""Processors, memory and GPUs, as far as RheoServe's speed or start depends on them."""

import os
import resource
import time
from functools import partial
from pathlib import Path

import psutil
import torch

from rheoserve_sgl.cache.host_memory import zeroed
from rheoserve_sgl.doctor.finding import Finding, find
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.ops.gpu.timing import fastest
from rheoserve_sgl.ops.processors import usable_threads
from rheoserve_sgl.ops.workers import cpu_variant, self_test, worker_pool
from rheoserve_sgl.runtime.memory import free_host_bytes

GB = 10**9
READ = 512 << 20  # bytes, more than a last-level cache of most machines
COPIED = 256 << 20
PCIE_SLOW = 12e9  # bytes a second; a fourth generation's 16 lanes make about 25


def look_at_machine() -> list[Finding]:
    checks = {
        "processors": processors,
        "CPU kernels": kernels,
        "host memory": memory,
        "huge pages": huge_pages,
        "locked memory": locked_memory,
        "NUMA nodes": numa_nodes,
        "GPU": gpu,
    }
    if torch.cuda.is_available():
        checks["PCIe"] = pcie
    return [find(name, look) for name, look in checks.items()]


def processors() -> Finding:
    usable, there = usable_threads(), os.cpu_count()
    if usable < there:
        advice = "by affinity or a cgroup quota; the CPU's share of a step grows with fewer"
        return Finding("processors", f"{usable} usable of {there}", "note", advice)
    return Finding("processors", f"{usable}")


def kernels() -> Finding:
    fails = {name: why for name in extension().cpu_variants() if (why := self_test(name))}
    text = f"{cpu_variant()}; legal here: {', '.join(extension().cpu_variants())}"
    if fails:
        why = "; ".join(f"{name}: {reason}" for name, reason in fails.items())
        return Finding("CPU kernels", text, "note", f"announced by the processor, but failing: {why}")
    return Finding("CPU kernels", text)


def memory() -> Finding:
    """Free memory, and what the kernels' threads read of it a second."""
    free, threads = free_host_bytes(), usable_threads()
    text = f"{free / GB:.1f} GB free of {psutil.virtual_memory().total / GB:.1f}"
    if free < 4 * READ:
        return Finding("host memory", text, "bad", "the host store holds the whole KV cache; free some")
    store, pool = zeroed((READ,), torch.uint8), worker_pool(threads)
    pool.touch(store.data_ptr(), READ)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        pool.stream_read(store.data_ptr(), READ)
        times.append(time.perf_counter() - began)
    return Finding("host memory", f"{text}; read at {READ / min(times) / GB:.0f} GB/s by {threads} threads")


def huge_pages() -> Finding:
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not file.is_file():
        return Finding("huge pages", "the kernel has none", "note", "the host store is pinned more slowly")
    chosen = file.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        advice = f"echo madvise > {file} lets the host store be pinned faster"
        return Finding("huge pages", "never", "note", advice)
    return Finding("huge pages", chosen)


def locked_memory() -> Finding:
    """What a process may lock: drivers count pinned memory against it on some systems."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    text = f"at most {limit / GB:.3g} GB"
    if not torch.cuda.is_available():
        return Finding("locked memory", text)  # nothing is pinned
    return Finding("locked memory", text, "note", "if pinning the host store fails: ulimit -l unlimited")


def numa_nodes() -> Finding:
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if len(nodes) > 1:
        text = f"{len(nodes)}; the host store is spread over them"
        return Finding("NUMA nodes", text, "note", "a server bound to one node (numactl) reads its own memory faster")
    return Finding("NUMA nodes", f"{max(len(nodes), 1)}")


def gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none: serves on the CPU, with frames in host memory")
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    text = f"{torch.cuda.device_count()} x {found.name}, {free / GB:.1f} GB free of {total / GB:.1f}"
    if (found.major, found.minor) < (8, 0):
        text += f", compute capability {found.major}.{found.minor}"
        return Finding("GPU", text, "note", "the kernels were compiled for 8.0 and newer")
    return Finding("GPU", text)


def pcie() -> Finding:
    """Copies of pinned memory, each way: what exchanges and prefill are bound by."""
    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    rates = {}
    for way, source, target in (("to the GPU", host, device), ("back", device, host)):
        rates[way] = COPIED / fastest(partial(target.copy_, source, non_blocking=True))
    text = ", ".join(f"{rate / GB:.1f} GB/s {way}" for way, rate in rates.items())
    if min(rates.values()) < PCIE_SLOW:
        return Finding("PCIe", text, "note", "slow for a GPU of today; see that it has all its lanes")
    return Finding("PCIe", text)
