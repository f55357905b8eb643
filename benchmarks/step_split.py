"""Where the GPU's time of a decode step goes, from a trace of SGLang's profiler (`/start_profile`).

`python benchmarks/step_split.py TRACE.json.gz` prints milliseconds a step. A step begins with RheoServe's page table
kernel, and attends with another one; the kernels of the forward pass's stream are sorted by name, what runs beside it
is apart.
"""

import argparse
import gzip
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

FIRST, LISTED, ALWAYS = "_snapshot", "_list", "_attend_split"
PARTS = {
    "score and plan": r"^_(score|queries|tap|plan|begin|disturb)$",
    "synthetic gate": r"^_(draw|replay)$",  # the benchmark's own
    "resident": r"^_attend_split$",
    "merge and wait": r"^_merge$",
    "append": r"^_(append|snapshot|tell|list)$",
    "swap": r"^_(pair|claim|fill)$",
    "weights": r"gemm|nvjet|cutlass|xmma|gemv|splitK",
}


def kernels_of(trace: Path) -> list[dict]:
    """What ran on the GPU, by start: name, stream, start and length in microseconds."""
    text = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    events = [event for event in json.loads(text)["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy")]
    events.sort(key=lambda event: event["ts"])
    return [{"name": e["name"], "stream": e["args"]["stream"], "at": e["ts"], "took": e["dur"]} for e in events]


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")


def steps_of(kernels: list[dict]) -> list[tuple[float, float]]:
    """(start, end) in microseconds of each step that has an end in the trace: the next step's start, or a prefill's,
    which also begins with a page table."""
    starts = [kernel["at"] for kernel in kernels if kernel["name"] == FIRST]
    decodes = [kernel["at"] for kernel in kernels if kernel["name"] == ALWAYS]
    return [(a, b) for a, b in pairwise(starts) if any(a <= at < b for at in decodes)]


def split_step(kernels: list[dict]) -> dict:
    """Milliseconds of a step by part, and what no kernel of the forward pass's stream covers.

    Raises:
        ValueError: no step of RheoServe's is in it from its start to the next
    """
    steps = steps_of(kernels)
    if not steps:
        raise ValueError(f"the trace has no step from one kernel {FIRST} to the next with {ALWAYS} between")
    own = next(kernel["stream"] for kernel in kernels if kernel["name"] == ALWAYS)
    took, launches = Counter(), Counter()
    whole = beside = 0.0
    for start, stop in steps:
        whole += stop - start
        latest, front, listed = start, FIRST, False
        for kernel in (kernel for kernel in kernels if start <= kernel["at"] < stop):
            if kernel["stream"] != own:
                beside += kernel["took"]
                continue
            # One that starts before the one in front has ended waits for it: that time is the other's. But attention
            # over what is resident begins at once, beside the plan, where its lists are made before.
            end = min(kernel["at"] + kernel["took"], stop)
            listed |= kernel["name"] == LISTED
            if listed and kernel["name"] == ALWAYS and kernel["at"] < latest:
                took[part_of(front)] -= latest - kernel["at"]
                latest = kernel["at"]
            took[part_of(kernel["name"])] += max(end - max(kernel["at"], latest), 0)
            latest, front = max(latest, end), kernel["name"]
            launches[part_of(kernel["name"])] += 1
    count = len(steps)
    split = {part: round(micro / count / 1000, 3) for part, micro in sorted(took.items())}
    split |= {"between kernels": round((whole - sum(took.values())) / count / 1000, 3)}
    split |= {"step": round(whole / count / 1000, 3), "beside": round(beside / count / 1000, 3)}
    return split | {"steps": count, "kernels": {part: round(n / count, 1) for part, n in launches.items()}}


def longest(kernels: list[dict], count: int = 20) -> list[tuple[str, int, float]]:
    """(name, how often, milliseconds in all, waiting for the one in front included) of the kernels that took most."""
    took, often = Counter(), Counter()
    for kernel in kernels:
        took[kernel["name"]] += kernel["took"]
        often[kernel["name"]] += 1
    return [(name, often[name], round(micro / 1000, 2)) for name, micro in took.most_common(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    kernels = kernels_of(parser.parse_args().trace)
    for name, often, milliseconds in longest(kernels):
        print(f"{milliseconds:9.2f} ms {often:6d} x {name[:100]}")
    print(json.dumps({"benchmark": "step_split", **split_step(kernels)}))


if __name__ == "__main__":
    main()
