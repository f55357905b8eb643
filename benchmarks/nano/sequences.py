"""Sequences like those of training, to distil gates on: `python -m benchmarks.nano.sequences --run DIR ... OUT`.

OUT is a .npy array that `python -m rheoserve_sgl.gate.distill --data` takes. Their seeds are not those of training.
"""

import argparse
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.nano.haystack import Haystack
from benchmarks.nano.samples import make_sample

FIRST_SEED = 1 << 50


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="of benchmarks.nano.train, for its haystack.npz")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--length", type=int, default=8192, help="tokens of each")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    haystack = Haystack.load(args.run / "haystack.npz")
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    rows = [make_sample(haystack, tokenizer, args.length, FIRST_SEED + row)[0] for row in range(args.count)]
    np.save(args.out, np.stack(rows))
    print(f"{args.out}: {args.count} sequences of {args.length} tokens")


if __name__ == "__main__":
    main()
