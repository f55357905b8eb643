"""Train the bundled model: `python -m benchmarks.nano.train --corpus DIR --tokenizer DIR --out DIR`.

A run lasts `--seconds`, of which the first part is spent on short contexts and the last on long ones. With `--start` it
trains an exported model further; give it another `--seed`. With `--gates` a gate a layer is trained beside the model,
and their divergence is a part of its loss (benchmarks/nano/gates.py); with `--selected` it also learns to get by with
what they pick (benchmarks/nano/selected.py). `--gpus` share each step's tokens (benchmarks/nano/ranks.py).

A state is saved every `--save-every` seconds and at the end, and a run with the same `--out` goes on where it stopped.
DIR holds the results: weights.pt (bf16, transformers' names), gate/ (SeerAttention-R's format), log.jsonl (one line a
report) and state.pt.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.nano.gates import ROWS, Gates, draw_positions
from benchmarks.nano.haystack import Haystack
from benchmarks.nano.model import Nano, Size
from benchmarks.nano.ranks import Ranks, launch
from benchmarks.nano.samples import RECALL, STEP, make_sample
from benchmarks.nano.selected import Selected, draw_blocks

# Until this share of the time, these contexts in turn: from random weights, and from trained ones.
PHASES = ((0.22, (1024,)), (0.45, (4096,)), (0.70, (16384,)), (1.0, (32768, 4096)))
MORE = ((0.1, (4096,)), (0.3, (16384, 4096)), (1.0, (32768, 4096)))
GATE_RATE = 2.0  # times the model's learning rate
WARM_UP, FINAL = 60, 0.05  # steps; share of the peak learning rate at the end
EVALUATION_SEED = 1 << 40
REPORT_STEPS = 20
MOST_AHEAD = 32  # steps whose sequences are made ahead, of contexts as they are then

_worker = {}


def start_worker(haystack: Path, tokenizer: Path):
    _worker["haystack"] = Haystack.load(haystack)
    _worker["tokenizer"] = Tokenizer.from_file(str(tokenizer))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def make_batch(length: int, tokens: int, seed: int):
    """(tokens `[batch, length + 1]` int32, weights `[batch, length]` float32) of about `tokens` tokens."""
    rows = [
        make_sample(_worker["haystack"], _worker["tokenizer"], length + 1, seed * 100_003 + row)
        for row in range(max(tokens // length, 1))
    ]
    ids, weights = zip(*rows, strict=True)
    return np.stack(ids).astype(np.int32), np.stack(weights)[:, 1:]


def contexts_at(share: float, longest: int, phases=PHASES) -> tuple[int, ...]:
    lengths = next(lengths for end, lengths in phases if share <= end or end == 1.0)
    return tuple(sorted({min(length, longest) for length in lengths}))


def rate_at(step: int, share: float) -> float:
    """Share of the peak learning rate."""
    return min(1.0, (step + 1) / WARM_UP) * max(1.0 - share * (1.0 - FINAL), FINAL)


def answers_right(model: Nano, batch, device: str) -> tuple[int, int]:
    """How many answers of a batch the model gets right in every token, each token given those before."""
    ids, weights = (torch.from_numpy(part) for part in batch)
    right = total = 0
    for row, weight in zip(ids.long(), weights, strict=True):
        hidden = model(row[None, :-1].to(device))
        guess = (hidden @ model.embed_tokens.weight.to(hidden.dtype).T).argmax(-1).cpu()
        good = guess == row[1:]
        inside = weight == RECALL
        edges = torch.diff(inside.int(), prepend=torch.tensor([0]), append=torch.tensor([0]))
        for first, end in zip(torch.nonzero(edges == 1), torch.nonzero(edges == -1), strict=True):
            right += bool(good[first:end].all())
            total += 1
    return right, total


class Divergence:
    """Adds up the divergence of all gates from a batch's attention, while the model runs.

    Args:
        weights: `[batch, length]` of the targets
        alone: whether only the gates learn from it, and the model does not
    """

    def __init__(self, gates: Gates, weights: torch.Tensor, alone: bool):
        self.gates, self.rows, self.alone = gates, min(len(weights), ROWS), alone
        self.positions = [draw_positions(row == RECALL, len(row)) for row in weights[: self.rows]]
        self.total = 0.0

    def __call__(self, layer: int, plain, rotated, angles):
        if self.alone:
            plain = [tensor.detach() for tensor in plain]
        with torch.autocast(angles.device.type, enabled=False):
            for row, positions in enumerate(self.positions):
                one = ((q[row], k[row]) for q, k in (plain, rotated))
                self.total = self.total + self.gates.loss(layer, *one, angles, positions)

    def mean(self) -> torch.Tensor:
        return self.total / (self.rows * len(self.gates.layers))


class Run:
    """One training run's state, on disk and in memory; the first rank's is the one on disk."""

    def __init__(self, args, ranks: Ranks):
        self.args, self.ranks = args, ranks
        size = Size(**{field.name: getattr(args, field.name) for field in fields(Size) if hasattr(args, field.name)})
        torch.manual_seed(args.seed)
        self.model = Nano(size).to(args.device)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.gates = Gates(size).to(args.device) if args.gates else None
        if self.gates:
            groups.append({"params": list(self.gates.parameters()), "weight_decay": 0.0, "rate": GATE_RATE})
        fused = args.device == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=fused)
        self.step, self.spent = 0, 0.0
        if args.start:
            stored = load_file(args.start / "model.safetensors")
            self.model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stored.items()})
            if self.gates and (args.start / "gate").is_dir():
                self.gates.load(args.start / "gate")
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = args.out / "state.pt"
        if self.file.is_file():
            stored = torch.load(self.file, map_location=args.device, weights_only=True)
            if stored["size"] != asdict(size):
                raise ValueError(f"--out: {self.file} is of another model, {stored['size']}")
            self.model.load_state_dict(stored["model"])
            if self.gates:
                self.gates.load_state_dict(stored["gates"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.step, self.spent = stored["step"], stored["spent"]
        self.size = size
        torch.manual_seed(args.seed + self.step + ranks.rank)  # what is drawn from here on is each rank's own

    @property
    def share(self) -> float:
        """How much of the run is done."""
        return self.step / self.args.steps if self.args.steps else self.spent / self.args.seconds

    def save(self):
        if self.ranks.rank:
            return
        part = self.file.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "gates": self.gates.state_dict() if self.gates else None,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "spent": self.spent,
                "size": asdict(self.size),
            },
            part,
        )
        part.replace(self.file)
        torch.save(self.model.checkpoint(), self.args.out / "weights.pt")
        if self.gates:
            self.gates.save(self.args.out / "gate")

    def log(self, **what):
        if self.ranks.rank:
            return
        line = json.dumps({"step": self.step, "seconds": round(self.spent, 1), **what})
        print(line, flush=True)
        with (self.args.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")


def train(run: Run, pool: ProcessPoolExecutor):
    args, model, ranks = run.args, run.model, run.ranks
    if run.share >= 1.0:
        return
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    waiting: deque = deque()
    seed = run.step

    def order():
        nonlocal seed
        lengths = contexts_at(min(run.share, 1.0), args.context, MORE if args.start else PHASES)
        length = lengths[seed % len(lengths)]
        own = args.seed * 10_000_019 + seed * ranks.count + ranks.rank
        waiting.append((lengths, length, pool.submit(make_batch, length, args.tokens // ranks.count, own)))
        seed += 1

    for _ in range(min(2 * args.workers, MOST_AHEAD)):
        order()
    began, start = time.perf_counter(), run.spent
    saved, losses, apart, seen, phase = run.spent, {}, [], 0, None
    while run.share < 1.0:
        lengths, length, batch = waiting.popleft()
        ids, weights = batch.result()
        order()
        if phase not in (None, lengths):
            evaluate(run, pool, phase, autocast)
        phase = lengths
        ids = torch.from_numpy(ids).to(args.device, non_blocking=True).long()
        weights = torch.from_numpy(weights).to(args.device, non_blocking=True)
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * rate_at(run.step, run.share) * group.get("rate", 1.0)
        weight = args.gates if run.share < args.gates_until else args.gates_later
        divergence = Divergence(run.gates, weights, alone=weight == 0) if run.gates else None
        # Weights are of next tokens: the queries are those that recall, not what they recall.
        selected = Selected(run.gates, weights >= STEP, draw_blocks(length)) if args.selected else None
        with autocast:
            loss = model.loss(model(ids[:, :-1], divergence, selected), ids[:, 1:].flatten(), weights.flatten())
        whole = loss
        if divergence:
            whole = loss + (weight or 1.0) * divergence.mean()
            apart.append(divergence.mean().detach())
        whole.backward()
        ranks.average(parameter for group in run.optimizer.param_groups for parameter in group["params"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        losses.setdefault(length, []).append(loss.detach())
        seen += weights.numel() * ranks.count
        run.spent = ranks.agree(start + time.perf_counter() - began)
        if run.step % REPORT_STEPS == 0:
            gates = {"gates": round(torch.stack(apart).mean().item(), 4)} if apart else {}
            means = {length: round(torch.stack(some).mean().item(), 4) for length, some in sorted(losses.items())}
            run.log(loss=means, **gates, tokens=seen)
            losses, apart = {}, []
        if run.spent - saved > args.save_every:
            saved = run.spent
            run.save()
    ranks.check(parameter for group in run.optimizer.param_groups for parameter in group["params"])
    evaluate(run, pool, phase, autocast)
    run.save()


def evaluate(run: Run, pool: ProcessPoolExecutor, lengths: tuple[int, ...], autocast):
    """Answers right on samples that training does not see, of these lengths; told by the first rank."""
    if run.ranks.rank:
        return
    for length in lengths:
        batch = pool.submit(make_batch, length, min(run.args.tokens, 8 * length), EVALUATION_SEED + length).result()
        with torch.no_grad(), autocast:
            right, total = answers_right(run.model, batch, run.args.device)
        run.log(context=length, answers_right=right, answers=total)


def prepare(args) -> Path:
    """The corpus as tokens, made once."""
    path = args.out / "haystack.npz"
    if not path.is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        Haystack.encode((args.corpus / "train.txt").read_text(), tokenizer).save(path)
    return path


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="an exported model, to train further, with its gate")
    parser.add_argument("--seconds", type=float, default=450, help="of training, over all runs with this --out")
    parser.add_argument("--steps", type=int, help="instead of seconds")
    parser.add_argument("--tokens", type=int, default=262_144, help="of a step, of all ranks together")
    parser.add_argument("--context", type=int, default=32_768, help="the longest")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gates", type=float, default=0.0, help="weight of the gates' divergence in the loss; 0: none")
    parser.add_argument(
        "--gates-until",
        type=float,
        default=1.0,
        help="share of the run after which --gates-later is the weight: the model learns to copy exactly again",
    )
    parser.add_argument("--gates-later", type=float, default=0.0, help="0: only the gates learn from it")
    parser.add_argument(
        "--selected",
        action="store_true",
        help="what recalls attends to what its gate picks (benchmarks/nano/selected.py)",
    )
    parser.add_argument("--gpus", type=int, default=1, help="processes, a GPU each; with --device cpu just processes")
    parser.add_argument("--workers", type=int, help="that make sequences, of each process; default: what is idle else")
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(Size):
        if field.name not in ("context", "vocabulary"):
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args(argv)
    if args.gates_later and not args.gates:
        parser.error(f"--gates-later is {args.gates_later}, and --gates 0: there are no gates")
    if args.selected and not args.gates:
        parser.error("--selected: there are no gates, --gates is 0")
    tokenizer = args.tokenizer / "tokenizer.json"
    args.vocabulary = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    if args.gpus > 1 and "LOCAL_RANK" not in os.environ:
        return launch("benchmarks.nano.train", sys.argv[1:] if argv is None else argv, args.gpus)
    ranks = Ranks(args.device)
    args.workers = args.workers or max(((os.cpu_count() or 2) - 3) // ranks.count, 1)
    if ranks.rank == 0:
        prepare(args)
    ranks.agree(0.0)  # the others wait for what the first one writes
    haystack = prepare(args)
    run = Run(args, ranks)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
        run.model.compile_parts()
    parameters = sum(p.numel() for p in run.model.parameters())
    run.log(parameters=parameters, device=args.device)
    with ProcessPoolExecutor(args.workers, initializer=start_worker, initargs=(haystack, tokenizer)) as pool:
        train(run, pool)
    ranks.close()


if __name__ == "__main__":
    main()
