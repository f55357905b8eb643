"""The runtime controller in a real server: some requests decode, others wait, and all get dense answers."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest
import requests
from serving import Server, Watch, random_prompts, rheo_server

pytestmark = pytest.mark.server
# The budget covers every prompt, so that answers are dense; the frames hold the working sets of two or three.
FLAGS = ["--rheoserve-admission", "on", "--rheoserve-device-tokens", "2048", "--chunked-prefill-size", "512"]
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
LENGTHS = [900, 65, 1400, 128, 700, 30, 1000, 640]


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    flags = [*FLAGS, "--enable-priority-scheduling"]  # which changes nothing for requests without a priority
    with rheo_server(checkpoints.path(), flags, tmp_path_factory.mktemp("controller"), STRICT) as server:
        yield server


def test_more_are_prefilled_than_decode_and_answers_are_dense(server, dense):
    server.flush()
    prompts = random_prompts(60, LENGTHS)
    with Watch(server) as seen:
        answers = server.tokens(prompts, 60)
    assert answers == dense.tokens(prompts, 60)
    assert max(now["waiting"] for now in seen) >= 2
    assert max(now["waiting"] + now["decoding"] for now in seen) > max(now["decoding"] for now in seen) >= 2
    for now in seen:  # never more than fit, but for one alone and what grew
        needs = [one["working_set_pages"] for one in now["prefilled"] if one["state"] == "decoding"]
        assert len(needs) <= 1 or sum(needs) <= 1.1 * 32 + len(needs)
    after = server.settle()
    assert after["frames_used"] == after["host_pages_used"] == 0
    assert after["transactions"]["waiting"] == after["transactions"]["decoding"] == 0
    assert after["transactions_waiting"] == after["transactions_decoding"] == after["working_set_pages"] == 0


def test_a_waiting_request_can_be_aborted(server, dense):
    server.flush()
    prompts = random_prompts(61, [1900, 1800, 300])
    answers = {}

    def ask(i):
        sampling = {"temperature": 0, "max_new_tokens": 150 if i < 1 else 40, "ignore_eos": True}
        reply = server.post("/generate", {"input_ids": prompts[i], "rid": f"wait-{i}", "sampling_params": sampling})
        answers[i] = reply.json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    deadline = time.time() + 60
    while not any(
        one["rid"] == "wait-1" and one["state"] == "waiting" for one in server.rheo()["transactions"]["prefilled"]
    ):
        assert time.time() < deadline, "the second request never waited"
        time.sleep(0.02)
    server.post("/abort_request", {"rid": "wait-1"})
    for thread in threads:
        thread.join(120)
    assert answers[1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert [answers[0]["output_ids"]] == dense.tokens(prompts[:1], 150)
    assert [answers[2]["output_ids"]] == dense.tokens(prompts[2:], 40)
    server.settle()


def test_an_urgent_request_decodes_before_older_ones(server, dense):
    """Each of the older ones fills the frames, and they would take turns by age."""
    server.flush()
    *prompts, urgent = random_prompts(66, [1900, 1850, 1800, 300])

    def ask(prompt, new_tokens, priority):
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = {"input_ids": prompt, "priority": priority, "sampling_params": sampling}
        return server.post("/generate", body).json()["output_ids"]

    with ThreadPoolExecutor(3) as clients:
        older = [clients.submit(ask, prompt, 120, 1) for prompt in prompts]
        deadline = time.time() + 90
        while server.rheo()["transactions"]["waiting"] < 2:
            assert time.time() < deadline, "two of the older ones never waited"
            time.sleep(0.02)
        answer = ask(urgent, 20, 7)
        assert sum(not one.done() for one in older) >= 2
        assert [answer] == dense.tokens([urgent], 20)
        assert [one.result() for one in older] == dense.tokens(prompts, 120)
    assert server.settle()["host_pages_used"] == 0


def test_a_long_prompt_does_not_stop_those_that_decode(server):
    """Between its chunks the others go on: SGLang alone would prefill it to the end first."""
    server.flush()
    short, long = random_prompts(62, [40, 12000])
    heard = []

    def listen():
        body = {
            "input_ids": short,
            "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
            "stream": True,
        }
        with requests.post(server.url + "/generate", json=body, stream=True, timeout=300) as reply:
            for line in reply.iter_lines():
                if line.startswith(b"data: {"):
                    tokens = json.loads(line[6:])["meta_info"]["completion_tokens"]
                    heard.append((time.monotonic(), tokens))  # a busy machine sends several at once

    listener = threading.Thread(target=listen)
    listener.start()
    while len(heard) < 20:
        time.sleep(0.01)
    began = time.monotonic()
    server.tokens([long], 1)
    ended = time.monotonic()
    listener.join()
    assert heard[-1][1] == 400
    before, during = (max(tokens for at, tokens in heard if at < until) for until in (began, ended))
    assert during - before >= 8 * (12000 // 512 - 2)


@pytest.mark.slow  # and for a machine that takes long for 4,096 tokens, but not for a step of two requests
def test_chunks_become_small_where_tokens_must_not_take_long(checkpoints, tmp_path):
    """The first one holds up the others for far longer than eight tokens may take; later ones grow slowly, if a part of
    their time does not depend on them."""
    short, long = random_prompts(68, [40, 14000])
    flags = ["--chunked-prefill-size", "4096", "--rheoserve-admission", "on", "--rheoserve-tpot-slo-ms", "60"]
    with rheo_server(checkpoints.path(), [*flags, "--context-length", "16384"], tmp_path) as server:
        with decoding(server, short):
            server.tokens([long], 1)
        sizes = [int(found) for found in re.findall(r"#new-token: (\d+)", server.log.read_text())]
    chunks = sizes[sizes.index(4096) :]
    assert sum(chunks) >= 14000 and chunks[0] == 4096 and 512 <= chunks[1] < 4096
    assert all(512 <= size <= 2 * before for before, size in pairwise(chunks[1:-1]))


def test_a_prompt_waits_at_the_door_where_tokens_must_not_take_long(checkpoints, dense, tmp_path):
    """No step is as fast as this objective asks for: one request decodes at once, and the next is not begun."""
    flags = ["--rheoserve-admission", "on", "--rheoserve-tpot-slo-ms", "1"]
    prompts = random_prompts(69, [40, 700, 100])
    with rheo_server(checkpoints.path(), flags, tmp_path) as server:
        with ThreadPoolExecutor() as pool:
            with decoding(server, prompts[0]):
                others = pool.map(lambda prompt: server.tokens([prompt], 20)[0], prompts[1:])
                with Watch(server) as seen:
                    time.sleep(5)
                assert seen[-1]["registered"] == 2 and not any(one["waiting"] or one["prefilling"] for one in seen)
            assert list(others) == dense.tokens(prompts[1:], 20)
        assert not re.search(r"#new-seq: [2-9]", server.log.read_text())  # nor where nothing decodes
        assert server.settle()["host_pages_used"] == 0


@contextmanager
def decoding(server, prompt: list[int]):
    """Within, a request decodes; then it is aborted."""
    sampling = {"temperature": 0, "max_new_tokens": 16000, "ignore_eos": True}
    body = {"input_ids": prompt, "rid": "decodes", "sampling_params": sampling}
    asking = threading.Thread(target=server.post, args=("/generate", body))
    asking.start()
    try:
        deadline = time.time() + 60
        while server.rheo()["decode_steps"] < 20:
            assert time.time() < deadline, "the prompt does not decode"
            time.sleep(0.05)
        yield
        assert asking.is_alive()
    finally:
        server.post("/abort_request", {"rid": "decodes"})
        asking.join(60)


def test_penalties_are_kept_while_some_decode_and_others_wait(server, dense):
    """As of a request that is alone: of several, SGLang's own count other tokens where a prefill comes between."""
    server.flush()
    prompts = random_prompts(66, LENGTHS)
    kinds = [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 25, "ignore_eos": False},
        {},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ]
    plain = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    asked = [plain | kinds[i % len(kinds)] for i in range(len(prompts))]
    bodies = [{"input_ids": prompt, "sampling_params": one} for prompt, one in zip(prompts, asked, strict=True)]
    expected = [dense.post("/generate", body).json()["output_ids"] for body in bodies]
    assert all(answer != other for answer, other in zip(expected, dense.tokens(prompts[:3], 60), strict=False))
    with Watch(server) as seen:
        reply = server.post("/generate", {"input_ids": prompts, "sampling_params": asked})
    assert [answer["output_ids"] for answer in reply.json()] == expected
    assert max(now["waiting"] for now in seen) >= 2


