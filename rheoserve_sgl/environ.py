"""Every environment variable that RheoServe reads. A bad value raises; nothing else reads `os.environ`.

RHEOSERVE_CPU_VARIANT           force a CPU kernel variant (`amx`, `avx512_bf16`, `avx512`, `avx2`, `neon_bf16`,
                                `neon`, `scalar`)
RHEOSERVE_CACHE                 folder for what was learnt about this machine's speed (`~/.cache/rheoserve`), or `off`
RHEOSERVE_TEST_RANDOM_EXCHANGE  tests only: an integer seed; every step moves a random set of blocks
RHEOSERVE_TEST_ANSWER_SECONDS   tests only: how long a GPU waits for the CPU's attention
RHEOSERVE_TEST_FAULT            tests only: `host` or `frame`; the canary first changes a bit there itself

SGLANG_USE_CPU_ENGINE           SGLang's: 1 asks for its own CPU engine, and our CPU platform steps aside

And one that it sets, unless it is set: OMP_WAIT_POLICY, where there is no accelerator.
"""

import os
import sys
from pathlib import Path


def cpu_variant() -> str:
    """The forced kernel variant, or "" for the best that runs here (checked by ops/workers.py)."""
    return os.environ.get("RHEOSERVE_CPU_VARIANT", "")


def cache_folder() -> Path | None:
    """Where the latency model's numbers are kept; None: nowhere."""
    text = os.environ.get("RHEOSERVE_CACHE", "") or "~/.cache/rheoserve"
    try:
        return None if text == "off" else Path(text).expanduser()
    except RuntimeError:  # nobody's home is known
        return None


def random_exchange_seed() -> int | None:
    """The seed of the random exchange policy, or None for the real one."""
    text = os.environ.get("RHEOSERVE_TEST_RANDOM_EXCHANGE", "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"RHEOSERVE_TEST_RANDOM_EXCHANGE is {text!r}; legal: an integer seed") from None


def answer_seconds(default: float) -> float:
    """How long a GPU waits for the CPU's attention before its step is lost."""
    text = os.environ.get("RHEOSERVE_TEST_ANSWER_SECONDS", "")
    try:
        return float(text) if text else default
    except ValueError:
        raise ValueError(f"RHEOSERVE_TEST_ANSWER_SECONDS is {text!r}; legal: a number of seconds") from None


def planted_fault() -> str:
    """Where the canary is to change a bit before it looks, or ""."""
    where = os.environ.get("RHEOSERVE_TEST_FAULT", "")
    if where not in ("", "host", "frame"):
        raise ValueError(f"RHEOSERVE_TEST_FAULT is {where!r}; legal: host, frame")
    return where


def wants_sglang_cpu_engine() -> bool:
    return os.environ.get("SGLANG_USE_CPU_ENGINE", "") == "1"


def quiet_openmp():
    """Let torch's idle OpenMP threads sleep in the processes that are started from here.

    By default they spin after each operator. Where the CPU attention's threads share the processors with
    them, both are slowed down (docs/LOG.md has the numbers).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def with_python_path() -> dict[str, str]:
    """The environment for a child process that finds the same Python packages."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
