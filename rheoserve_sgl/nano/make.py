"""Make a small Qwen3-architecture checkpoint in Hugging Face format, with a byte-level tokenizer.

The weights are random (seeded), so it answers with noise, but noise that depends on every token: queries
are scaled so that attention is sharp, and its output outweighs the residual stream. An error in attention
changes the greedy tokens.

Usage: python -m rheoserve_sgl.nano.make PATH [--layers 4 --heads 8 --kv-heads 2 --head-dim 64 ...]
"""

import argparse
from pathlib import Path

CONTEXT = 32768
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
VOCABULARY = 320  # 256 bytes, the special tokens, and room
QUERY_SCALE = 4.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """A tokenizer with one token a byte, and the special tokens of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return chat_tokenizer(tokenizer)


def chat_tokenizer(tokenizer):
    """A `tokenizers.Tokenizer` that has the special tokens, for transformers, with the chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(layers: int, heads: int, kv_heads: int, head_dim: int, hidden: int, seed: int):
    """A Qwen3ForCausalLM with random float32 weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokens = {name: 256 + i for i, name in enumerate(SPECIAL)}
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rope_theta=1e6,
        tie_word_embeddings=True,
        initializer_range=0.08,
        eos_token_id=tokens["<|im_end|>"],
        bos_token_id=None,
        pad_token_id=tokens["<|endoftext|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(QUERY_SCALE)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="folder to write")
    for name, default in (
        ("layers", 4),
        ("heads", 8),
        ("kv-heads", 2),
        ("head-dim", 64),
        ("hidden", 256),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()

    import torch

    model = make_model(args.layers, args.heads, args.kv_heads, args.head_dim, args.hidden, args.seed)
    model = model.to(getattr(torch, args.dtype))
    model.save_pretrained(args.path)
    make_tokenizer().save_pretrained(args.path)
    print(f"{args.path}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {args.dtype}")


if __name__ == "__main__":
    main()
