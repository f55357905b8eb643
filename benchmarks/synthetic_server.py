"""SGLang's server with RheoServe, the blocks' scores replaced by synthetic ones (synthetic_scores.py).

`python benchmarks/synthetic_server.py FILE [arguments of sglang.launch_server]`: FILE is a packed trace (`.npz`), or
holds the churn of random scores. The gate's own scores are computed as well, so that their cost is paid.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_scores import Drawn, Traced

from rheoserve_sgl.ops.gpu.step import GpuStep


def replace_scores(source: Drawn | Traced):
    """Let `GpuStep` score with synthetic logits in its steps; the first importance after a prompt stays the gate's."""
    real = GpuStep.score

    def score(self, index, heads, tables, *rest, **options):
        scratch = real(self, index, heads, tables, *rest, **options)
        if tables.pages.data_ptr() == self.tables.pages.data_ptr():
            source.fill(index, tables, scratch, heads.shape[1])
        return scratch

    GpuStep.score = score


# At import: SGLang's processes are spawned, and import this file.
path = Path(os.environ.setdefault("SYNTHETIC_SCORES", sys.argv[1]))
replace_scores(Traced(path) if path.suffix == ".npz" else Drawn(path))

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("sglang.launch_server", run_name="__main__")
