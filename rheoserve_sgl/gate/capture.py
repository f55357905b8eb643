"""Queries and keys of a Hugging Face model's attention layers, before RoPE, as a forward pass computes them."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

# (layer, q [tokens, kv_heads, group, head_dim], k [tokens, kv_heads, head_dim]) of one sequence
Visit = Callable[[int, torch.Tensor, torch.Tensor], None]


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a decoder, in order.

    Raises:
        ValueError: a model whose layers have no q_proj and k_proj
    """
    layers = [getattr(layer, "self_attn", layer) for layer in model.model.layers]
    for layer in layers:
        if not (hasattr(layer, "q_proj") and hasattr(layer, "k_proj")):
            raise ValueError(
                f"--model: {type(model).__name__} has a layer without q_proj and k_proj; legal: models "
                "built like Qwen2, Qwen3, Llama or Mistral"
            )
    return layers


@contextmanager
def visit_attention(model: nn.Module, visit: Visit):
    """Call `visit` for each layer while the model runs one sequence inside this context.

    q and k are taken after the model's own norms, if it has any (Qwen3), else after its projections.
    """
    handles = [handle for index, layer in enumerate(attention_layers(model)) for handle in _watch(index, layer, visit)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(index: int, layer: nn.Module, visit: Visit):
    normed = hasattr(layer, "q_norm") and hasattr(layer, "k_norm")
    q_from, k_from = (layer.q_norm, layer.k_norm) if normed else (layer.q_proj, layer.k_proj)
    seen = {}

    def keep_q(module, inputs, output):
        seen["q"] = output.reshape(output.shape[1], -1, layer.num_key_value_groups, layer.head_dim)

    def visit_k(module, inputs, output):
        visit(index, seen.pop("q"), output.reshape(output.shape[1], -1, layer.head_dim))

    return q_from.register_forward_hook(keep_q), k_from.register_forward_hook(visit_k)


def rope_of(model: nn.Module, tokens: int) -> torch.Tensor:
    """The model's rotations of positions 0 to tokens - 1, `[tokens, rotary_dim]` float32: cosines, then sines."""
    device = next(model.parameters()).device
    probe = torch.empty(1, device=device, dtype=torch.float32)
    cosine, sine = model.model.rotary_emb(probe, torch.arange(tokens, device=device)[None])
    half = cosine.shape[-1] // 2
    return torch.cat((cosine[0, :, :half], sine[0, :, :half]), -1)
