"""SGLang's server with RheoServe, of whose copies into frames every third fails: the program of a test."""

import itertools
import runpy

from rheoserve_sgl.cache.pool import TwoTierKVPool

COPY, CALLS = TwoTierKVPool.fill, itertools.count(1)


def fill(pool, moves, beside=False):
    if next(CALLS) % 3 == 0:
        raise RuntimeError("no memory for a copy")
    COPY(pool, moves, beside)


# At import: SGLang's processes are spawned, and import this file.
TwoTierKVPool.fill = fill

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
