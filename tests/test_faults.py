"""What goes wrong around a server ends in a clear error for whom it touches; everybody else has their whole answer."""

import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import requests
from serving import Server, check_same, on_gpu, random_prompts, rheo_server

from benchmarks.soak.traffic import BAD, Traffic

pytestmark = pytest.mark.server


class Ask(threading.Thread):
    """A greedy request in a thread of its own."""

    def __init__(self, server, prompt: list[int], new_tokens: int, **extra):
        super().__init__(daemon=True)
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        self.url, self.reply = server.url + "/generate", None
        self.body = {"input_ids": prompt, "sampling_params": sampling, **extra}
        self.start()

    def run(self):
        with suppress(requests.RequestException):  # of a server that ends: no reply
            self.reply = requests.post(self.url, json=self.body, timeout=300)

    def answer(self) -> list[int]:
        self.join(300)
        assert self.reply is not None and self.reply.status_code == 200, self.reply and self.reply.text
        return self.reply.json()["output_ids"]


def running(server) -> int:
    return server.rheo()["decode_steps"]


def wait_for_decoding(server):
    """Until decode steps go by."""
    first = running(server)
    for _ in range(200):
        if running(server) > first + 2:
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing decodes:\n{server.tail()}")


def test_bad_requests_are_named_and_touch_nobody(full):
    [prompt] = random_prompts(50, [700])
    [expected] = full.tokens([prompt], 60)
    beside = Ask(full, prompt, 60)
    for name, body in BAD.items():
        reply = requests.post(full.url + "/generate", json=body, timeout=60)
        assert reply.status_code in (400, 422), f"{name}: {reply.status_code} {reply.text}"
        assert "error" in reply.text or "detail" in reply.text, name
    check_same([beside.answer()], [expected])


def test_a_rid_in_use_is_refused_and_its_owner_served(full):
    prompts = random_prompts(51, [600, 300])
    [expected] = full.tokens(prompts[:1], 150)
    owner = Ask(full, prompts[0], 150, rid="taken")
    wait_for_decoding(full)
    second = full.post("/generate", {"input_ids": prompts[1], "rid": "taken", "sampling_params": {"max_new_tokens": 4}})
    assert second.status_code == 400 and "taken" in second.text
    check_same([owner.answer()], [expected])


def test_clients_that_leave_cost_nobody_an_answer(full):
    [prompt] = random_prompts(52, [900])
    [expected] = full.tokens([prompt], 100)
    beside = Ask(full, prompt, 100)
    traffic = Traffic(full.url, 0)
    traffic._kinds = {traffic.leave_the_stream: 2, traffic.abort: 1}
    traffic.run(workers=4, seconds=8)
    assert not traffic.failures and traffic.done["leave_the_stream"] > 0
    check_same([beside.answer()], [expected])
    after = full.settle()
    assert after["frames_used"] == after["host_pages_used"] == 0


def test_sigterm_while_busy_lets_answers_end_and_leaves_no_process(checkpoints, tmp_path):
    args = ["--rheoserve-mode", "full", "--rheoserve-device-tokens", "512"]
    with rheo_server(checkpoints.path(), args, tmp_path) as server:
        prompts = random_prompts(53, [700, 1200])
        expected = server.tokens(prompts, 80)
        asked = [Ask(server, prompt, 80) for prompt in prompts]
        wait_for_decoding(server)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        check_same([one.answer() for one in asked], expected)
        server.process.wait(60)
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left, left


def test_failing_exchanges_change_no_answer_and_a_killed_scheduler_ends_the_server(checkpoints, tmp_path, full):
    """Blocks whose copy failed are attended to where they are; worker threads end with their process only, and nobody
    waits for it for ever."""
    args = ["--attention-backend", "rheoserve", "--rheoserve-host-size", "0.4", "--rheoserve-mode", "full"]
    args += ["--rheoserve-device-tokens", "512", "--rheoserve-exchange-interval", "2", "--rheoserve-canary", "raise"]
    program = [sys.executable, str(Path(__file__).with_name("failing_exchange_server.py"))]
    prompts = random_prompts(54, [700, 1500])
    expected = full.tokens(prompts, 60)
    server = Server(checkpoints.path(), [*args, "--enable-metrics"], tmp_path / "log", program=program)
    with server:
        check_same(server.tokens(prompts, 60), expected)
        state = server.settle()
        assert state["exchanges_failed"] > 0 < state["exchanged_blocks"]
        assert on_gpu() or state["exchanges_failed"] < state["exchanges"]  # swaps may fail there besides
        assert state["frames_used"] == state["host_pages_used"] == 0
        assert server.metrics()["sglang:rheoserve_exchanges_failed_total"] == state["exchanges_failed"]
        assert "an exchange failed" in server.log.read_text()

        asked = Ask(server, prompts[0], 2000)
        wait_for_decoding(server)
        family = psutil.Process(server.process.pid).children(recursive=True)
        scheduler = next(one for one in family if "scheduler" in "".join(one.cmdline()))
        scheduler.kill()
        assert server.process.wait(60) != 0
        asked.join(60)
        assert not asked.is_alive() and (asked.reply is None or asked.reply.status_code != 200)
        _, left = psutil.wait_procs(family, timeout=30)
        assert not left, left
