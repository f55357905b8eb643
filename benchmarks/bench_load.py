"""A server under load: requests arrive at random (Poisson) with long prompts, and each answer streams back.

RheoServe against SGLang's own backend with the same device memory for KV, Qwen3-8B's shapes, random weights and random
prompts; RheoServe's selection is synthetic, of a given churn (synthetic_server.py). For each rate: time to first token,
time per further token, the longest gap between two, how long prefilled requests waited to decode, and tokens a second.
With `--limit` requests are cut off so many seconds after the first could arrive: tokens count till then, and a request
without one as having waited till then. Times per further token are of requests that ended. Arrivals, lengths of prompts
and of answers come from the seed alone, so that both systems get the same. `sglang.bench_serving` measures most of it
by the text that comes back, which token numbers of a model without a tokenizer do not have, and sees neither waits nor
blocks; so the requests are sent from here (bench_rates.py has that generator's figures). `--model` serves a checkpoint
as it is, also without a GPU. The last line is JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_decode import DUMMY, QWEN3_8B, SYNTHETIC, tokens_of
from machine import describe_machine
from serving import Server

from rheoserve_sgl.runtime.telemetry import PREFIX

SECONDS = 3600
REPORT = {"custom_params": {"rheoserve": {"report": True}}}


def draw_load(rate: float, seconds: float, prompt, answer, vocabulary: int, seed: int):
    """(second of arrival, prompt, tokens of the answer) of each request.

    Args:
        rate: requests a second
        seconds: in which they arrive
        prompt, answer: tokens, from and to
        vocabulary: token numbers are below
    """
    draw, at, load = random.Random(seed), 0.0, []
    while True:
        at += draw.expovariate(rate)
        if at > seconds:
            return load
        tokens = [draw.randrange(vocabulary) for _ in range(draw.randint(*prompt))]
        load.append((at, tokens, draw.randint(*answer)))


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int, seen: dict, options: dict
) -> None:
    """Keeps in `seen` one request's seconds: to its first token, for each further one, and the longest without any; its
    tokens as they came, if `options` ask for a report what that says of waits, and the answer.

    Args:
        options: custom_params of the request
    """
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **options}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    began = seen["began"] = time.perf_counter()
    last, gap = None, 0.0
    async with session.post(url + "/generate", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{url} answers {reply.status}: {await reply.text()}")
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            gap, last = max(gap, now - last) if last else gap, now
            seen.setdefault("first", now - began)
            told = json.loads(line[6:])
            seen["tokens"], seen["answer"] = told["meta_info"]["completion_tokens"], told["output_ids"]
            if told["meta_info"].get("finish_reason"):
                report = told["meta_info"]["finish_reason"].get("rheoserve", {})
                seen |= {name: report[name] for name in ("waited_seconds", "pauses") if name in report}
    if seen.get("tokens") != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {seen.get('tokens')}")
    seen |= {"each": (last - began - seen["first"]) / max(tokens - 1, 1), "gap": gap, "ended": last}


async def send(url: str, load, limit: float, options: dict | None = None) -> tuple[list[dict], list[dict]]:
    """Figures of the requests that ended, and of those that did not within `limit` seconds, each in their order."""
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:

        async def later(at: float, prompt: list[int], tokens: int, seen: dict):
            await asyncio.sleep(at)
            await ask(session, url, prompt, tokens, seen, options or {})

        figures = [{} for _ in load]
        tasks = [asyncio.create_task(later(*one, seen)) for one, seen in zip(load, figures, strict=True)]
        _, late = await asyncio.wait(tasks, timeout=limit)
        now = time.perf_counter()
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for task in tasks:
            if task not in late:
                task.result()  # raises what it raised
        figures = [seen for seen in figures if seen]  # without those that were not sent
        for seen in figures:
            seen["waited"] = seen.get("first", now - seen["began"])
        return [seen for seen in figures if "ended" in seen], [seen for seen in figures if "ended" not in seen]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def measure(server: Server, system: str, rate: float, args) -> dict:
    config = json.loads((args.model / "config.json").read_text()) if args.model else QWEN3_8B
    load = draw_load(rate, args.seconds, args.prompt, args.answer, config["vocab_size"], args.seed)
    limit = args.limit or SECONDS
    if not load:
        raise ValueError(f"--rates {rate:g} and --seconds {args.seconds:g} make no request with --seed {args.seed}")
    began = time.perf_counter()
    before = rheo_counts(server)
    with Sampler(server) as samples:
        ended, late = asyncio.run(send(server.url, load, limit, REPORT if system == "rheoserve" else None))
    each, gaps = ([one[name] for one in ended] for name in ("each", "gap"))
    waits = [one["waited_seconds"] for one in ended if "waited_seconds" in one]
    waited = [one["waited"] for one in (*ended, *late)]
    span = limit if late else max(one["ended"] for one in ended) - began
    after = rheo_counts(server)
    return {
        "system": system,
        "rate": rate,
        "requests": len(load),
        "not_ended": len(late),
        "not_begun": sum("first" not in one for one in late),
        "ttft_mean": round(statistics.mean(waited), 3),  # at least: of those without a token, how long they waited
        "ttft_median": round(statistics.median(waited), 3),
        "ttft_p99": round(percentile(waited, 0.99), 3),
        "tpot_ms": round(1000 * statistics.mean(each), 2) if each else None,
        "tpot_p99_ms": round(1000 * percentile(each, 0.99), 2) if each else None,
        "longest_gap": round(statistics.median(gaps), 3) if gaps else None,
        "longest_gap_p99": round(percentile(gaps, 0.99), 3) if gaps else None,
        **(waits_of(waits, ended) if waits else {}),
        "tokens_per_second": round(sum(one.get("tokens", 0) for one in (*ended, *late)) / max(span, 1e-9), 1),
        "span_seconds": round(span, 1),
        **{name: round(after[name] - before[name], 4) for name in after},
        **({"step_error": step_error(samples)} if samples else {}),
        "samples": samples,
    }


def waits_of(waits: list[float], ended: list[dict]) -> dict:
    """Of prefilled requests that waited to decode, or to decode again."""
    return {
        "wait_mean": round(statistics.mean(waits), 3),
        "wait_p99": round(percentile(waits, 0.99), 3),
        "pauses": sum(one.get("pauses", 0) for one in ended),
    }


def step_error(samples: list[dict]) -> float | None:
    """Median of |predicted / measured - 1| of a decode step, over the windows that were sampled."""
    pairs = {(one["predicted_step_seconds"], one["measured_step_seconds"]) for one in samples}
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs if predicted and measured]
    return round(statistics.median(errors), 4) if errors else None


class Sampler:
    """Reads gauges of RheoServe from a server's metrics every two seconds while a load runs."""

    NAMES = (
        *("transactions_decoding", "transactions_waiting", "working_set_pages"),
        *("predicted_step_seconds", "measured_step_seconds"),
    )

    def __init__(self, server: Server):
        self._server, self._samples, self._stop = server, [], threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        began = time.perf_counter()
        while not self._stop.wait(2):
            told = self._server.metrics()
            values = {name: round(told[PREFIX + name], 5) for name in self.NAMES if PREFIX + name in told}
            if len(values) == len(self.NAMES):
                self._samples.append({"at": round(time.perf_counter() - began, 1), **values})

    def __enter__(self) -> list[dict]:
        self._thread.start()
        return self._samples

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def rheo_counts(server: Server) -> dict:
    """Blocks by where they were attended, of a RheoServe server."""
    state = server.info()["internal_states"][0].get("rheoserve", {})
    return {name: state[name] for name in ("device_blocks", "host_blocks", "selected_blocks") if name in state}


