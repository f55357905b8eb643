"""A small corpus of code-like lines with its tokenizer, in files, for tests of how the bundled model is made."""

import random
from pathlib import Path

from benchmarks.nano import tokenizer
from rheoserve_sgl.nano.make import chat_tokenizer


def write_corpus(path: Path):
    draw = random.Random(0)
    lines = [f"    value_{draw.randrange(99)} = call({draw.randrange(1000)}, name='x')\n" for _ in range(3000)]
    documents = ["".join(lines[at : at + 100]) for at in range(0, len(lines), 100)]
    (path / "train.txt").write_text("\0".join(documents))
    words = tokenizer.train(documents, vocabulary=400)
    chat_tokenizer(words).save_pretrained(path)
    words.save(str(path / "tokenizer.json"))
