"""Accuracy of the modes, gates and budgets, on live servers: `python -m benchmarks.accuracy --model PATH --text FILE`.

One server for each gate (and one for `balanced`) is started on the model; budgets, `full` (dense) and `window` are
options of the requests. `--url` asks a server that runs already, with its own gate, instead. Prints a table: right
answers of each task, and the loss in nats over the text's next tokens while decoding. The last line is JSON.

For RULER by lm-evaluation-harness see docs/accuracy.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from machine import describe_machine
from serving import Server

from benchmarks.accuracy.client import Client, contains
from benchmarks.accuracy.forced import forced_losses
from benchmarks.accuracy.tasks import TASKS, Texts

WITHOUT_GATE = {"full": "dense", "window": "window"}  # the mode of requests: the row of the table
MODES = [*WITHOUT_GATE, "retrieval", "balanced"]
# (row of the table, options of its requests, or None and the budget as a share of the context)
Asked = list[tuple[str, dict, float | None]]


def systems(args):
    """Flags of each server, the contexts it is asked at, what it is asked, and how many requests at once."""
    common = ["--attention-backend", "rheoserve", "--rheoserve-window-tokens", "256", "--dtype", "auto"]
    common += ["--rheoserve-host-size", str(args.host_size), "--context-length", str(max(args.contexts))]
    common.append("--enable-custom-logit-processor")
    if args.gate:
        dense = json.loads((Path(args.gate) / "config.json").read_text()).get("seerattn_start_layer", 0)
        common += ["--rheoserve-gate-path", args.gate, "--rheoserve-dense-layers", str(dense)]  # for every gate
    # With frames for all and attention to the selection alone, the answers are those of `retrieval`, and come sooner.
    chosen = ["--rheoserve-device-tokens", str(-(-max(args.contexts) // 64) * 64 * args.parallel)]
    chosen += ["--rheoserve-device-attention", "selected", "--rheoserve-selector"]
    for position, selector in enumerate(args.selectors):
        once = WITHOUT_GATE.items() if position == 0 else ()
        asked: Asked = [(name, {"mode": mode}, None) for mode, name in once if mode in args.modes]
        if "retrieval" in args.modes:
            asked += [(f"retrieval {selector}", {}, share) for share in args.budgets]
        if asked:
            yield [*common, *chosen, selector], args.contexts, asked, args.parallel
    for context in args.contexts if "balanced" in args.modes else ():
        asked = [(f"balanced {args.selectors[0]}", {}, share) for share in args.budgets]
        # One at a time: frames are shared by the requests that decode, and of several many are being prefilled.
        yield [*common, *frames(context), "--rheoserve-selector", args.selectors[0]], [context], asked, 1


def frames(context: int) -> list[str]:
    """An eighth of a context resident."""
    return ["--rheoserve-device-tokens", str(max(context // 8 // 64, 8) * 64)]


def measure(client: Client, texts: Texts, args, contexts: list[int], asked: Asked, parallel: int) -> list[dict]:
    """Rows of the table for one server."""
    rows, least = [], client.least_budget()
    seeds = range(args.first_seed, args.first_seed + args.samples)
    for name, fixed, share in asked:
        for context in contexts:
            budget = None if share is None else max(int(context * share) // 64 * 64, least)
            options = fixed if budget is None else {"token_budget": budget}
            row = {"system": name, "context": context, "budget": budget}
            with ThreadPoolExecutor(parallel) as pool:
                asking = {task: ask(pool, client, texts, task, context, seeds, options) for task in args.tasks}
                losses = next_token_losses(pool, client.url, texts, context, args, options)
                for task, told in asking.items():
                    told = [one for of_sample in told for one in of_sample]
                    row[task] = statistics.mean(one["right"] for one in told)
                    keep_wrong(args.wrong, row, [one for one in told if not one["right"]])
                if args.loss_tokens:
                    row["loss"] = statistics.mean(loss for of_text in losses for loss in of_text)
            rows.append(row)
            cells = " ".join(f"{100 * row[task]:11.1f}%" for task in args.tasks)
            cells += f" {row['loss']:11.4f}" if args.loss_tokens else ""
            print(f"{name:20s} {context:8d} {budget or '-':>8} {cells}", flush=True)
    return rows


def ask(pool: ThreadPoolExecutor, client: Client, texts: Texts, task: str, context: int, samples: range, options: dict):
    """What was answered in the turns of each sample of one task; requests go out at once."""

    def turns(seed: int) -> list[dict]:
        sample, about = texts.sample(task, context, seed), {"task": task, "seed": seed}
        return [
            {**about, "expected": turn.expected, "answer": answer, "right": contains(answer, turn.expected)}
            for turn, answer in zip(sample.turns, client.answers(sample, options), strict=True)
        ]

    return pool.map(turns, samples)


def keep_wrong(path: Path | None, row: dict, wrong: list[dict]):
    """Append the wrong answers of a row to a file, one JSON object a line."""
    if path is not None and wrong:
        with path.open("a") as file:
            for one in wrong:
                about = {name: row[name] for name in ("system", "context", "budget")}
                file.write(json.dumps(about | one) + "\n")


def next_token_losses(pool: ThreadPoolExecutor, url: str, texts: Texts, context: int, args, options: dict):
    """Of the last `--loss-tokens` of texts of `context` tokens, without each first one, which comes from prefill."""

    def losses(seed: int) -> list[float]:
        tokens = texts.tokens(context - 8, seed)  # SGLang keeps some of a context
        split = len(tokens) - args.loss_tokens
        return forced_losses(url, tokens[:split], tokens[split:], options)[1:]

    count = max(args.samples // 4, 1) if args.loss_tokens else 0
    return pool.map(losses, range(args.first_seed, args.first_seed + count))


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local checkpoint with a chat template")
    parser.add_argument("--url", help="of a running server of that model; else servers are started")
    parser.add_argument("--gate", help="folder of a learned gate")
    parser.add_argument("--text", type=Path, required=True, help="text to hide facts in")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--budgets", type=float, nargs="*", default=[1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4])
    parser.add_argument("--selectors", nargs="+", help="default: seer where there is a gate, quest, mean")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of the servers started")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=sorted(TASKS))
    parser.add_argument("--samples", type=int, default=20, help="of each task at each context")
    parser.add_argument("--first-seed", type=int, default=0, help="of the samples, which have one after another")
    parser.add_argument(
        "--loss-tokens", type=int, default=256, help="of each text; 0: no loss. A quarter of the samples"
    )
    parser.add_argument("--parallel", type=int, default=1, help="requests at once, but for `balanced`")
    parser.add_argument("--new-tokens", type=int, default=96, help="at most, for an answer")
    parser.add_argument("--host-size", type=float, default=4.0, help="GB of each server's host store")
    parser.add_argument("--wrong", type=Path, help="file to append wrong answers to, as JSON lines")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the servers")
    args = parser.parse_args(argv)
    args.selectors = args.selectors or [*(["seer"] if args.gate else []), "quest", "mean"]
    return args


def main(argv=None):
    from transformers import AutoTokenizer

    args = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = Texts(tokenizer, args.text.read_text(), args.new_tokens)
    print(
        f"{'system':20s} {'context':>8s} {'budget':>8s} "
        + " ".join(f"{task:>12s}" for task in [*args.tasks, *(["loss"] if args.loss_tokens else [])])
    )
    rows = []
    if args.url:
        asked = [("dense", {"mode": "full"}, None), *((f"budget {share:.3f}", {}, share) for share in args.budgets)]
        rows = measure(Client(args.url, tokenizer, args.new_tokens), texts, args, args.contexts, asked, args.parallel)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for number, (flags, contexts, asked, parallel) in enumerate(systems(args)):
                with Server(args.model, [*flags, *args.flags], Path(folder) / f"{number}.log") as server:
                    rows += measure(
                        Client(server.url, tokenizer, args.new_tokens), texts, args, contexts, asked, parallel
                    )
    document = {"benchmark": "accuracy", "options": vars(args), "rows": rows, **describe_machine()}
    print(json.dumps(document, default=str))


if __name__ == "__main__":
    main()
