"""How long a decode step of a load is likely to take: a line of `python -m rheoserve_sgl plan`."""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.config import DEFAULT_TOKEN_BUDGET
from rheoserve_sgl.doctor.needs import GB, Load, Needs
from rheoserve_sgl.ops.processors import usable_threads
from rheoserve_sgl.runtime.latency_model import LatencyModel, Rates, StepLoad

MISSED = 0.06  # of the selection, as measured where 5% of it changed at each step (docs/LOG.md)
SAMPLE_BYTES = 512 << 20


def rates_here(dim: int, kv_heads: int, group: int, dtype: torch.dtype) -> Rates:
    """What this machine's GPU, if any, and its CPU's attention read: takes a second, and half a gigabyte."""
    from rheoserve_sgl.runtime.calibration import measure_rates

    host = torch.zeros((SAMPLE_BYTES // (2 * PAGE_TOKENS * dim * dtype.itemsize), 2, PAGE_TOKENS, dim), dtype=dtype)
    host.random_(0, 2)  # zeros would all be the same page of memory
    frames = torch.empty_like(host, device="cuda") if torch.cuda.is_available() else None
    return measure_rates(host, kv_heads, group, usable_threads(), frames)


def predict_step(load: Load, needs: Needs, rates: Rates, device: int | None) -> str:
    """A line on a step of a load, with a budget of DEFAULT_TOKEN_BUDGET tokens.

    Args:
        device: free bytes of the GPU; None: there is none
    """
    selected = load.concurrency * min(DEFAULT_TOKEN_BUDGET, load.context) * needs.token_bytes
    whole = load.tokens * needs.token_bytes
    resident = selected if device is None else needs.frames(load, device) * needs.token_bytes
    missed = MISSED if resident < whole and device is not None else 0.0
    step = StepLoad(load.concurrency, resident, load.tokens * needs.key_bytes, missed * selected)
    seconds = LatencyModel(rates, needs.weights).predict(step)
    how = f"device {rates.device / GB:,.0f} GB/s, CPU {rates.host / GB:,.1f} GB/s, measured now"
    how += f"; {missed:.0%} of the selection not resident" if device is not None else ""
    rate = load.concurrency / seconds
    return f"a decode step of all {load.concurrency}: about {1000 * seconds:.1f} ms, {rate:,.0f} tokens/s ({how})"
