"""What a step needs besides its page table, by one kernel: what each request may select, and what the CPU is told."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "weight", "batch"])
def _tell(
    limits, requests, budgets, weight_to, batch_to, counter, begun, rows, weight, batch, ROWS: tl.constexpr,
    ASKS: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    used = row < batch
    slot = tl.load(requests + row, mask=used, other=0)
    tl.store(budgets + row, tl.load(limits + slot, mask=used, other=0), mask=used)
    tl.store(weight_to, weight)
    tl.store(batch_to, rows)
    if ASKS:
        tl.store(begun, tl.load(counter))


def tell_step(limits, requests, budgets, weight_to, exchange, rows: int, weight: float, asker=None):
    """Before a step's first question, in stream order.

    Args:
        limits: `[slots]` int32, pages that a KV head may select, by row of req_to_token
        requests: `[batch]` int64, rows of it
        budgets: `[>= batch]` int32, gets the limits
        weight_to: `[1]` float32, gets weight
        exchange: Exchange, pinned, whose `batch` gets rows
        asker: Asker, whose `begun` gets the number of the last question; None: the CPU is not asked
    """
    batch = len(requests)
    bell = (budgets, budgets) if asker is None else (asker.counter, asker.begun)
    _tell[(1,)](
        limits, requests, budgets, weight_to, exchange.batch, *bell, rows, weight, batch,
        ROWS=triton.next_power_of_2(len(budgets)), ASKS=asker is not None, num_warps=1,
    )  # fmt: skip
