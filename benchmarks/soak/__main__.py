"""Minutes of mixed traffic on a live server: `python -m benchmarks.soak --minutes 10`.

Plain and long prompts, conversations, shared prefixes, budgets of requests' own, structured output, clients that leave,
aborts, flushes and bad requests, from several clients at once, with SGLang's memory checks and the canary on, few
frames, a small host store, and a retraction every 40 steps. The budget covers every prompt, so each answer
is dense attention's: afterwards a sample of them is compared, token by token, with a server of SGLang's own attention.
Ends with 1 if anything was wrong; the last line is JSON.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe_machine
from serving import Checkpoints, Server, on_gpu

from benchmarks.soak.memory import MemoryWatch
from benchmarks.soak.traffic import Kept, Traffic

GROWTH = 0.02  # of the host's memory, in the last third
DEVICE_GROWTH_MB = 128  # most of a GPU's memory is taken when a server starts
COMMON = ["--context-length", "16384", "--chunked-prefill-size", "2048"]
RHEOSERVE = [
    *("--attention-backend", "rheoserve", "--rheoserve-device-tokens", "2048", "--rheoserve-token-budget", "16384"),
    *("--max-running-requests", "8", "--enable-custom-logit-processor", "--rheoserve-canary", "raise"),
    *("--rheoserve-admission", "on"),
]
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "40",
}


def compare(server: Server, kept: list[Kept], tolerance: float) -> list[str]:
    """Which answers dense attention would not have given: a token is not its best one, up to `tolerance` nats."""
    wrong = []
    for number, one in enumerate(kept):
        body = {
            "input_ids": one.prompt + one.answer,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            **{"return_logprob": True, "logprob_start_len": len(one.prompt) - 1, "top_logprobs_num": 1},
        }
        reply = server.post("/generate", body)
        assert reply.status_code == 200, f"{reply.text}\n{server.tail()}"
        meta = reply.json()["meta_info"]
        said = meta["input_token_logprobs"][-len(one.answer) :]
        best = meta["input_top_logprobs"][-len(one.answer) :]
        for at, (own, top) in enumerate(zip(said, best, strict=True)):
            if own[0] < top[0][0] - tolerance:
                below = top[0][0] - own[0]
                wrong.append(f"{one.kind}, {len(one.prompt)} tokens, token {at} of the answer: {below:.3g} nats below")
                break
        if (number + 1) % 10 == 0:
            print(f"compared {number + 1} of {len(kept)}", flush=True)
    return wrong


def soak(args, model: Path, folder: Path) -> dict:
    """The figures of the run."""
    flags = [*COMMON, *RHEOSERVE, "--rheoserve-host-size", str(args.host_size), "--dtype", args.dtype, *args.flags]
    with Server(model, flags, folder / "rheoserve.log", env=STRICT) as server:
        traffic = Traffic(server.url, args.seed, args.compared)
        with MemoryWatch(server.process.pid) as memory:
            traffic.run(args.clients, args.minutes * 60)
        alive = server.process.poll() is None
        left = server.settle() if alive else {}
        log = server.log.read_text(errors="replace")
    failures = [f"{kind}: {what}" for kind, what in traffic.failures]
    if not alive:
        failures.append("the server ended: " + log[-2000:])
    for name in ("frames_used", "host_pages_used"):
        if left.get(name):
            failures.append(f"{name} is {left[name]} after the last request and a flush")
    grown = memory.growth()
    if memory.error:
        failures.append(f"memory was not watched to the end: {memory.error}")
    if grown["host"].get("last_third_grew", 0.0) > GROWTH:
        failures.append(f"host memory grew: {grown['host']}")
    thirds = grown.get("device", {}).get("thirds_mb")
    if thirds and thirds[2] - thirds[1] > DEVICE_GROWTH_MB:
        failures.append(f"device memory grew: {grown['device']}")
    dense = ["--attention-backend", args.dense, "--page-size", "64", "--max-total-tokens", "65536"]
    with Server(model, [*COMMON, *dense, "--dtype", args.dtype], folder / "dense.log") as server:
        wrong = compare(server, traffic.kept, args.tolerance)
    return {
        "requests": dict(sorted(traffic.done.items())),
        "retracted": sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log))),
        "exchanges": left.get("exchanges"),
        "host_attention_share": left.get("host_attention_share"),
        "compared": len(traffic.kept),
        "wrong_answers": wrong,
        "failures": failures,
        "memory": grown,
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="local checkpoint; default: a small one of random weights is made")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compared", type=int, default=40, help="answers that are compared")
    parser.add_argument("--host-size", type=float, default=0.06, help="GB")
    gpu = on_gpu()  # where SGLang has no kernels for fp32
    parser.add_argument("--dtype", default="float16" if gpu else "float32")
    dense = "triton" if gpu else "torch_native"
    parser.add_argument("--dense", default=dense, help=f"SGLang's attention backend to compare with; default {dense}")
    parser.add_argument("--tolerance", type=float, default=0.02 if gpu else 1e-3, help="nats; more for 16-bit dtypes")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for RheoServe")
    args = parser.parse_args(argv)
    if gpu and "--sampling-backend" not in args.flags:
        args.flags = [*args.flags, "--sampling-backend", "pytorch"]  # the default's kernels are compiled for minutes
    with tempfile.TemporaryDirectory() as folder:
        folder = args.logs or Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = args.model or Checkpoints(folder).path()
        result = soak(args, model, folder)
    for text in result["failures"] + result["wrong_answers"]:
        print(text)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"benchmark": "soak", "options": options, **result, **describe_machine()}))
    return 1 if result["failures"] or result["wrong_answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
