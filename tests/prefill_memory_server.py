"""SGLang's server with RheoServe that tells how much device memory each batch of a prefill took: the program of a test.

Before each batch it prints the most that was allocated since the batch before, and what is now, in bytes.
"""

import runpy

import torch

from rheoserve_sgl.backend import RheoAttnBackend

begin = RheoAttnBackend._begin_extend


def told(self, *args):
    print(f"prefill memory: {torch.cuda.max_memory_allocated()} {torch.cuda.memory_allocated()}", flush=True)
    torch.cuda.reset_peak_memory_stats()
    return begin(self, *args)


# At import: SGLang's processes are spawned, and import this file.
RheoAttnBackend._begin_extend = told

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
