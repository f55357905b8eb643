"""Decode throughput on a CPU: SGLang's torch_native, RheoServe `full`, RheoServe `balanced`.

Real servers, one after another, on the same small checkpoint with the same prompts. Decode tokens/s is the
difference between a long and a short generation after the same cached prompts, so that start-up, prefill and
HTTP cancel out; the median of several repeats. The last line of the output is one JSON document.

Usage: python benchmarks/bench_decode_cpu.py [--contexts 4096 16384] [--batches 1 4] [--budget 1024]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from machine import describe_machine
from serving import Checkpoints, Server, random_prompts

SHORT = 4  # tokens of the generation that is subtracted


def systems(args) -> dict[str, list[str]]:
    tokens = str((max(args.contexts) + 2 * args.steps) * max(args.batches) * 5 // 4 // 64 * 64)
    rheo = [
        "--attention-backend",
        "rheoserve",
        "--rheoserve-device-tokens",
        tokens,
        "--rheoserve-host-ratio",
        "1",
    ]
    few = [
        "--attention-backend",
        "rheoserve",
        "--rheoserve-device-tokens",
        str(args.budget * max(args.batches)),
    ]
    few += ["--rheoserve-host-ratio", str(int(tokens) / (args.budget * max(args.batches)))]
    return {
        "torch_native": [
            "--attention-backend",
            "torch_native",
            "--page-size",
            "64",
            "--max-total-tokens",
            tokens,
        ],
        "full": [*rheo, "--rheoserve-mode", "full"],
        "balanced": [*few, "--rheoserve-token-budget", str(args.budget), "--rheoserve-window-tokens", "256"],
    }


def tokens_per_second(server: Server, prompts: list[list[int]], steps: int, repeats: int) -> float:
    for prompt in prompts:  # one by one into the prefix cache: torch_native takes minutes for 16K tokens
        server.tokens([prompt], 1)
    server.tokens(prompts, SHORT)
    rates = []
    for _ in range(repeats):
        began = time.perf_counter()
        server.tokens(prompts, SHORT)
        between = time.perf_counter()
        server.tokens(prompts, SHORT + steps)
        rates.append(len(prompts) * steps / (time.perf_counter() - between - (between - began)))
    return statistics.median(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--budget", type=int, default=1024, help="tokens selected per KV head in `balanced`")
    parser.add_argument("--steps", type=int, default=48, help="decode steps timed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--model",
        default="--layers 4 --heads 16 --kv-heads 8 --head-dim 128",
        help="options of rheoserve_sgl.nano.make, as --model='...'; default: four layers with Qwen3-0.6B's attention",
    )
    args = parser.parse_args()

    prompts = random_prompts(0, [max(args.contexts)] * max(args.batches))
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Checkpoints(Path(folder)).path(*args.model.split())
        context = str(max(args.contexts) + 2 * args.steps + 64)
        for name, flags in systems(args).items():
            flags = [
                *flags,
                "--context-length",
                context,
                "--dtype",
                args.dtype,
                "--chunked-prefill-size",
                "8192",
            ]
            with Server(model, flags, Path(folder) / f"{name}.log") as server:
                for length in args.contexts:
                    for batch in args.batches:
                        picked = [prompt[:length] for prompt in prompts[:batch]]
                        rate = tokens_per_second(server, picked, args.steps, args.repeats)
                        results.setdefault(f"context {length}, batch {batch}", {})[name] = round(rate, 1)
                        print(f"{name:13s} context {length:6d} batch {batch}: {rate:8.1f} tokens/s", flush=True)

    print(f"\n{'':24s} {'torch_native':>13s} {'full':>16s} {'balanced':>16s}   decode tokens/s (times torch_native)")
    for case, rates in results.items():
        base = rates["torch_native"]
        cells = [f"{rates[name]:8.1f} ({rates[name] / base:4.1f}x)" for name in ("full", "balanced")]
        print(f"{case:24s} {base:13.1f} {cells[0]:>16s} {cells[1]:>16s}")
    document = {
        "benchmark": "decode_cpu",
        "options": vars(args),
        "tokens_per_second": results,
        **describe_machine(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
