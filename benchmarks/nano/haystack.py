"""Source text as tokens, cut at lines."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Haystack:
    """tokens: `[n]` uint16 of all documents; lines: `[m]` int64, where each line starts, and n at the end."""

    tokens: np.ndarray
    lines: np.ndarray

    @classmethod
    def encode(cls, text: str, tokenizer) -> "Haystack":
        """Tokenise documents separated by NUL characters; each ends with <|endoftext|>."""
        end = tokenizer.token_to_id("<|endoftext|>")
        ends_line = np.zeros(tokenizer.get_vocab_size(), bool)
        for token in range(len(ends_line)):
            ends_line[token] = tokenizer.decode([token]).endswith("\n")
        ends_line[end] = True
        pieces = []
        for encoding in tokenizer.encode_batch_fast(text.split("\0"), add_special_tokens=False):
            pieces += [np.array(encoding.ids, np.uint16), np.array([end], np.uint16)]
        tokens = np.concatenate(pieces)
        return cls(tokens, np.concatenate(([0], np.flatnonzero(ends_line[tokens]) + 1)))

    @classmethod
    def load(cls, path: Path) -> "Haystack":
        stored = np.load(path)
        return cls(stored["tokens"], stored["lines"])

    def save(self, path: Path):
        np.savez(path, tokens=self.tokens, lines=self.lines)

    def span(self, tokens: int, draw: np.random.Generator) -> list[np.ndarray]:
        """Consecutive lines, at most so many tokens together, from a random place."""
        first = int(draw.integers(len(self.lines) - 1))
        last = int(np.searchsorted(self.lines, self.lines[first] + tokens, "right")) - 1
        return [self.tokens[a:b] for a, b in zip(self.lines[first:last], self.lines[first + 1 : last + 1], strict=True)]
