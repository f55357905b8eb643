"""Radix cache, aborts, flush and retraction on a real server: same answers, nothing left behind."""

import random
import threading
import time

import pytest
import requests
from serving import random_prompts, rheo_server, together

pytestmark = pytest.mark.server


def test_second_turn_reuses_the_first_and_answers_as_cold(full):
    full.flush()
    [first] = random_prompts(20, [1500])
    [answer] = full.tokens([first], 30)
    second = first + answer + random_prompts(21, [200])[0]
    [warm] = full.generate([second], 30)
    assert warm["meta_info"]["cached_tokens"] >= (1500 + 29) // 64 * 64
    full.flush()
    [cold] = full.generate([second], 30)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert warm["output_ids"] == cold["output_ids"]


def test_answers_are_the_same_after_eviction(full):
    """More distinct prompts than the host store holds: the tree evicts, and the first comes back cold."""
    full.flush()
    info = full.info()
    capacity = info["max_total_num_tokens"]
    [first] = random_prompts(22, [2000])
    [before] = full.tokens([first], 16)
    length, at_once = 3000, 4  # a token of a longer prompt takes longer
    for seed in range(capacity // (length * at_once) + 2):
        full.tokens(random_prompts(1000 + seed, [length] * at_once), 1)
    [after] = full.generate([first], 16)
    assert after["meta_info"]["cached_tokens"] < 1900
    assert after["output_ids"] == before


def test_shared_prefix_in_one_batch(full, dense):
    [prefix] = random_prompts(23, [640])
    prompts = [prefix + tail for tail in random_prompts(24, [1, 63, 64, 65])]
    full.flush()
    full.tokens([prefix], 1)
    answers = full.generate(prompts, 24)
    assert all(answer["meta_info"]["cached_tokens"] == 640 for answer in answers)
    assert [answer["output_ids"] for answer in answers] == dense.tokens(prompts, 24)


def test_abort_storm_leaves_nothing(full):
    """200 requests, aborted at random while queued, prefilling or running."""
    full.flush()
    generator = random.Random(5)
    prompts = random_prompts(25, [generator.randrange(1, 1200) for _ in range(200)])

    def ask(i):
        body = {
            "input_ids": prompts[i],
            "rid": f"storm-{i}",
            "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True},
        }
        try:
            full.post("/generate", body)
        except requests.RequestException:
            pass  # an aborted request may be cut off

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(200)]
    for thread in threads:
        thread.start()
    order = list(range(200))
    generator.shuffle(order)
    for i in order:
        full.post("/abort_request", {"rid": f"storm-{i}"})
        time.sleep(generator.random() * 0.03)
    full.post("/abort_request", {"abort_all": True})
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    after = full.settle()
    assert after["frames_used"] == after["host_pages_used"] == 0
    [prompt] = random_prompts(26, [300])
    assert len(full.tokens([prompt], 8)[0]) == 8
    assert full.process.poll() is None  # SGLang's idle memory check ends the server when pages leak


def test_forced_retraction(dense, checkpoints, tmp_path):
    """SGLang retracts running requests every few steps; memory is checked while busy, too."""
    prompts = random_prompts(27, [900, 65, 400, 128, 700, 30])
    expected = dense.tokens(prompts, 60)
    env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    args = ["--rheoserve-mode", "full", "--rheoserve-device-tokens", "512"]
    with rheo_server(checkpoints.path(), args, tmp_path, env) as server:
        answers = server.generate(prompts, 60)
        assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
        assert [answer["output_ids"] for answer in answers] == expected
        after = server.settle()
        assert after["frames_used"] == after["host_pages_used"] == 0


AT_RANDOM = {"RHEOSERVE_TEST_RANDOM_EXCHANGE": "3"}


@pytest.mark.parametrize(
    ("frames", "env"),
    [
        ("256", AT_RANDOM),
        pytest.param("64", {}, marks=pytest.mark.slow),
        pytest.param("1024", AT_RANDOM, marks=pytest.mark.slow),
    ],
)
def test_residency_independence_with_a_small_budget(frames, env, checkpoints, tmp_path):
    """For a given selection the answer does not depend on what is resident: random exchange at every step, and next
    to no frames, give the same tokens as many frames. The selection itself leaves most blocks out."""
    args = ["--rheoserve-token-budget", "512", "--rheoserve-window-tokens", "128"]
    args += ["--rheoserve-device-attention", "selected", "--rheoserve-device-tokens"]
    prompts = random_prompts(28, [1500, 1111, 640])
    answers = []
    (tmp_path / "few").mkdir()
    many = rheo_server(checkpoints.path(), [*args, "2048"], tmp_path)
    few = rheo_server(checkpoints.path(), [*args, frames], tmp_path / "few", env)
    with together(many, few) as servers:
        for server in servers:
            answers.append(server.tokens(prompts, 24))
            counts = server.rheo()
            blocks = counts["device_blocks"] + counts["host_blocks"]
            assert blocks < 24 * 3 * 4 * 2 * (512 // 64 + 1)  # steps x requests x layers x heads x budget
    assert answers[0] == answers[1]
