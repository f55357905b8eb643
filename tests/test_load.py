"""Requests that arrive at random, faster than they can decode at once: all end, none starves, nothing is left."""

import asyncio
import statistics
import sys
from pathlib import Path

import pytest
from serving import Watch, rheo_server

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_load import REPORT, draw_load, percentile, send

pytestmark = pytest.mark.server
FLAGS = ["--rheoserve-admission", "on", "--rheoserve-device-tokens", "4096", "--chunked-prefill-size", "1024"]
FLAGS += ["--rheoserve-token-budget", "1024", "--rheoserve-window-tokens", "128"]
OBJECTIVE = ["--rheoserve-tpot-slo-ms", "10"]  # about what a step with a chunk beside it takes, on two cores
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
MOST_SECONDS = 240
BLOCKS_OF_A_PAGE = 8  # of the small checkpoint: 4 layers of 2 KV heads


@pytest.mark.parametrize("objective", [[], OBJECTIVE], ids=["no objective", "objective"])
def test_a_random_load_is_served_to_the_end(objective, checkpoints, dense, tmp_path):
    load = draw_load(rate=2.5, seconds=10, prompt=(200, 3000), answer=(10, 120), vocabulary=256, seed=3)
    assert len(load) > 20
    with rheo_server(checkpoints.path(), FLAGS + objective, tmp_path, STRICT) as server:
        with Watch(server, seconds=0.2) as seen:
            ended, late = asyncio.run(send(server.url, load, MOST_SECONDS, REPORT))
        assert not late and len(ended) == len(load)
        told = [one["waited_seconds"] for one in ended]
        waits = [one["waited_seconds"] for now in seen for one in now["prefilled"]]
        first = [one["first"] for one in ended]
        print(
            f"{len(load)} requests; first token after {statistics.mean(first):.2f} s on average, P99 "
            f"{percentile(first, 0.99):.2f}; longest wait to decode {max(waits, default=0):.2f} s; at most "
            f"{max(now['waiting'] for now in seen)} waiting, {max(now['decoding'] for now in seen)} decoding"
        )
        assert min(told) >= 0 and max(told) >= max(waits, default=0) - 0.01  # what was seen on the way was not yet all
        if not objective:  # which may leave room for one at a time only
            assert max(now["waiting"] for now in seen) >= 1
            assert max(now["decoding"] for now in seen) >= 2
            assert max(waits) < 0.5 * (max(one["ended"] for one in ended) - min(one["began"] for one in ended))
        for now in seen:
            for one in now["prefilled"]:
                assert one["pages"] == -(-one["tokens"] // 64)
                assert one["state"] == "waiting" or one["budget_pages"] == 1024 // 64
                assert 0 <= one["frames"] <= one["pages"] * BLOCKS_OF_A_PAGE
            for one in now["arriving"]:
                assert one["state"] in ("prefilling", "registered")
                assert 0 <= one["prefilled_tokens"] < one["tokens"] < one["most_tokens"]
        state = server.rheo()
        assert 0 < state["predicted_step_seconds"] < 10 and 0 < state["measured_step_seconds"] < 10
        after = server.settle()
        assert after["frames_used"] == after["host_pages_used"] == 0
        assert server.process.poll() is None
    # What the budget covers is answered as dense attention does, whoever else there was.
    short = [row for row, (_, prompt, tokens) in enumerate(load) if len(prompt) + tokens <= 1024]
    assert len(short) >= 4
    for row in short:
        assert [ended[row]["answer"]] == dense.tokens([load[row][1]], load[row][2])