def test_retraction_and_penalties_beside_waiting_requests(checkpoints, dense, tmp_path):
    """Every few steps SGLang retracts."""
    prompts = random_prompts(63, LENGTHS)
    penalty = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True, "frequency_penalty": 0.5}
    plain = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": [penalty if i == 5 else plain for i in range(len(prompts))]}
    expected = [answer["output_ids"] for answer in dense.post("/generate", body).json()]
    env = STRICT | {"SGLANG_TEST_RETRACT": "1"}
    with rheo_server(checkpoints.path(), FLAGS, tmp_path, env) as server:
        reply = server.post("/generate", body)
        assert reply.status_code == 200, f"{reply.text}\n{server.tail()}"
        answers = reply.json()
        assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
        assert [answer["output_ids"] for answer in answers] == expected
        assert server.settle()["host_pages_used"] == 0


def test_a_pause_that_retracts_everybody_changes_no_answer(server, dense):
    """The same requests come back in other slots: what was prepared for the old ones must not run."""
    server.flush()
    prompts = random_prompts(65, [900, 640, 700])
    answers = {}

    def ask():
        answers["all"] = server.tokens(prompts, 120)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(3):
        before = server.rheo()["decode_steps"]
        while server.rheo()["decode_steps"] < before + 10 and asking.is_alive():
            time.sleep(0.02)
        assert server.post("/pause_generation", {"mode": "retract"}).status_code == 200
        assert server.post("/continue_generation", {}).status_code == 200
    asking.join(300)
    assert answers["all"] == dense.tokens(prompts, 120)
    server.settle()


