"""How long a GPU takes for something."""

from collections.abc import Callable

import torch


def fastest(run: Callable[[], object], times: int = 4) -> float:
    """Seconds of the fastest of some runs; the first ones warm up."""
    took = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1000)
    return min(took)
