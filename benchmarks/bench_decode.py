"""Decode throughput on a GPU with Qwen3-8B's shapes: SGLang, SGLang with HiCache, and RheoServe, with the same device
memory for KV.

Real servers, one after another, each for all contexts; weights are random (`--load-format dummy`), and so are the
prompts. RheoServe's selection is synthetic (synthetic_scores.py): of a given churn a step, or with `--systems traced`
what a real model selected (traces/); with `--systems quest` it is what the random weights give. Beside a synthetic
selection the gate's own scores are computed, so that their cost is paid: Quest's, or with `--gate learned` those of a
gate of random weights in SeerAttention-R's shapes.
Each system decodes as many requests at once as it holds, up to `--requests`. Tokens/s is the difference between a long
and a short generation after the same cached prompts, so that prefill and HTTP cancel out, and with `--warm` the first
tokens too, while RheoServe's frames fill: `warm_ms` tells what a step costs then. What one row leaves in RheoServe's
frames and in what it has learnt about admission the next row finds. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import numpy as np
import torch
from machine import describe_machine
from serving import Server, random_prompts
from step_split import kernels_of, split_step

from rheoserve_sgl.gate.checkpoint import GateConfig, ModelShape, write_gate

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
TOKEN_BYTES = 2 * 36 * 8 * 128 * 2
BLOCK_BYTES, LISTS = 2 * 64 * 128 * 2, 36 * 8
COUNTS = (
    *("decode_steps", "device_blocks", "host_blocks", "exchanged_bytes"),
    *("host_attention_seconds", "exposed_wait_seconds", "exchange_wait_seconds"),
)
PROFILE_STEPS = 12
# Of every server with these shapes: there are no weights and no tokenizer.
DUMMY = [
    *("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"),
    *("--mem-fraction-static", "0.85", "--sampling-backend", "pytorch"),
]
TRACE = Path(__file__).with_name("traces") / "nano_32k.npz"
SYNTHETIC = Path(__file__).with_name("synthetic_server.py")


def tokens_of(gigabytes: float) -> int:
    """Tokens, in whole pages, whose KV takes so much memory."""
    return int(gigabytes * 1e9 / TOKEN_BYTES) // 64 * 64


def systems(args, folder: Path) -> dict[str, tuple[list[str], list[str] | None]]:
    """Flags and program of each system that was asked for."""
    tokens = tokens_of(args.device_gb)
    own = ["--page-size", "64", "--max-total-tokens", str(tokens)]
    host_gb = min(1.02 * args.requests * room(max(args.context), args) * TOKEN_BYTES / 1e9, args.host_gb)
    rheo = ["--attention-backend", "rheoserve", "--rheoserve-device-tokens", str(tokens)]
    rheo += [
        "--rheoserve-host-size",
        f"{host_gb:.1f}",
        "--rheoserve-token-budget",
        str(args.budget),
        *args.rheo.split(),
    ]
    if args.gate == "learned":
        rheo += ["--rheoserve-gate-path", str(folder / "gate")]
    hicache = ["--enable-hierarchical-cache", "--hicache-size", f"{host_gb:.0f}"]
    every = {
        "sglang": ([*own, "--attention-backend", args.peer], None),
        "hicache": ([*own, "--attention-backend", args.peer, *hicache], None),
        "quest": (rheo, None),
        "rheoserve": (rheo, [sys.executable, str(SYNTHETIC), str(folder / "churn")]),
        "traced": ([*rheo, "--rheoserve-window-tokens", "256"], [sys.executable, str(SYNTHETIC), str(args.trace)]),
    }
    return {name: every[name] for name in args.systems}


def write_random_gate(path: Path):
    """A learned gate for the model, as published ones are."""
    model = ModelShape(
        layers=QWEN3_8B["num_hidden_layers"],
        heads=QWEN3_8B["num_attention_heads"],
        kv_heads=QWEN3_8B["num_key_value_heads"],
        head_dim=QWEN3_8B["head_dim"],
    )
    config = GateConfig()
    layers = [
        {name: 0.02 * torch.randn(shape) for name, shape in config.shapes(model).items()} for _ in range(model.layers)
    ]
    write_gate(path, config, layers, "random weights")


def room(context: int, args) -> int:
    """Tokens of one request's KV."""
    return context + 2 * (args.warm + args.steps)


