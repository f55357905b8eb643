"""A trace's selection in bits, small enough to keep: `python -m benchmarks.traces.pack TRACE.npz OUT.npz`.

OUT holds `bits` `[steps, layers, kv_heads, words]` int32, page `32 * word + bit`, and `pages`, how many full pages the
prompt had. benchmarks/synthetic_scores.py replays it.
"""

import argparse
from pathlib import Path

import numpy as np


def pack(selected: np.ndarray, prompt_pages: int) -> dict[str, np.ndarray]:
    """
    Args:
        selected: `[steps, layers, kv_heads, pages]` bool
        prompt_pages: full pages before the first step
    """
    steps, layers, heads, pages = selected.shape
    padded = np.zeros((steps, layers, heads, -(-pages // 32) * 32), bool)
    padded[..., :pages] = selected
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return {"bits": packed.view("<i4"), "pages": np.int64(prompt_pages)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    with np.load(args.trace) as trace:
        prompt_pages = int(np.isfinite(trace["scores"][0]).any((0, 1)).sum()) - 1
        document = pack(trace["selected"], prompt_pages)
    np.savez_compressed(args.out, **document)
    print(f"{args.out}: {document['bits'].shape[0]} steps after {prompt_pages} pages, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
