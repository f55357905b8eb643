"""The gates of one model in training, and their loss on a sequence."""

import torch

from rheoserve_sgl.gate.attn_gate import GateWeights, pool_blocks, project_key, project_query, rotate
from rheoserve_sgl.gate.capture import attention_layers, rope_of, visit_attention
from rheoserve_sgl.gate.checkpoint import GateConfig, ModelShape
from rheoserve_sgl.gate.target import block_targets, gate_loss


class Distiller:
    """The gates of one model, and what it takes to train them.

    Args:
        model: a frozen Hugging Face decoder
        config: the gates' form
        queries: how many queries of each sequence are looked at
        late: queries are drawn from the last (1 - late) of a sequence
    """

    def __init__(self, model, config: GateConfig, queries: int, late: float, seed: int):
        self.model, self.config, self.queries, self.late = model.eval().requires_grad_(False), config, queries, late
        self.shape = shape_of(model)
        device = next(model.parameters()).device
        self.draw = torch.Generator().manual_seed(seed)
        self.layers = [self._fresh(device) for _ in range(self.shape.layers)]
        self.rope: torch.Tensor | None = None

    def parameters(self):
        return [tensor for tensors in self.layers for tensor in tensors.values()]

    def loss(self, sequence: torch.Tensor, weight: float | None) -> float:
        """Mean loss over layers of one sequence `[tokens]`; with a weight, gradients are added up."""
        block = self.config.gate_block_size
        sequence = sequence[: len(sequence) // block * block]
        if self.rope is None or len(self.rope) < len(sequence):
            self.rope = rope_of(self.model, len(sequence))
        first = min(int(self.late * len(sequence)), len(sequence) - 1)
        positions = first + torch.randint(len(sequence) - first, (self.queries,), generator=self.draw)
        positions = positions.to(self.rope.device)
        total = 0.0

        def visit(layer, q, k):
            nonlocal total
            q = q[positions]
            with torch.enable_grad():
                loss = self._layer_loss(layer, q, k, positions)
                if weight is not None:
                    (loss * weight).backward()
            total += loss.item()

        with torch.no_grad(), visit_attention(self.model, visit):
            self.model.model(sequence[None].to(self.rope.device), use_cache=False)
        return total / self.shape.layers

    def _layer_loss(self, layer: int, q, k, positions) -> torch.Tensor:
        block = self.config.gate_block_size
        weights = self.weights(layer)
        blocks = k.float().unflatten(0, (-1, block))
        first = torch.arange(len(blocks), device=k.device) * block
        with torch.no_grad():
            rotated_q = rotate(q.flatten(1, 2), self.rope, positions).view_as(q)
            rotated_k = rotate(k, self.rope, torch.arange(len(k), device=k.device))
            scale = attention_layers(self.model)[layer].scaling
            targets = block_targets(rotated_q, rotated_k, positions, scale, block)
        gate_q = project_query(weights, q.float(), positions)
        gate_k = project_key(weights, pool_blocks(blocks, weights.parts), first)
        return gate_loss(gate_q, gate_k, targets, positions, block)

    def weights(self, layer: int) -> GateWeights:
        tensors = {name: self.layers[layer].get(name) for name in ("q", "k", "q_norm", "k_norm")}
        return GateWeights(**tensors, rope=self.rope if self.config.use_rope else None, parts=self.config.parts)

    def _fresh(self, device) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, shape in self.config.shapes(self.shape).items():
            spread = self.model.config.initializer_range
            made = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=self.draw) * spread
            tensors[name] = made.to(device).requires_grad_()
        return tensors


def shape_of(model) -> ModelShape:
    first, config = attention_layers(model)[0], model.config
    kv_heads = config.num_attention_heads // first.num_key_value_groups
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, kv_heads, first.head_dim)
