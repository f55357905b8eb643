"""SGLang's server with RheoServe on a CPU, which writes down what each decode step selects.

`python benchmarks/traces/recording_server.py OUT.npz [arguments of sglang.launch_server]`. OUT holds the last request:
`selected` `[steps, layers, kv_heads, pages]` bool and `scores` of the same shape, float16, log probabilities of the
gate; pages that did not exist yet have -inf. For one request at a time.
"""

import os
import runpy
import sys

import numpy as np
import torch

from rheoserve_sgl import backend
from rheoserve_sgl.ops.plan import plan as real_plan
from rheoserve_sgl.ops.plan import plan_torch

FLUSH_STEPS = 32


class Recorder:
    """Collects the calls of `plan`, one a layer, into steps."""

    def __init__(self, path: str):
        self.path, self.steps = path, []
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []
        self.length = 0
        self.first: int | None = None  # the first layer's residency table, by which a step begins

    def plan(self, rule, scores, pages, n_pages, tail_len, frame_of, threads=1, budgets=None):
        length = int((n_pages[0] - 1) * 64 + tail_len[0])
        if self.first is None:
            self.first = frame_of.data_ptr()
        if self.layers and frame_of.data_ptr() == self.first:
            self.end_step()
            if length != self.length + 1:
                self.steps.clear()  # another request
        self.length = length
        nowhere = torch.full_like(frame_of, -1)
        chosen = plan_torch(rule, scores, pages, n_pages, tail_len, nowhere, budgets).host
        selected = np.zeros((frame_of.shape[1], pages.shape[1]), bool)
        place = {page: at for at, page in enumerate(pages[0].tolist())}
        for head, count in enumerate(chosen.count[0].tolist()):
            for block in chosen.blocks[0, head, :count].tolist():
                selected[head, place[block // frame_of.shape[1]]] = True
        self.layers.append((selected, scores[0].to(torch.float16).numpy()))
        return real_plan(rule, scores, pages, n_pages, tail_len, frame_of, threads, budgets)

    def end_step(self):
        self.steps.append(tuple(np.stack(parts) for parts in zip(*self.layers, strict=True)))
        self.layers = []
        if len(self.steps) % FLUSH_STEPS == 0:
            self.save()

    def save(self):
        most = max(scores.shape[-1] for _, scores in self.steps)
        widths = [((0, 0), (0, 0), (0, most - scores.shape[-1])) for _, scores in self.steps]
        selected = [np.pad(step[0], width) for step, width in zip(self.steps, widths, strict=True)]
        scores = [
            np.pad(step[1], width, constant_values=-np.inf) for step, width in zip(self.steps, widths, strict=True)
        ]
        np.savez_compressed(self.path + ".part.npz", selected=np.stack(selected), scores=np.stack(scores))
        os.replace(self.path + ".part.npz", self.path)


# At import: SGLang's processes are spawned, and import this file.
backend.plan = Recorder(os.environ.setdefault("TRACE_OUT", sys.argv[1])).plan

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("sglang.launch_server", run_name="__main__")
