"""What processors there are, and how many this process may use."""

import math
import os
import platform
from pathlib import Path

from rheoserve_sgl.ops.cgroups import OWN, ROOT, own_groups


def processor_name() -> str:
    """As the system names it; the architecture where it has no name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def usable_threads() -> int:
    """Its affinity, cut by the CPU quotas of its cgroups."""
    return max(int(min(len(os.sched_getaffinity(0)), cpu_quota())), 1)


def own_part(masks: list[list[int]], rank: int) -> list[int]:
    """The processors of one rank: no other rank has them.

    Args:
        masks: what each rank may use. Those that the same ranks may use are shared by these; so a rank that is bound to
            its device's NUMA node shares them with that node's ranks only
    """
    may_use = [set(mask) for mask in masks]
    shared: dict[tuple[int, ...], list[int]] = {}
    for processor in masks[rank]:
        ranks = tuple(other for other, mask in enumerate(may_use) if processor in mask)
        shared.setdefault(ranks, []).append(processor)
    own = []
    for ranks, processors in shared.items():
        at, count = ranks.index(rank), len(processors)
        own += processors[count * at // len(ranks) : count * (at + 1) // len(ranks)]
    return sorted(own)


def pinned(processors: list[int], threads: int) -> list[int]:
    """Those that so many polling threads have, one each: the last ones; none where there are too few."""
    return processors[-threads:] if len(processors) >= threads else []


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float:
    """Processors' worth of time that its cgroups leave this process, infinite where there is no limit; Args as in
    `own_groups`."""
    read = {1: _quota_v1, 2: _quota_v2}
    return min(read[version](folder) for folder, version in own_groups("cpu", root, own))


def _quota_v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def _quota_v1(folder: Path) -> float:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
