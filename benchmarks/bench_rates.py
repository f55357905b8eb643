"""Both systems over rates of requests, as SGLang's own load generator (`sglang.bench_serving`) sees them, run as
`python -m sglang.benchmark.serving`.

Servers, shapes and device memory for KV as in bench_load.py, and a made tokenizer, since that generator counts what
comes back as text: each token number is a word. Prompts are of a quarter of `--prompt` to all of it, answers of a
quarter of `--answer` to all; a rate's requests are the same for both systems, and arrive at random. It waits for every
answer. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bench_decode import QWEN3_8B
from bench_load import flags_of, rheo_counts
from machine import describe_machine
from serving import Server

SHARE = 0.25  # the shortest, of the longest
TOLD = {  # of its report: of this one
    "completed": "completed",
    "duration": "seconds",
    "mean_ttft_ms": "ttft_mean_ms",
    "median_ttft_ms": "ttft_median_ms",
    "p99_ttft_ms": "ttft_p99_ms",
    "mean_tpot_ms": "tpot_mean_ms",
    "p99_tpot_ms": "tpot_p99_ms",
    "mean_itl_ms": "itl_mean_ms",
    "p99_itl_ms": "itl_p99_ms",
    "output_throughput": "tokens_per_second",
    "total_input_tokens": "prompt_tokens",
    "total_output_tokens": "answer_tokens",
}


def write_tokenizer(folder: Path, words: int):
    """A tokenizer of so many words, each a token, in Hugging Face's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)


def measure(server: Server, system: str, rate: float, folder: Path, args) -> dict:
    """What the generator reports of one rate."""
    told = folder / f"{system}-{rate:g}.jsonl"
    server.flush()  # a rate's prompts are those of the one before
    before = rheo_counts(server)
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", server.url]
    command += ["--model", str(server.model), "--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--random-input-len", str(args.prompt), "--random-output-len", str(args.answer)]
    command += ["--random-range-ratio", str(SHARE), "--num-prompts", str(args.requests), "--request-rate", str(rate)]
    command += ["--seed", str(args.seed), "--warmup-requests", "0", "--disable-tqdm", "--output-file", str(told)]
    with (folder / f"{system}-{rate:g}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    report = json.loads(told.read_text().splitlines()[-1])
    after = rheo_counts(server)
    counts = {name: after[name] - before[name] for name in after}
    return {"system": system, "rate": rate, **{name: round(report[of], 2) for of, name in TOLD.items()}, **counts}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["rheoserve", "sglang"], choices=["sglang", "rheoserve"])
    parser.add_argument("--peer", default="fa3", help="attention backend of SGLang's own")
    parser.add_argument("--model", type=Path, help="serve this checkpoint as it is, instead of Qwen3-8B's shapes")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="requests a second")
    parser.add_argument("--requests", type=int, default=20, help="at each rate")
    parser.add_argument("--prompt", type=int, default=65536, help="tokens of the longest")
    parser.add_argument("--answer", type=int, default=6144, help="tokens of the longest")
    parser.add_argument("--device-gb", type=float, default=12, help="GB of device memory for KV")
    parser.add_argument("--host-gb", type=float, default=100, help="GB of RheoServe's host store")
    parser.add_argument("--most", type=int, default=32, help="requests at once")
    parser.add_argument("--churn", type=float, default=0.05, help="of the selection, a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rheo", default="", help="more flags for RheoServe, as --rheo='...'")
    parser.add_argument("--logs", type=Path, help="folder for the logs and the generator's reports")
    return parser.parse_args()


def main():
    args, rows = parse(), []
    lengths = argparse.Namespace(**vars(args) | {"prompt": (0, args.prompt), "answer": (0, args.answer)})
    with tempfile.TemporaryDirectory() as folder:
        folder = args.logs or Path(folder)
        model = args.model or folder / "model"
        (folder / "model").mkdir(parents=True, exist_ok=True)
        if not args.model:
            (model / "config.json").write_text(json.dumps(QWEN3_8B))
            write_tokenizer(model, QWEN3_8B["vocab_size"])
        (folder / "churn").write_text(str(args.churn))
        for system in args.systems:
            flags, program = flags_of(system, lengths, folder)
            # Token by token: of several at once the generator makes gaps of equal length.
            flags = [flag for flag in flags if flag != "--skip-tokenizer-init"] + ["--stream-interval", "1"]
            with Server(model, flags, folder / f"{system}.log", program=program) as server:
                server.tokens([[1] * min(2048, args.prompt)], 8)  # warms up
                for rate in args.rates:
                    rows.append(measure(server, system, rate, folder, args))
                    print(rows[-1], flush=True)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"benchmark": "rates", "options": options, "rows": rows, **describe_machine()}))


if __name__ == "__main__":
    main()
