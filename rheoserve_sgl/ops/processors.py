"""How many processors this process may use."""

import math
import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def usable_threads() -> int:
    """Its affinity, cut by the CPU quotas of its cgroups."""
    return max(int(min(len(os.sched_getaffinity(0)), cpu_quota())), 1)


def cpu_quota(root: Path = ROOT, own: Path = OWN) -> float:
    """Processors' worth of time that cgroups, of version 2 or 1, leave this process; infinite where there is no limit.

    Args:
        root: where cgroups are mounted
        own: which cgroups the process is in, `/proc/self/cgroup`
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    found = [_quota_v2(root)]  # in a container its own group is the root, whatever `own` says
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base, read = (root / controllers, _quota_v1) if controllers else (root, _quota_v2)
        inner = base / path.lstrip("/")
        found += [read(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return min(found)


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
