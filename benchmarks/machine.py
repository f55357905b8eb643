"""What a benchmark ran on: machine, commit and versions, for its JSON line."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil

from rheoserve_sgl.ops.processors import processor_name


def describe_machine() -> dict:
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cpu_variant": _cpu_variant(),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("rheoserve-sgl", "sglang", "torch")}
        | {"python": platform.python_version()},
    }


def _cpu_variant() -> str:
    from rheoserve_sgl.ops.workers import cpu_variant

    return cpu_variant()


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return (run.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")
