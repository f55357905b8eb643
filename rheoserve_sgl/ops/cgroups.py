"""The cgroups that limit this process: its own and those around it, of version 2 or 1."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def own_groups(controller: str, root: Path = ROOT, own: Path = OWN) -> list[tuple[Path, int]]:
    """(folder, version) of each group that this process is in and that may limit what a controller gives.

    Args:
        controller: as version 1 names it: "cpu", "memory"
        root: where cgroups are mounted
        own: which cgroups the process is in, `/proc/self/cgroup`
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    found = {(root, 2): None}  # in a container its own group is the root, whatever `own` says
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, version = (root / controllers, 1) if controllers else (root, 2)
        inner = base / path.lstrip("/")
        found |= {(folder, version): None for folder in (inner, *inner.parents) if folder.is_relative_to(base)}
    return list(found)
