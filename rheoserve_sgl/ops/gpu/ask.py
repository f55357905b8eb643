"""The GPU's side of the doorbell: a small kernel that asks the CPU, and one that waits, with a bound."""

import torch
import triton
import triton.language as tl

from rheoserve_sgl.ops.doorbell import Exchange


@triton.jit
def _store_release(address, value):
    # The dummy result keeps the compiler from dropping the store.
    tl.inline_asm_elementwise(
        "st.release.sys.global.u64 [$1], $2; mov.u64 $0, $2;",
        "=l,l,l",
        [address, value],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _load_acquire(address):
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _nanoseconds(address):
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _ring(counter, asked):
    number = tl.load(counter) + 1
    tl.store(counter, number)
    _store_release(asked.to(tl.int64), number)


@triton.jit
def _wait(counter, late, report, answered, limit):
    number = tl.load(counter)
    answered_at = answered.to(tl.int64)
    end = _nanoseconds(answered_at) + limit
    # After one answer too late nothing is waited for: the step is lost, and the server is told.
    waiting = tl.load(late) == 0
    while waiting:
        if _load_acquire(answered_at) == number:
            waiting = False
        elif _nanoseconds(answered_at) > end:
            tl.store(late, number)
            tl.store(report, number)
            waiting = False


class Asker:
    """Asks through an exchange in pinned memory, from the current CUDA stream.

    `ring`, then `wait`; both can be captured, and each replay asks the next number. What was written to the exchange
    before `ring` on this stream is part of the question; what is read after `wait` on this stream is the answer.

    Args:
        exchange: pinned
        seconds: how long to wait for an answer
    """

    def __init__(self, exchange: Exchange, seconds: float):
        if not exchange.bell.is_pinned():
            raise ValueError("the exchange is not in pinned memory")
        self._bell = exchange.bell
        self._limit = int(seconds * 1e9)
        self._counter = exchange.bell[1, :1].clone().cuda()  # on from the last answer
        self._late = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._report = torch.zeros(1, dtype=torch.int64, pin_memory=True)

    def ring(self):
        _ring[(1,)](self._counter, self._bell[0], num_warps=1)

    def wait(self):
        _wait[(1,)](self._counter, self._late, self._report, self._bell[1], self._limit, num_warps=1)

    @property
    def late(self) -> int:
        """Number of the request whose answer did not come in time, 0 if none so far, as far as the stream has come."""
        return int(self._report)
