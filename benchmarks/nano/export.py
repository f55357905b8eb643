"""A trained model in Hugging Face format: `python -m benchmarks.nano.export --run DIR --tokenizer DIR --out DIR`."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from benchmarks.nano.model import Size

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export(run: Path, tokenizer: Path, out: Path):
    state = torch.load(run / "weights.pt", weights_only=True)
    size = torch.load(run / "state.pt", weights_only=True)["size"] if (run / "state.pt").is_file() else {}
    words = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    config = Size(**{"vocabulary": words.get_vocab_size(), **size}).config()
    ends = {"eos_token_id": words.token_to_id("<|im_end|>"), "pad_token_id": words.token_to_id("<|endoftext|>")}
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | ends, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    if (run / "gate").is_dir():
        shutil.copytree(run / "gate", out / "gate", dirs_exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, out / name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(argv)
    export(args.run, args.tokenizer, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
