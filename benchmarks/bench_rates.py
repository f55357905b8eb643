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
from bench_load import add_server_options, flags_of, prepare, report, rheo_counts
from serving import Server

SHARE = 0.25  # the shortest, of the longest
TOLD = (  # of its report
    *("completed", "duration", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms"),
    *("mean_itl_ms", "p99_itl_ms", "output_throughput", "total_input_tokens", "total_output_tokens"),
)


def write_tokenizer(folder: Path, words: int):
    """A tokenizer of so many words, each a token, in Hugging Face's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{number}": number for number in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0").save_pretrained(folder)


def measure(server: Server, system: str, rate: float, requests: int, folder: Path, args) -> dict:
    """What the generator reports of one rate."""
    file = folder / f"{system}-{rate:g}.jsonl"
    server.flush()  # a rate's prompts are those of the one before
    before = rheo_counts(server)
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang", "--base-url", server.url]
    command += ["--model", str(server.model), "--dataset-name", "random-ids", "--tokenize-prompt"]
    command += ["--random-input-len", str(args.prompt), "--random-output-len", str(args.answer)]
    command += ["--random-range-ratio", str(SHARE), "--num-prompts", str(requests), "--request-rate", str(rate)]
    command += ["--seed", str(args.seed), "--warmup-requests", "0", "--disable-tqdm", "--output-file", str(file)]
    with (folder / f"{system}-{rate:g}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    told = json.loads(file.read_text().splitlines()[-1])
    after = rheo_counts(server)
    counts = {name: after[name] - before[name] for name in after}
    return {"system": system, "rate": rate, **{name: round(told[name], 2) for name in TOLD}, **counts}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["rheoserve", "sglang"], choices=["sglang", "rheoserve"])
    parser.add_argument("--requests", type=int, nargs="+", default=[20], help="at each rate, or one number for each")
    parser.add_argument("--prompt", type=int, default=65536, help="tokens of the longest")
    parser.add_argument("--answer", type=int, default=6144, help="tokens of the longest")
    add_server_options(parser)
    parser.set_defaults(device_gb=12.0, seed=1)
    args = parser.parse_args()
    if len(args.requests) == 1:
        args.requests *= len(args.rates)
    if len(args.requests) != len(args.rates):
        parser.error(f"--requests has {len(args.requests)} numbers; legal: one, or {len(args.rates)}, as --rates")
    return args


def main():
    args, rows = parse(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = args.logs or Path(folder)
        model = prepare(args, folder)
        if not args.model:
            write_tokenizer(model, QWEN3_8B["vocab_size"])
        for system in args.systems:
            flags, program = flags_of(system, args, folder, args.prompt + args.answer)
            # Token by token: of several at once the generator makes gaps of equal length.
            flags = [flag for flag in flags if flag != "--skip-tokenizer-init"] + ["--stream-interval", "1"]
            with Server(model, flags, folder / f"{system}.log", program=program) as server:
                server.tokens([[1] * min(2048, args.prompt)], 8)  # warms up
                for rate, requests in zip(args.rates, args.requests, strict=True):
                    rows.append(measure(server, system, rate, requests, folder, args))
                    print(rows[-1], flush=True)
    report("rates", args, rows)


if __name__ == "__main__":
    main()
