"""The bundled model in training: Qwen3's architecture, parameters named as transformers names them.

What is not attention works on all tokens of a step as one row, so that it is compiled once for every context length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rheoserve_sgl.gate.attn_gate import rotate_by


@dataclass(frozen=True)
class Size:
    vocabulary: int = 2048
    hidden: int = 384
    inner: int = 1024
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    theta: float = 1e6
    context: int = 32768

    def config(self) -> dict:
        """transformers' configuration of this model."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_theta": self.theta,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "attention_bias": False,
            "dtype": "bfloat16",
        }


class Layer(nn.Module):
    """One decoder layer on flattened tokens `[n, hidden]`."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        wide, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
        linear = lambda a, b: nn.Linear(a, b, bias=False)  # noqa: E731
        self.input_layernorm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(size.hidden, wide),
                "k_proj": linear(size.hidden, narrow),
                "v_proj": linear(size.hidden, narrow),
                "o_proj": linear(wide, size.hidden),
                "q_norm": nn.RMSNorm(size.head_dim, eps=1e-6),
                "k_norm": nn.RMSNorm(size.head_dim, eps=1e-6),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(size.hidden, size.inner),
                "up_proj": linear(size.hidden, size.inner),
                "down_proj": linear(size.inner, size.hidden),
            }
        )

    def before(self, x, rope):
        """q, k, v of attention and q, k before RoPE, `[n, heads, head_dim]`.

        Args:
            rope: `[n, head_dim]`, cosines then sines
        """
        a, dim = self.self_attn, self.size.head_dim
        h = self.input_layernorm(x)
        q = a["q_norm"](a["q_proj"](h).unflatten(-1, (-1, dim)))
        k = a["k_norm"](a["k_proj"](h).unflatten(-1, (-1, dim)))
        return rotate_by(q, rope), rotate_by(k, rope), a["v_proj"](h).unflatten(-1, (-1, dim)), q, k

    def after(self, x, attended):
        x = x + self.self_attn["o_proj"](attended)
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Nano(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-6)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for layer in self.layers:  # as GPT-2: what adds to the residual starts smaller
            for module in (layer.self_attn["o_proj"], layer.mlp["down_proj"]):
                nn.init.normal_(module.weight, std=0.02 / (2 * size.layers) ** 0.5)

    def compile_parts(self):
        for layer in self.layers:
            layer.before, layer.after = torch.compile(layer.before), torch.compile(layer.after)
        self.loss = torch.compile(self.loss)

    def forward(self, tokens: torch.Tensor, watch=None, change=None) -> torch.Tensor:
        """Hidden states `[batch * length, hidden]` of tokens `[batch, length]`.

        Args:
            watch: called for each layer with its number, (q, k) before and after RoPE, `[batch, length, heads,
                head_dim]`, and the rotations `[length, head_dim]`
            change: called likewise, with the values before the rotations and with attention's result `[batch, heads,
                length, head_dim]` last; gives what takes its place
        """
        batch, length = tokens.shape
        angles = self.rotations(length, tokens.device)
        rope = angles.repeat(batch, 1)
        x = self.embed_tokens(tokens.flatten())
        rows = lambda t: t.view(batch, length, -1, self.size.head_dim)  # noqa: E731
        for index, layer in enumerate(self.layers):
            q, k, v, plain_q, plain_k = map(rows, layer.before(x, rope))
            if watch is not None:
                watch(index, (plain_q, plain_k), (q, k), angles)
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            if change is not None:
                out = change(index, (plain_q, plain_k), (q, k), v, angles, out)
            x = layer.after(x, out.transpose(1, 2).reshape(batch * length, -1))
        return self.norm(x)

    def loss(self, hidden, targets, weights) -> torch.Tensor:
        """Weighted mean of the next tokens' cross-entropy; all `[n]` but hidden `[n, hidden]`."""
        logits = hidden @ self.embed_tokens.weight.to(hidden.dtype).T
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum() / weights.sum()

    def rotations(self, length: int, device) -> torch.Tensor:
        half = self.size.head_dim // 2
        speed = self.size.theta ** (-torch.arange(half, device=device) / half)
        angle = torch.arange(length, device=device)[:, None] * speed
        return torch.cat((angle.cos(), angle.sin()), -1)

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Weights by transformers' names, bf16."""
        own = self.state_dict().items()
        return {"model." + name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in own}
