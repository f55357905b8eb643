"""Where the GPU's time of a decode step goes, from a trace of SGLang's profiler (`/start_profile`).

`python benchmarks/step_split.py TRACE.json.gz` prints milliseconds a step. Steps are counted by RheoServe's page table
kernel, which starts each; the kernels of the forward pass's stream are sorted by name, what runs beside it is apart.
"""

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path

FIRST, ALWAYS = "_snapshot", "_attend_split"
PARTS = {
    "score and plan": r"^_(score|queries|keys|plan|begin|disturb|first)$",
    "synthetic gate": r"^_(draw|replay)$",  # the benchmark's own
    "resident": r"^_attend_split$",
    "merge and wait": r"^_merge$",
    "append": r"^_(append|snapshot)$",
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


def split_step(kernels: list[dict]) -> dict:
    """Milliseconds of a step by part, and what no kernel of the forward pass's stream covers.

    Raises:
        ValueError: fewer than two steps of RheoServe in it
    """
    starts = [kernel["at"] for kernel in kernels if kernel["name"] == FIRST]
    if len(starts) < 2:
        raise ValueError(f"the trace has {len(starts)} kernels named {FIRST}; needed: 2 or more, one of each step")
    own = next(kernel["stream"] for kernel in kernels if kernel["name"] == ALWAYS)
    steps, inside = len(starts) - 1, [kernel for kernel in kernels if starts[0] <= kernel["at"] < starts[-1]]
    here = [kernel for kernel in inside if kernel["stream"] == own]
    took, launches = Counter(), Counter()
    latest = starts[0]
    for kernel in here:
        # One that starts before the one in front has ended waits for it: that time is the other's.
        end = min(kernel["at"] + kernel["took"], starts[-1])
        took[part_of(kernel["name"])] += max(end - max(kernel["at"], latest), 0)
        latest = max(latest, end)
        launches[part_of(kernel["name"])] += 1
    whole, beside = starts[-1] - starts[0], sum(k["took"] for k in inside if k["stream"] != own)
    split = {part: round(micro / steps / 1000, 3) for part, micro in sorted(took.items())}
    split |= {"between kernels": round((whole - sum(took.values())) / steps / 1000, 3)}
    split |= {"step": round(whole / steps / 1000, 3), "beside": round(beside / steps / 1000, 3)}
    return split | {"steps": steps, "kernels": {part: round(count / steps, 1) for part, count in launches.items()}}


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
