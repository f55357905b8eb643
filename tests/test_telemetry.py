"""What a live server tells: metrics, the decode log line, and a dashboard that asks for metrics that exist."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from serving import random_prompts

from rheoserve_sgl.runtime.telemetry import COUNTERS, GAUGES, PREFIX

pytestmark = pytest.mark.server
MONITORING = Path(__file__).parents[1] / "docs" / "monitoring"
ON_A_GPU = {"exposed_wait_seconds", "exchange_wait_seconds"}


def test_counters_grow_with_the_work_and_agree_with_server_info(full):
    full.generate(random_prompts(1, [1500]), 9)
    before, told_before = full.metrics(), full.rheo()
    full.generate(random_prompts(2, [1500, 300]), 40)
    after, told = full.metrics(), full.rheo()

    def grown(name):
        return after[f"{PREFIX}{name}_total"] - before[f"{PREFIX}{name}_total"]

    interval = 4  # steps between reports
    assert abs(grown("decode_steps") - (told["decode_steps"] - told_before["decode_steps"])) <= 2 * interval
    assert grown("device_blocks") > 0 and grown("host_blocks") > 0
    assert grown("selection_seconds") > 0 and grown("host_attention_seconds") > 0
    spent = told["host_blocks"] - told_before["host_blocks"]
    assert abs(grown("host_blocks") - spent) <= spent * 2 * interval / 39 + 1
    assert after[PREFIX + "frames"] == told["frames_used"] + told["frames_free"]
    assert after[PREFIX + "host_pages"] == told["host_pages_used"] + told["host_pages_free"]
    assert 0 < after[PREFIX + "frames_used"] <= after[PREFIX + "frames"]
    running, used, pages = (after[f"{PREFIX}host_pages{part}"] for part in ("_running", "_used", ""))
    assert 0 <= running <= used <= pages and used > 1500 // 64, (running, used, pages)


def test_pages_of_running_requests_are_told_while_they_run(full):
    seen = []
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(full.generate, random_prompts(6, [1500]), 300)
        while not answer.done():
            seen.append(full.metrics()[PREFIX + "host_pages_running"])
        answer.result()
    assert any(1500 // 64 <= pages <= 1 + 1800 // 64 for pages in seen), seen


def test_every_metric_is_there_with_sglangs_labels(full):
    full.generate(random_prompts(3, [10]), 9)
    text = requests.get(full.url + "/metrics", timeout=60).text
    for name in COUNTERS.keys() - ON_A_GPU:
        assert re.search(rf"^{PREFIX}{name}_total\{{[^}}]*model_name=", text, re.M), name
    for name in GAUGES:
        assert re.search(rf"^{PREFIX}{name}\{{[^}}]*model_name=", text, re.M), name


def test_the_decode_log_line_tells_of_frames_and_of_the_cpus_share(full):
    full.generate(random_prompts(4, [1500]), 9)
    lines = re.findall(r"Decode batch.*frame usage: (\d\.\d\d), host share: (\d\.\d{3})", full.log.read_text())
    assert lines and all(0 <= float(x) <= 1 for line in lines for x in line)
    assert any(float(share) > 0.5 for _, share in lines)  # frames for 512 tokens, prompts of 1500


def refuse(server, options: dict):
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "custom_params": {"rheoserve": options}}}
    assert server.post("/generate", body).status_code == 400


def test_refused_requests_are_counted_by_reasons_that_no_client_can_invent(full):
    name = "sglang:rheoserve_refused_requests_total"
    refuse(full, {"report": "yes"})  # the first request makes the metric
    before = requests.get(full.url + "/metrics", timeout=60).text
    for options in ({"report": 1}, {"a": 1}, {"b": 1}, {"mode": "window"}):
        refuse(full, options)
    after = requests.get(full.url + "/metrics", timeout=60).text

    def counts(text: str) -> dict[str, float]:
        found = re.findall(rf'^{name}\{{[^}}]*reason="([a-z_]*)"[^}}]*\}} (\S+)', text, re.M)
        return {reason: float(value) for reason, value in found}

    grown = {reason: value - counts(before).get(reason, 0.0) for reason, value in counts(after).items()}
    assert {reason: value for reason, value in grown.items() if value} == {"report": 1, "unknown": 2, "rheoserve": 1}


def test_the_dashboard_asks_for_metrics_that_exist(full):
    full.generate(random_prompts(5, [10]), 9)
    there = set(full.metrics()) | {f"{PREFIX}{name}_total" for name in ON_A_GPU}
    panels = json.loads((MONITORING / "dashboards" / "rheoserve.json").read_text())["panels"]
    assert len(panels) >= 6
    for panel in panels:
        for target in panel["targets"]:
            asked = set(re.findall(r"sglang:[a-z_]+", target["expr"]))
            assert asked and asked <= there, f"{panel['title']}: {asked - there}"
