"""Where attention goes, head by head: `python -m benchmarks.accuracy.heatmap --model PATH --text FILE --out FILE.svg`.

Dense attention of a prompt's last queries, summed over blocks of 64 tokens, mean over several prompts in which needles
are asked for. A row is a query head; columns are the first block (sink), what lies between, and the last blocks
(window). Prints how much of each layer's attention each region has. The last line is JSON.
"""

import argparse
import json
import math
from pathlib import Path

import torch

from benchmarks.accuracy.tasks import TASKS, Texts
from benchmarks.svg import Svg
from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import rotate_by
from rheoserve_sgl.gate.capture import rope_of, visit_attention

ROW, COLUMN, LEFT, TOP = 6, 8, 90, 56
FAINT = 1e-5  # the share of a head's attention that is drawn white


def block_mass(model, tokens: list[int], queries: int) -> torch.Tensor:
    """How the last queries' attention is spread: `[layers, heads, blocks]` float32, rows that sum to 1."""
    length = len(tokens)
    rope = rope_of(model, length)
    rows: list[torch.Tensor] = []

    def visit(layer: int, q: torch.Tensor, k: torch.Tensor):
        shape = (-1, *q.shape[1:])
        q = rotate_by(q[-queries:].flatten(1, 2).float(), rope[-queries:]).view(shape)
        k = rotate_by(k.float(), rope)
        logits = torch.einsum("nhgd,thd->hgnt", q, k) * k.shape[-1] ** -0.5
        at = torch.arange(length, device=k.device)
        p = torch.softmax(logits.masked_fill(at > at[-queries:, None], -torch.inf), -1).mean(2).flatten(0, 1)
        p = torch.nn.functional.pad(p, (0, -length % PAGE_TOKENS))
        rows.append(p.unflatten(1, (-1, PAGE_TOKENS)).sum(2).cpu())

    with torch.no_grad(), visit_attention(model, visit):
        model.model(torch.tensor([tokens], device=model.device))
    return torch.stack(rows)


def in_columns(mass: torch.Tensor, middle: int, window: int) -> torch.Tensor:
    """Blocks as columns: the first, `middle` groups of those between (means), the last `window`."""
    between = mass[..., 1 : mass.shape[-1] - window]
    return torch.cat(
        (
            mass[..., :1],
            torch.nn.functional.adaptive_avg_pool1d(between.flatten(0, -2), middle).view(*mass.shape[:-1], middle),
            mass[..., mass.shape[-1] - window :],
        ),
        -1,
    )


def regions(mass: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """The attention of each region, `[layers, heads]`."""
    last = mass.shape[-1] - window
    return {"sink": mass[..., 0], "retrieval": mass[..., 1:last].sum(-1), "window": mass[..., last:].sum(-1)}


def colour(share: float) -> str:
    """From white to dark blue, by the logarithm."""
    depth = min(max(1 - math.log10(max(share, FAINT)) / math.log10(FAINT), 0.0), 1.0)
    return f"rgb({255 - 235 * depth:.0f},{255 - 185 * depth:.0f},{255 - 110 * depth:.0f})"


def draw(mass: torch.Tensor, window: int, middle: int, title: str) -> str:
    layers, heads, _ = mass.shape
    table = in_columns(mass, middle, window)
    columns = table.shape[-1]
    svg = Svg(LEFT + columns * COLUMN + 20, TOP + layers * (heads * ROW + 4) + 30)
    svg.text(LEFT, 20, title, size=14)
    places = (0, 1, 1 + middle, columns)
    for name, first, end in zip(("sink", "retrieval", "window"), places, places[1:], strict=False):
        svg.text(LEFT + (first + end) / 2 * COLUMN, TOP - 8, name, "middle")
    for layer in range(layers):
        top = TOP + layer * (heads * ROW + 4)
        svg.text(LEFT - 8, top + heads * ROW / 2 + 4, f"layer {layer}", "end")
        for head in range(heads):
            for column, share in enumerate(table[layer, head].tolist()):
                svg.box(LEFT + column * COLUMN, top + head * ROW, COLUMN, ROW, colour(share))
    bottom = TOP + layers * (heads * ROW + 4)
    for place in places[1:3]:
        svg.line([(LEFT + place * COLUMN, TOP - 4), (LEFT + place * COLUMN, bottom)], "#c0392b")
    svg.text(LEFT, bottom + 18, f"a row is a query head; white is {FAINT:g} of its attention in a block, or less")
    return str(svg)


def main(argv=None):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="text to hide facts in")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--queries", type=int, default=16, help="the last ones of a prompt: the question")
    parser.add_argument("--window", type=int, default=8, help="blocks")
    parser.add_argument("--columns", type=int, default=64, help="for what lies between")
    parser.add_argument("--task", choices=sorted(TASKS), default="four_needles")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    texts, total = Texts(tokenizer, args.text.read_text(), 96), None
    for seed in range(args.samples):
        turn = texts.sample(args.task, args.context, seed).turns[0]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.text}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        mass = block_mass(model, tokens, args.queries)
        # Prompts differ by some blocks: the ends are what is compared.
        shortest = min(mass.shape[-1], total.shape[-1]) if total is not None else mass.shape[-1]
        mass = mass[..., [0, *range(mass.shape[-1] - shortest + 1, mass.shape[-1])]]
        if total is not None:
            mass = mass + total[..., [0, *range(total.shape[-1] - shortest + 1, total.shape[-1])]]
        total = mass
    mass = total / total.sum(-1, keepdim=True)
    parts = regions(mass, args.window)
    title = f"{args.model.name}: attention of the last {args.queries} queries, {args.context} tokens"
    args.out.write_text(draw(mass, args.window, args.columns, title))
    print(f"{'layer':>5s} " + " ".join(f"{name:>10s}" for name in parts) + f" {'blocks for 90%':>15s}")
    ranked = mass.sort(-1, descending=True).values.cumsum(-1)
    needed = (ranked < 0.9).sum(-1) + 1
    for layer in range(len(mass)):
        cells = " ".join(f"{part[layer].mean():10.1%}" for part in parts.values())
        print(f"{layer:5d} {cells} {needed[layer].float().mean():15.1f}")
    document = {name: [[round(x, 4) for x in row] for row in part.tolist()] for name, part in parts.items()}
    print(json.dumps({"benchmark": "heatmap", "blocks": mass.shape[-1], "blocks_for_90": needed.tolist(), **document}))


if __name__ == "__main__":
    main()