def test_steps_between_chunks_leave_a_prompt_the_room_it_was_admitted_on(checkpoints, dense, tmp_path):
    """48 pages of host store: the prompt fits when it is let in, but not after eight steps before each chunk."""
    short, [long] = random_prompts(66, [60] * 6), random_prompts(67, [1500])
    flags = ["--attention-backend", "rheoserve", "--rheoserve-host-size", "0.0127", "--rheoserve-device-tokens", "1024"]
    flags += ["--chunked-prefill-size", "64", "--schedule-conservativeness", "0.05"]
    with Server(checkpoints.path(), flags, tmp_path / "log", STRICT) as server:
        answers = {}
        asking = threading.Thread(target=lambda: answers.update(short=server.tokens(short, 390)))
        asking.start()
        while server.rheo()["transactions"]["decoding"] < 6:
            time.sleep(0.02)
        assert server.tokens([long], 4) == dense.tokens([long], 4)
        asking.join(300)
        assert answers["short"] == dense.tokens(short, 390)
        assert server.settle()["host_pages_used"] == 0


def test_two_ranks_decide_alike(checkpoints, dense, tmp_path):
    """Each rank measures its own KV heads; they go by the largest, or their batches would differ."""
    prompts = random_prompts(64, LENGTHS)
    flags = [*FLAGS, "--tp-size", "2", "--rheoserve-token-budget", "1024", "--rheoserve-tpot-slo-ms", "12"]
    flags += ["--rheoserve-join-patience", "16"]  # for their group, if for nothing else
    with rheo_server(checkpoints.path(), flags, tmp_path, STRICT | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        with Watch(server) as seen:
            answers = server.tokens(prompts, 60)
        short = [row for row, length in enumerate(LENGTHS) if length + 60 <= 1024]  # those are dense
        assert [answers[row] for row in short] == dense.tokens([prompts[row] for row in short], 60)
        assert max(now["waiting"] for now in seen) >= 1
        assert server.settle()["host_pages_used"] == 0
