"""SGLang's server with RheoServe, whose prefill may not wait for the GPU after some batches: the program of a test.

An operator that would wait raises, and ends the server.
"""

import runpy

import torch

from rheoserve_sgl.backend import RheoAttnBackend

FREE = 6  # batches in which kernels are loaded and memory is first taken
batches = 0


def strict(method):
    def run(self, *args, **kwargs):
        if batches > FREE:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return method(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


def counted(method):
    def run(self, *args):
        global batches
        batches += 1
        return method(self, *args)

    return run


# At import: SGLang's processes are spawned, and import this file.
RheoAttnBackend._begin_extend = counted(strict(RheoAttnBackend._begin_extend))
RheoAttnBackend.forward_extend = strict(RheoAttnBackend.forward_extend)

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
