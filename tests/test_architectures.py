"""Every served architecture, from a real server, against Hugging Face transformers on the same checkpoint.

Qwen3 is served by the other tests. Qwen2 runs with tensor parallelism over two ranks here.
"""

import pytest
import torch
from serving import check_transformers, rheo_server
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from rheoserve_sgl.nano.make import CONTEXT, VOCABULARY, make_tokenizer

pytestmark = pytest.mark.server

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    # Large enough that attention outweighs the residual stream: an error in it changes the tokens.
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (LlamaConfig(**SHAPE), []),
        (Qwen2Config(**SHAPE), []),
        pytest.param(Qwen2Config(**SHAPE), ["--tp-size", "2"], marks=pytest.mark.slow),
        pytest.param(
            MistralConfig(**SHAPE, sliding_window=None), ["--rheoserve-mode", "balanced"], marks=pytest.mark.slow
        ),
    ],
    ids=["llama", "qwen2", "qwen2-tp2", "mistral"],
)
def test_full_attention_equals_transformers(config, flags, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    args = ["--rheoserve-mode", "full", "--rheoserve-device-tokens", "512", *flags]
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if "--tp-size" in flags else {}
    with rheo_server(tmp_path / "model", args, tmp_path, env) as server:
        check_transformers(server, tmp_path / "model")
        counts = server.rheo()
        assert counts["host_blocks"] > 0 < counts["device_blocks"]
        after = server.settle()
        assert after["frames_used"] == after["host_pages_used"] == 0
