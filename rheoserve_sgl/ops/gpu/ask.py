"""The GPU's side of the doorbell: what kernels need to ask the CPU and to wait for it, with a bound.

`plan_gpu` writes the question and rings, `merge_parts` waits for the answer; both can be captured in a CUDA graph, and
each replay asks the next number.
"""

import torch
import triton
import triton.language as tl

from rheoserve_sgl.ops.doorbell import Exchange


@triton.jit
def store_release(address, value):
    """Write int64 `value` to `address`, once, after all that the program has seen written."""
    # The dummy result keeps the compiler from dropping the store. One thread writes: a release is a fence for each.
    tl.inline_asm_elementwise(
        "{ .reg .pred %first; .reg .u32 %own; mov.u32 %own, %tid.x; setp.eq.u32 %first, %own, 0; "
        "@%first st.release.sys.global.u64 [$1], $2; mov.u64 $0, $2; }",
        "=l,l,l",
        [address, value],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_acquire(address):
    """The int64 at `address`, where a CPU may write it, before all that is read later."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def load_acquire_own(address):
    """As `load_acquire`, where only this GPU writes."""
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def nanoseconds(address):
    """The GPU's clock; the argument is only there because an operand is asked for."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def ring(asks_too, counter, asks, rung, bell, layers):
    """Called once by each program of a plan, which writes nothing that the CPU reads after it: the last to call numbers
    the question, and rings if any of them asks, or a step ends.
    """
    tl.debug_barrier()  # what other threads of this program wrote is released with its count
    before = tl.atomic_add(asks, tl.where(asks_too, (1 << 32) + 1, 1).to(tl.int64), sem="acq_rel")
    if (before & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        asked = asks_too | ((before >> 32) > 0)
        tl.atomic_xchg(asks, 0, sem="relaxed")
        # An atomic gives all threads one number; loading and storing it would not.
        number = tl.atomic_add(counter, 1, sem="relaxed") + 1
        tl.store(rung, tl.where(asked, number, 0))
        if asked | (number % layers == 0):
            store_release(bell.to(tl.int64), number)


class Asker:
    """Where the kernels find the bell, and what they share.

    Args:
        exchange: in pinned memory
        seconds: how long to wait for an answer
        layers: questions of a step

    begun: `[1]` int64 in pinned memory, gets counter as a step begins, for the CPU's threads to wake up
    counter: `[1]` int64, number of the last question
    asks: `[1]` int64, programs of a plan that have called `ring`, and from bit 32 on those that ask
    rung: `[1]` int64, the last question's number, 0 if it asks nothing
    seen: `[1]` int64, number of the last question that was waited for
    lost: `[1]` int64, number of the first question that was not answered in time; 0: none
    report: the same in pinned memory
    waited: `[1]` int64, nanoseconds that answers were waited for
    """

    def __init__(self, exchange: Exchange, seconds: float, layers: int):
        if not exchange.bell.is_pinned():
            raise ValueError("the exchange is not in pinned memory")
        self.asked, self.answered, self.begun = exchange.bell[0], exchange.bell[1], exchange.bell[3, :1]
        self.limit, self.layers = int(seconds * 1e9), layers
        self.counter = exchange.bell[1, :1].clone().cuda()  # on from the last answer
        self.asks, self.rung = torch.zeros((2, 1), dtype=torch.int64, device="cuda")
        self.seen = self.counter.clone()
        self.lost = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.waited = torch.zeros(1, dtype=torch.int64, device="cuda")
        self.report = torch.zeros(1, dtype=torch.int64, pin_memory=True)

    @property
    def late(self) -> int:
        """Number of the question whose answer did not come in time, 0 if none so far, as far as the stream has come."""
        return int(self.report)