def measure(server: Server, prompts: list[list[int]], args, rheo: bool) -> dict:
    """Tokens/s of all requests together; their prompts are cached."""

    def spent(tokens: int) -> dict:
        """Seconds, and RheoServe's counts, of a generation."""
        before, start = counts(), time.perf_counter()
        server.tokens(prompts, tokens)
        took = time.perf_counter() - start
        return {"seconds": took} | {key: value - before[key] for key, value in counts().items()}

    def counts() -> dict:
        return {key: value for key, value in server.rheo().items() if key in COUNTS} if rheo else {}

    spent(args.warm)
    rates, firsts, timed = [], [], dict.fromkeys((*COUNTS, "seconds"), 0)
    for _ in range(args.repeats):
        nothing, warm, whole = (spent(tokens) for tokens in (1, args.warm, args.warm + args.steps))
        rates.append(len(prompts) * args.steps / (whole["seconds"] - warm["seconds"]))
        firsts.append(1000 * (warm["seconds"] - nothing["seconds"]) / (args.warm - 1))
        timed = {key: timed[key] + whole.get(key, 0) - warm.get(key, 0) for key in timed}
    return {
        "requests": len(prompts),
        "tokens_per_second": round(statistics.median(rates), 1),
        "token_ms": round(1000 * len(prompts) / statistics.median(rates), 2),  # of one request, its waiting included
        "warm_ms": round(statistics.median(firsts), 2),
    } | (of_a_step(timed, len(prompts), len(prompts[0]), args) if rheo else {})


