"""Token sequences of one length, out of the files that a gate is distilled on."""

import json
from pathlib import Path

import numpy as np
import torch

LEGAL = "a .npy array of token ids, a .jsonl file with `text` or `messages`, a text file, or a folder of text files"


def load_sequences(path: Path, tokenizer, length: int) -> torch.Tensor:
    """`[n, length]` int64: documents joined by the end-of-sequence token and cut, or rows of a .npy array.

    Raises:
        ValueError: nothing to read, or fewer tokens than one sequence
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"--data is {str(path)!r}, which does not exist; legal: {LEGAL}")
    if path.suffix == ".npy":
        tokens = np.load(path)
        if tokens.ndim == 2 and tokens.shape[1] >= length:
            return torch.from_numpy(tokens[:, :length].astype(np.int64))
        tokens = tokens.ravel()
    else:
        documents = _jsonl(path, tokenizer) if path.suffix == ".jsonl" else _texts(path)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"] + end) for text in documents]
        tokens = np.concatenate(encoded) if encoded else np.empty(0)
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"--data is {str(path)!r}, with {len(tokens)} tokens; needed: {length} (--context) or more")
    return torch.from_numpy(tokens[: count * length].astype(np.int64).reshape(count, length))


def _texts(path: Path):
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [file.read_text(errors="replace") for file in files]


def _jsonl(path: Path, tokenizer):
    texts = []
    # Not splitlines: what else ends a line may stand in a string.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {line.strip()[:100]}; legal: an object")
        if "messages" in row:
            texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
        elif "text" in row:
            texts.append(row["text"])
        else:
            raise ValueError(f"{path}, line {number}: neither `text` nor `messages`, but {', '.join(row)}")
    return texts