def flags_of(system: str, args, folder: Path, longest: int) -> tuple[list[str], list[str] | None]:
    """Flags and program of a system, whose requests have so many tokens at most."""
    context = ["--context-length", str(longest + 64), "--enable-metrics"]
    if args.model:
        own = ["--attention-backend", args.peer] if system == "sglang" else ["--attention-backend", "rheoserve"]
        return [*context, *own, "--dtype", "auto", *(args.rheo.split() if system != "sglang" else [])], None
    tokens = tokens_of(args.device_gb)
    flags = [*DUMMY, *context, "--stream-interval", "8", "--cuda-graph-max-bs", str(args.most)]
    if system == "sglang":
        return [*flags, "--page-size", "64", "--max-total-tokens", str(tokens), "--attention-backend", args.peer], None
    flags += ["--attention-backend", "rheoserve", "--rheoserve-device-tokens", str(tokens)]
    flags += ["--rheoserve-host-size", str(args.host_gb), "--max-running-requests", str(args.most)]
    return [*flags, *args.rheo.split()], [sys.executable, str(SYNTHETIC), str(folder / "churn")]


def add_server_options(parser: argparse.ArgumentParser):
    """What flags_of and prepare look at."""
    parser.add_argument("--peer", default="fa3", help="attention backend of SGLang's own")
    parser.add_argument("--model", type=Path, help="serve this checkpoint as it is, instead of Qwen3-8B's shapes")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="requests a second")
    parser.add_argument("--device-gb", type=float, default=24, help="GB of device memory for KV")
    parser.add_argument("--host-gb", type=float, default=100, help="GB of RheoServe's host store")
    parser.add_argument("--most", type=int, default=32, help="requests at once")
    parser.add_argument("--churn", type=float, default=0.05, help="of the selection, a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rheo", default="", help="more flags for RheoServe, as --rheo='...'")
    parser.add_argument("--logs", type=Path, help="folder for the logs")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["sglang", "rheoserve"], choices=["sglang", "rheoserve"])
    parser.add_argument("--seconds", type=float, default=300, help="in which requests arrive")
    parser.add_argument("--limit", type=float, help="seconds after which what has not ended is given up")
    parser.add_argument("--prompt", type=int, nargs=2, default=[16384, 65536], help="tokens, from and to")
    parser.add_argument("--answer", type=int, nargs=2, default=[512, 1536], help="tokens, from and to")
    add_server_options(parser)
    return parser.parse_args()


def prepare(args, folder: Path) -> Path:
    """The checkpoint to serve; in `folder` what a made one and its synthetic selection need."""
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(QWEN3_8B))
    (folder / "churn").write_text(str(args.churn))
    return args.model or model


def report(name: str, args, rows: list[dict]):
    """The last line."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"benchmark": name, "options": options, "rows": rows, **describe_machine()}))


def main():
    args, rows = parse(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = args.logs or Path(folder)
        model = prepare(args, folder)
        for system in args.systems:
            flags, program = flags_of(system, args, folder, args.prompt[1] + args.answer[1])
            with Server(model, flags, folder / f"{system}.log", program=program) as server:
                server.tokens([[1] * 2048], 8)  # warms up
                for rate in args.rates:
                    server.flush()
                    rows.append(measure(server, system, rate, args))
                    print({name: value for name, value in rows[-1].items() if name != "samples"}, flush=True)
    report("load", args, rows)


if __name__ == "__main__":
    main()
