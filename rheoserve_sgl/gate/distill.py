"""Train gates for a local model: `python -m rheoserve_sgl.gate.distill --model PATH --data PATH --out PATH`.

The model stays as it is. Each layer's gate learns, by KL divergence, the block maxima of that layer's own attention
(rheoserve_sgl/gate/target.py) for some queries of each sequence. Interrupted, it goes on where it was; at the end the
folder is what `--rheoserve-gate-path` takes.

Source: SeerAttention-R (arXiv 2506.08889), sections 2.3 and 4.1: AdamW, no weight decay, 1e-3 falling to 1e-5 on a
cosine after 20 steps of warm-up.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import Q_POOLINGS
from rheoserve_sgl.gate.checkpoint import K_POOLINGS, GateConfig, write_gate
from rheoserve_sgl.gate.distiller import Distiller, shape_of
from rheoserve_sgl.gate.sequences import LEGAL, load_sequences

WARM_UP = 20
FINAL = 0.01  # of the peak learning rate
STATE = "distill_state.pt"
CURVE = "loss_curve.json"


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: linear up, cosine down."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2


def train(distiller: Distiller, sequences: torch.Tensor, args: argparse.Namespace):
    """Run the steps that are left; the state is saved every `args.save_every` steps and at the end."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(distiller.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps))
    curve = resume(distiller, optimizer, schedule, args)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(args.seed))
    kept: dict[int, list] = {}
    bar = tqdm(range(len(curve), args.steps), initial=len(curve), total=args.steps, desc="distilling", unit="step")
    for step in bar:
        rows = order[torch.arange(step * args.batch, (step + 1) * args.batch) % len(order)]
        optimizer.zero_grad()
        if args.keep:
            kept |= {row: distiller.observe(sequences[row]) for row in rows.tolist() if row not in kept}
            loss = sum(distiller.loss_of(kept[row], 1 / args.batch) for row in rows.tolist()) / args.batch
        else:
            loss = sum(distiller.loss(sequences[row], 1 / args.batch) for row in rows) / args.batch
        optimizer.step()
        schedule.step()
        curve.append(loss)
        bar.set_postfix(loss=f"{loss:.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(distiller, optimizer, schedule, curve, args)
    return curve


def save(distiller, optimizer, schedule, curve, args):
    state = {
        "settings": settings_of(args),
        "layers": distiller.layers,
        "draw": distiller.draw.get_state(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "curve": curve,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    part = args.out / (STATE + ".part")
    torch.save(state, part)
    part.replace(args.out / STATE)


def resume(distiller, optimizer, schedule, args) -> list[float]:
    """Take up an earlier run's state; returns its losses so far.

    Raises:
        ValueError: it was started with other settings
    """
    file = args.out / STATE
    if not file.is_file():
        return []
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, value in settings_of(args).items():
        stored = state["settings"].get(name)
        if stored != value:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value!r}, but {file} was started with {stored!r}; go on with that, or "
                "choose another --out"
            )
    with torch.no_grad():
        for mine, stored in zip(distiller.layers, state["layers"], strict=True):
            for name, tensor in mine.items():
                tensor.copy_(stored[name])
    distiller.draw.set_state(state["draw"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["curve"]


def settings_of(args) -> dict:
    """What must stay the same when a run is taken up again."""
    names = (
        "context",
        "batch",
        "steps",
        "queries",
        "late",
        "lr",
        "seed",
        "q_pooling",
        "k_pooling",
        "no_qk_norm",
        "no_rope",
        "window_tokens",
        "candidates",
        "dtype",
    )
    return {name: getattr(args, name) for name in names} | {
        name: str(getattr(args, name)) for name in ("model", "data")
    }


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="local Hugging Face checkpoint")
    parser.add_argument("--data", type=Path, required=True, help=LEGAL)
    parser.add_argument("--out", type=Path, required=True, help="folder of the gates, and of the state in between")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--queries", type=int, default=512, help="queries looked at in each sequence")
    parser.add_argument("--late", type=float, default=0.5, help="share of a sequence before the first of them")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--q-pooling", choices=Q_POOLINGS, default="Qproj")
    parser.add_argument("--k-pooling", choices=sorted(K_POOLINGS), default="Kmaxminavg")
    parser.add_argument("--no-qk-norm", action="store_true", help="leave out the gate's own norms")
    parser.add_argument("--no-rope", action="store_true", help="do not rotate the gate's queries and keys")
    parser.add_argument(
        "--window-tokens",
        type=int,
        help="learn only what lies before so many tokens and not in the first block, which are always attended to; "
        "default: all blocks, as published. Not for --rheoserve-threshold: the scores of what is left out mean nothing",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        help="with --window-tokens: draw the --queries of each sequence from so many, by how much they attend far; in "
        "long sequences few do. Default: --queries, all of them taken",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep in the host's memory what is seen of each sequence, so that only the first pass over them runs the "
        "model; a run that is taken up again looks at other queries",
    )
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    args = parser.parse_args(argv)
    for name in ("context", "batch", "steps", "queries", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; legal: at least 1")
    if args.context % PAGE_TOKENS or args.context < 2 * PAGE_TOKENS:
        parser.error(f"--context is {args.context}; legal: multiples of {PAGE_TOKENS}, at least {2 * PAGE_TOKENS}")
    if args.window_tokens is not None and (args.window_tokens < 0 or args.window_tokens % PAGE_TOKENS):
        parser.error(f"--window-tokens is {args.window_tokens}; legal: multiples of {PAGE_TOKENS}, at least 0")
    if args.window_tokens is not None and args.window_tokens > args.context // 2:
        parser.error(f"--window-tokens is {args.window_tokens}; legal: at most half of --context, {args.context // 2}")
    if args.candidates is not None and (args.window_tokens is None or args.candidates < args.queries):
        legal = f"with --window-tokens, at least --queries, {args.queries}"
        parser.error(f"--candidates is {args.candidates}; legal: {legal}")
    if not 0 <= args.late < 1:
        parser.error(f"--late is {args.late}; legal: 0 or more, below 1")
    return args


def main(argv=None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = parse(argv)
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sequences = load_sequences(args.data, tokenizer, args.context)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    config = GateConfig(
        gate_hidden_size=shape_of(model).head_dim,
        q_head_pooling_type=args.q_pooling,
        k_seq_pooling_type=args.k_pooling,
        use_qk_norm=not args.no_qk_norm,
        use_rope=not args.no_rope,
    )
    distiller = Distiller(model, config, args.queries, args.late, args.seed, args.window_tokens, args.candidates)
    curve = train(distiller, sequences, args)
    write_gate(args.out, config, distiller.layers, str(args.model))
    (args.out / CURVE).write_text(json.dumps([round(loss, 5) for loss in curve]) + "\n")
    print(f"{args.out}: {len(distiller.layers)} layers, loss {curve[0]:.4f} at first, {curve[-1]:.4f} at last")


if __name__ == "__main__":
    main()
