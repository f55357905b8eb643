"""The worker pool of the CPU kernels: how many threads, and which attention variant they run."""

import functools
import logging
import subprocess
import sys

from rheoserve_sgl import environ
from rheoserve_sgl.ops.extension import extension

logger = logging.getLogger(__name__)
SELF_TEST_SECONDS = 60
SELF_TEST = "import sys; from rheoserve_sgl import _C; _C.self_test(sys.argv[1])"


def worker_pool(threads: int, variant: str = ""):
    """The process's one worker pool of this size and variant; "" for `cpu_variant`.

    Raises:
        ValueError: a variant that cannot run here
    """
    return _pool(threads, variant or cpu_variant())


@functools.lru_cache(maxsize=8)
def _pool(threads: int, variant: str):
    return extension().Workers(threads, variant)


@functools.cache
def cpu_variant() -> str:
    """The kernel variant of CPU attention in this process: the forced one, or the best that passes its self-test.

    Raises:
        ValueError: RHEOSERVE_CPU_VARIANT names one that cannot run here, or fails its self-test
    """
    forced = environ.cpu_variant()
    legal = extension().cpu_variants()
    if forced and forced not in legal:
        raise ValueError(f"RHEOSERVE_CPU_VARIANT is {forced!r}, which cannot run here; legal: {', '.join(legal)}")
    for name in [forced] if forced else legal:
        failure = self_test(name)
        if not failure:
            return name
        logger.warning("RheoServe: CPU variant %s is announced by the processor, but fails: %s", name, failure)
    raise ValueError(f"no CPU variant passes its self-test; tried {forced or ', '.join(legal)}: {failure}")


def self_test(variant: str) -> str:
    """Try a variant in a child process, which alone dies of an instruction that a virtual machine only announces.

    Returns:
        what went wrong, "" if nothing did
    """
    command = [sys.executable, "-c", SELF_TEST, variant]
    try:
        child = subprocess.run(
            command, env=environ.with_python_path(), capture_output=True, text=True, timeout=SELF_TEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SELF_TEST_SECONDS} s"
    if child.returncode < 0:
        return f"killed by signal {-child.returncode}"
    return "" if child.returncode == 0 else child.stderr.strip().rpartition("\n")[2] or f"exit {child.returncode}"