def profiled(server: Server, prompts: list[list[int]], args, folder: Path) -> dict:
    """How the GPU's time of some steps after the warm-up is split; the trace stays in `folder`."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.json.gz"):
        old.unlink()
    before = server.rheo()["decode_steps"]
    with ThreadPoolExecutor(1) as beside:
        answer = beside.submit(server.tokens, prompts, args.warm + args.steps)
        while server.rheo()["decode_steps"] < before + args.warm and not answer.done():
            time.sleep(0.1)
        order = {"output_dir": str(folder), "num_steps": PROFILE_STEPS, "activities": ["GPU"]}
        server.post("/start_profile", order | {"profile_prefix": f"decode-{len(prompts)}"})
        answer.result()
    deadline = time.time() + 60
    while not (traces := list(folder.glob(f"decode-{len(prompts)}-*.json.gz"))):
        if time.time() > deadline:
            raise RuntimeError(f"no trace in {folder} after 60 s:\n{server.tail()}")
        time.sleep(0.5)
    time.sleep(1)  # until it is written
    return {"split_ms": split_step(kernels_of(traces[0]))}


def of_a_step(timed: dict, requests: int, context: int, args) -> dict:
    """What RheoServe counted in the timed steps, for each of them."""
    steps = max(timed["decode_steps"], 1)  # more than were asked for, where requests wait for one another
    visited = timed["host_blocks"]
    selected = args.repeats * args.steps * requests * LISTS * min(args.budget, context) // 64
    return {
        "step_ms": round(1000 * timed["seconds"] / steps, 2),
        "missed": round(visited / selected, 4),  # of the selection, that is; the share below is of all that is attended
        "host_share": round(visited / max(visited + timed["device_blocks"], 1), 4),
        "host_mb_a_step": round(visited * BLOCK_BYTES / 1e6 / steps, 1),
        "exchanged_mb_a_step": round(timed["exchanged_bytes"] / 1e6 / steps, 1),
        "host_attention_ms_a_step": round(1000 * timed["host_attention_seconds"] / steps, 2),
        "exposed_wait_ms_a_step": round(1000 * timed["exposed_wait_seconds"] / steps, 2),
        "exchange_wait_ms_a_step": round(1000 * timed["exchange_wait_seconds"] / steps, 2),
    }


def holds(name: str, context: int, args) -> int:
    """Requests that a system can decode at once."""
    gigabytes = args.device_gb if name in ("sglang", "hicache") else args.host_gb
    return max(min(int(gigabytes * 1e9 / TOKEN_BYTES // room(context, args)), args.requests), 1)


def seconds_of(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def window(server: Server) -> tuple[float, float]:
    """Milliseconds of a step, predicted and measured, of the last window of steps that nobody joined or left."""
    told = server.rheo()
    return tuple(round(1000 * told[f"{name}_step_seconds"], 2) for name in ("predicted", "measured"))


def run(name: str, args, folder: Path) -> list[dict]:
    """Rows of one system: each context, and there each churn and each number of requests."""
    flags, program = systems(args, folder)[name]
    most = max(args.context) + 4 * (args.warm + args.steps)
    flags = [*flags, *DUMMY, "--context-length", str(most), "--cuda-graph-max-bs", str(args.requests)]
    rheo, rows, churns = "rheoserve" in flags, [], args.churn if name == "rheoserve" else [None]
    (folder / "churn").write_text(str(args.churn[0]))
    with Server(folder / "model", flags, folder / f"{name}.log", program=program) as server:
        for context in args.context:
            prompts = random_prompts(0, [context] * holds(name, context, args))
            server.flush()
            prefill = [seconds_of(lambda prompt=prompt: server.tokens([prompt], 1)) for prompt in prompts]
            counts = {count for count in args.counts or (1,) if count <= len(prompts)} | {len(prompts)}
            for churn in churns:
                (folder / "churn").write_text(str(churn))
                for count in sorted(counts if churn == churns[0] else {len(prompts)}, reverse=True):
                    row = {"system": name, "context": context, "device_gb": args.device_gb, "churn": churn}
                    # The first compiles what no prompt of this length needed before.
                    row["prefill_tokens_per_second"] = round(context / statistics.median(prefill))
                    row["first_prompt_seconds"] = round(prefill[0], 3)
                    before = window(server) if rheo else None
                    row |= measure(server, prompts[:count], args, rheo)
                    if rheo and window(server) != before:
                        row["predicted_ms"], row["windows_ms"] = window(server)
                    if rheo and args.profile and churn == churns[0]:
                        row |= profiled(server, prompts[:count], args, folder / f"traces-{context}")
                    print(row, flush=True)
                    rows.append(row)
    return rows


def print_table(rows: list[dict]):
    head = f"{'system':12s} {'churn':>6s} {'context':>8s} {'requests':>8s} {'tokens/s':>9s} {'token ms':>8s}"
    print(f"\n{head} {'times SGLang':>12s} {'missed':>8s}")
    for row in rows:
        own = [one for one in rows if one["system"] in ("sglang", "hicache") and one["context"] == row["context"]]
        best = max((one["tokens_per_second"] for one in own), default=None)
        times = f"{row['tokens_per_second'] / best:.2f}x" if best else ""
        missed = f"{row['missed']:.3f}" if "missed" in row else ""
        churn = "" if row["churn"] is None else f"{row['churn']:g}"
        figures = f"{row['context']:8d} {row['requests']:8d} {row['tokens_per_second']:9.1f} {row['token_ms']:8.2f}"
        print(f"{row['system']:12s} {churn:>6s} {figures} {times:>12s} {missed:>8s}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["sglang", "hicache", "rheoserve", "traced", "quest"]
    parser.add_argument("--systems", nargs="+", default=names[:3], choices=names)
    parser.add_argument("--peer", default="fa3", help="attention backend of SGLang's own")
    parser.add_argument("--context", type=int, nargs="+", default=[32768])
    parser.add_argument("--device-gb", type=float, default=12, help="GB of device memory for KV")
    parser.add_argument("--host-gb", type=float, default=104, help="GB of RheoServe's host store, at most")
    parser.add_argument("--requests", type=int, default=8, help="at once, where they fit")
    parser.add_argument("--counts", type=int, nargs="*", help="of requests, also measured; default: 1")
    parser.add_argument(
        "--churn",
        type=float,
        nargs="+",
        default=[0.05],
        help="of the selection, a step; after the first one only for all requests at once",
    )
    parser.add_argument(
        "--gate", choices=["quest", "learned"], default="quest", help="whose cost a synthetic selection has"
    )
    parser.add_argument("--trace", type=Path, default=TRACE, help="a packed trace (traces/pack.py)")
    parser.add_argument("--budget", type=int, default=4096, help="tokens selected per KV head")
    parser.add_argument("--warm", type=int, default=64, help="tokens before those that are timed, at least 2")
    parser.add_argument("--steps", type=int, default=128, help="decode steps timed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rheo", default="", help="more flags for RheoServe, as --rheo='...'")
    parser.add_argument(
        "--profile", action="store_true", help="split the GPU's time of RheoServe's steps (first churn)"
    )
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    args = parser.parse_args()
    if args.warm < 2:
        parser.error(f"--warm is {args.warm}; legal: at least 2")
    if args.gate == "learned" and "quest" in args.systems:
        parser.error("--gate is learned; legal with --systems quest: quest")
    if "traced" in args.systems and min(args.context) // 64 < (pages := int(np.load(args.trace)["pages"])):
        parser.error(f"--context is {min(args.context)}; legal with --trace {args.trace}: at least {64 * pages}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = args.logs or Path(folder)
        (folder / "model").mkdir(parents=True, exist_ok=True)
        (folder / "model" / "config.json").write_text(json.dumps(QWEN3_8B))
        if args.gate == "learned":
            write_random_gate(folder / "gate")
        for name in args.systems:
            rows += run(name, args, folder)
    print_table(rows)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"benchmark": "decode", "options": options, "rows": rows, **describe_machine()}))


if __name__ == "__main__":
    main()
