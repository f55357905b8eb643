"""Every environment variable that RheoServe reads. A bad value raises; nothing else reads `os.environ`.

RHEOSERVE_CPU_VARIANT           force a CPU kernel variant (`avx512`, `avx2`, `neon`, `scalar`)
RHEOSERVE_TEST_RANDOM_EXCHANGE  tests only: an integer seed; every step moves a random set of blocks
"""

import os


def cpu_variant() -> str:
    """The forced kernel variant, or "" for the best that runs here (checked by the extension)."""
    return os.environ.get("RHEOSERVE_CPU_VARIANT", "")


def random_exchange_seed() -> int | None:
    """The seed of the random exchange policy, or None for the real one."""
    text = os.environ.get("RHEOSERVE_TEST_RANDOM_EXCHANGE", "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"RHEOSERVE_TEST_RANDOM_EXCHANGE is {text!r}; legal: an integer seed") from None
