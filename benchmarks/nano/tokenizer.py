"""A small BPE over code, one token a digit: `python -m benchmarks.nano.tokenizer CORPUS OUT`.

Lines are tokenised on their own, so that lines can be put between others in tokens as they would be in text.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rheoserve_sgl.nano.make import SPECIAL, chat_tokenizer

VOCABULARY = 2048


def train(texts, vocabulary: int = VOCABULARY) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    text = (args.corpus / "train.txt").read_text()[:30_000_000]
    tokenizer = train(text.split("\0"))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    chat_tokenizer(tokenizer).save_pretrained(args.out)
    sample = (args.corpus / "held_out.txt").read_text()[:300_000].replace("\0", "")
    width = len(sample) / len(tokenizer.encode(sample).ids)
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens, {width:.2f} bytes each")


if __name__ == "__main__":
    main()
