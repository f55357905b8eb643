"""CPU attention asked through memory: the same bits as a call, and what happens around it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rheoserve_sgl.ops.attention import attend_cpu
from rheoserve_sgl.ops.doorbell import Doorbell, Exchange
from rheoserve_sgl.ops.plan import Visit

BATCH, KV_HEADS, GROUP, DIM, LIST = 3, 2, 5, 64, 9
SECONDS = 20.0


def make(threads: int = 2, layers: int = 3, **options):
    torch.manual_seed(0)
    exchange = Exchange.make(BATCH, KV_HEADS, GROUP, DIM, LIST, pin=False)
    stores = [torch.randn(30, 2, 64, DIM) for _ in range(layers)]
    return exchange, stores, Doorbell(exchange, stores, 0.125, threads, **options)


def fill(exchange: Exchange, batch: int):
    """A new question, in place."""
    exchange.q.normal_()
    exchange.visit.blocks.random_(0, 30)
    exchange.visit.count.random_(0, LIST + 1)
    exchange.visit.last_len.random_(1, 65)
    exchange.out.fill_(torch.nan)
    exchange.batch[0] = batch


def ring(exchange: Exchange, passed: int = 0) -> int:
    """Ask, as a GPU would: by a store. Returns the request's number once it is answered."""
    asked, answered = exchange.bell[0], exchange.bell[1]
    number = int(asked[0]) + 1 + passed
    asked[0] = number
    deadline = time.monotonic() + SECONDS
    while int(answered[0]) != number:
        assert time.monotonic() < deadline, "no answer"
    return number


def test_layers_answer_in_turn_with_the_bits_of_a_call():
    exchange, stores, doorbell = make()
    for step in range(4):
        batch = step % BATCH + 1
        doorbell.expect(len(stores))
        for store in stores:
            fill(exchange, batch)
            ring(exchange)
            visit = Visit(exchange.visit.blocks[:batch], exchange.visit.count[:batch], exchange.visit.last_len[:batch])
            out, lse = attend_cpu(exchange.q[:batch], ((store, visit),), 0.125, 2)
            assert torch.equal(exchange.out[:batch], out)
            assert torch.equal(exchange.lse[:batch], lse)
            assert bool(exchange.out[batch:].isnan().all())  # rows that are not in use cost nothing
    doorbell.check()


def test_requests_may_be_passed_over():
    exchange, stores, doorbell = make()
    for passed in (1, 0, 2, 5):
        doorbell.expect(passed + 1)
        fill(exchange, BATCH)
        number = ring(exchange, passed)
        out, _ = attend_cpu(exchange.q, ((stores[(number - 1) % 3], exchange.visit),), 0.125, 2)
        assert torch.equal(exchange.out, out)
    assert 0 < doorbell.busy_seconds < SECONDS
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # nothing more is expected


def test_who_asks_more_than_was_expected_is_answered_and_costs_no_polling():
    exchange, stores, doorbell = make()
    doorbell.expect(1)
    fill(exchange, BATCH)
    number = ring(exchange, 2)  # as if three had been expected
    out, _ = attend_cpu(exchange.q, ((stores[(number - 1) % 3], exchange.visit),), 0.125, 2)
    assert torch.equal(exchange.out, out)
    assert processor_seconds(0.3) < 0.1
    doorbell.expect(3)
    fill(exchange, BATCH)
    ring(exchange)


def test_a_failing_request_is_answered_and_named():
    exchange, stores, doorbell = make()
    doorbell.expect(3)
    fill(exchange, 1)
    ring(exchange)
    fill(exchange, 2)
    exchange.visit.count[1, 1], exchange.visit.blocks[1, 1, 0] = 1, 30
    ring(exchange)
    with pytest.raises(RuntimeError, match="layer 1, request 2: block 30 is not in .0, 29. for request 1, KV head 1"):
        doorbell.check()
    fill(exchange, BATCH)
    ring(exchange)  # and the next one is served
    out, _ = attend_cpu(exchange.q, ((stores[2], exchange.visit),), 0.125, 2)
    assert torch.equal(exchange.out, out)
    doorbell.expect(1)
    fill(exchange, BATCH + 1)
    ring(exchange)
    with pytest.raises(RuntimeError, match="layer 1, request 2"):  # the first failure is the one to know
        doorbell.check()


def test_a_batch_outside_the_exchange_is_refused():
    exchange, _, doorbell = make()
    doorbell.expect(1)
    fill(exchange, BATCH + 1)
    ring(exchange)
    with pytest.raises(RuntimeError, match="batch 4 is not in .0, 3."):
        doorbell.check()


def test_threads_sleep_unless_a_request_is_expected():
    exchange, stores, doorbell = make()
    doorbell.expect(1)
    fill(exchange, 1)
    ring(exchange)
    assert processor_seconds(0.5) < 0.1
    doorbell.expect(1)
    fill(exchange, 1)
    ring(exchange)


def test_threads_sleep_until_the_step_that_asks_has_begun():
    """As where a prefill is in front of it. Then they poll, and answer."""
    exchange, stores, doorbell = make()
    layers = len(stores)
    for asked in range(0, 3 * layers, layers):
        doorbell.expect(layers)
        if asked:  # the step before is the last that began
            assert processor_seconds(0.5) < 0.1
        exchange.bell[3, 0] = asked
        for _ in stores:
            deadline, used = time.monotonic() + SECONDS / 4, time.process_time()
            while time.process_time() - used < 0.3:
                assert time.monotonic() < deadline, "nobody polls"
                time.sleep(0.05)
            fill(exchange, 1)
            ring(exchange)
    doorbell.check()


def processor_seconds(seconds: float) -> float:
    """What this process uses of them, in so long a time, after a moment."""
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


@pytest.mark.parametrize(
    "before",
    ["", *(f"t.fill(e, t.BATCH); t.ring(e, {passed}); " for passed in range(3))],
    ids=["awaited", "as-expected", "one-more", "two-more"],
)
def test_it_ends_whatever_was_asked(before):
    """In a process of its own, which a destructor that waits for ever would hang."""
    code = f"import test_doorbell as t; e, _, d = t.make(); d.expect(1); {before}del d, e; print('ended')"
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == "ended", child.stderr


def test_pinned_to_a_processor_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="cannot pin a worker to processor 1000"):
        make(cpus=[0, 1000])
    with pytest.raises(RuntimeError, match="cannot pin a worker to processor 1000"):
        make(threads=1, cpus=[1000])
