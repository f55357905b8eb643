"""How a profiler's trace is split into the parts of a step."""

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from step_split import kernels_of, part_of, split_step


def event(name: str, at: float, took: float, stream: int = 7, cat: str = "kernel") -> dict:
    return {"cat": cat, "name": name, "ts": at, "dur": took, "args": {"stream": stream}}


def step(at: float) -> list[dict]:
    """100 us: 60 of kernels, 40 of nothing, and a copy beside them."""
    own = [("_snapshot", 0, 5), ("nvjet_tst_gemm", 10, 20), ("_score", 35, 5), ("_plan", 45, 5)]
    own += [("_attend_split", 55, 15), ("_merge", 75, 10)]
    events = [event(name, at + start, took) for name, start, took in own]
    return [*events, event("_fill", at + 3, 50, stream=9)]


def test_steps_are_whole_and_parts_add_up(tmp_path):
    trace = tmp_path / "trace.json.gz"
    events = [event("python", 0, 500, cat="cpu_op"), event("_merge", -20, 10), *step(0), *step(100), *step(200)]
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    split = split_step(kernels_of(trace))
    assert split["steps"] == 2 and split["step"] == 0.1 and split["beside"] == 0.05
    assert split["weights"] == 0.02 and split["score and plan"] == 0.01 and split["resident"] == 0.015
    assert split["merge and wait"] == 0.01 and split["append"] == 0.005 and split["between kernels"] == 0.04
    assert split["kernels"]["score and plan"] == 2


@pytest.mark.parametrize("listed", [True, False])
def test_a_kernel_that_starts_early_waits_in_the_time_of_the_one_in_front(listed):
    """But attention works beside the plan, where its lists were made before."""
    names = ("_snapshot", "_list" if listed else "_append", "_plan", "_attend_split", "_merge")
    kernels = [{"name": name, "stream": 7, "at": 10 * n, "took": 18} for n, name in enumerate(names)]
    kernels += [{"name": "_snapshot", "stream": 7, "at": 60, "took": 5}]
    split = split_step(kernels)
    assert split["append"] == 0.028 and split["merge and wait"] == 0.01
    # The plan is alone from 28 on, until attention starts or, if that waits for it, to its end at 38.
    assert (split["score and plan"], split["resident"]) == ((0.002, 0.018) if listed else (0.01, 0.01))
    assert split["between kernels"] == 0.002 and split["step"] == 0.06


def test_a_prefill_between_two_steps_is_no_step(tmp_path):
    """It has a page table too, for the first importance of its blocks."""
    prefill = [event("_snapshot", 100, 5), event("nvjet_tst_gemm", 110, 3000), event("_first", 3200, 10)]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [*step(0), *prefill, *step(4000), *step(4100)]}))
    split = split_step(kernels_of(trace))
    assert split["steps"] == 2 and split["step"] == 0.1 and split["weights"] == 0.02


@pytest.mark.parametrize("names", [["_snapshot"], ["_snapshot", "_attend_split"], ["_snapshot", "_first", "_snapshot"]])
def test_a_trace_without_a_whole_step_is_refused(names):
    with pytest.raises(ValueError, match="no step from one kernel _snapshot to the next with _attend_split between"):
        split_step([{"name": name, "stream": 7, "at": at, "took": 1} for at, name in enumerate(names)])


def test_kernels_of_others_are_not_ours():
    assert part_of("void at::native::_scatter_gather_elementwise") == "other"
    assert part_of("_draw") == "synthetic gate" and part_of("_claim") == "swap"
    assert part_of("sm90_xmma_gemm_bf16") == "weights"
