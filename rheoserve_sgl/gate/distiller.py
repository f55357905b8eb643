"""The gates of one model in training, and their loss on a sequence."""

from dataclasses import dataclass

import torch

from rheoserve_sgl.gate.attn_gate import GateWeights, pool_blocks, project_key, project_query, rotate
from rheoserve_sgl.gate.capture import attention_layers, rope_of, visit_attention
from rheoserve_sgl.gate.checkpoint import GateConfig, ModelShape
from rheoserve_sgl.gate.target import TINY, block_targets, earlier_blocks, far_blocks, gate_loss


@dataclass(frozen=True)
class Seen:
    """What one layer's gate learns from some queries of a sequence.

    positions: `[queries]`
    q: `[queries, kv_heads, group, head_dim]`, before RoPE
    pooled: `[blocks, kv_heads, parts * head_dim]`, of keys before RoPE
    targets, mask, weights: see rheoserve_sgl.gate.target
    """

    positions: torch.Tensor
    q: torch.Tensor
    pooled: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor | None

    @classmethod
    def draw(cls, parts: "list[Seen]", count: int, generator: torch.Generator) -> "Seen":
        """`count` of the queries of all parts, drawn by their weights; what is left of those tells heads apart."""
        names = ("positions", "q", "targets", "mask", "weights")
        all_of = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        chance = all_of["weights"].sum(1)
        drawn = torch.multinomial(chance.cpu() + TINY, count, generator=generator).to(chance.device)
        taken = {name: tensor[drawn] for name, tensor in all_of.items()}
        taken["weights"] = taken["weights"] / (chance[drawn, None] + TINY)
        return cls(pooled=parts[0].pooled, **taken)

    def to(self, device) -> "Seen":
        return Seen(*(tensor if tensor is None else tensor.to(device) for tensor in vars(self).values()))


class Distiller:
    """The gates of one model, and what it takes to train them.

    Args:
        model: a frozen Hugging Face decoder
        config: the gates' form
        queries: how many queries of each sequence are looked at
        late: queries are drawn from the last (1 - late) of a sequence
        window: tokens before a query's block that are always attended to: only what lies farther, and not in the first
            block, is learnt, each query by how much it attends there; None: all blocks and queries alike, as published
        candidates: with a window, of how many queries those are drawn, by how much they attend there: far recalls are
            rare in long sequences; None: of as many
    """

    def __init__(
        self,
        model,
        config: GateConfig,
        queries: int,
        late: float,
        seed: int,
        window: int | None = None,
        candidates: int | None = None,
    ):
        self.candidates = candidates or queries
        self.model, self.config, self.queries, self.late = model.eval().requires_grad_(False), config, queries, late
        self.window = window
        self.shape = shape_of(model)
        device = next(model.parameters()).device
        self.draw = torch.Generator().manual_seed(seed)
        self.layers = [self._fresh(device) for _ in range(self.shape.layers)]
        self.rope: torch.Tensor | None = None

    def parameters(self):
        return [tensor for tensors in self.layers for tensor in tensors.values()]

    def loss(self, sequence: torch.Tensor, weight: float | None) -> float:
        """Mean loss over layers of one sequence `[tokens]`; with a weight, gradients are added up."""
        total = 0.0

        def learn(layer: int, seen: Seen):
            nonlocal total
            total += self._learn(layer, seen, weight)

        self._observe(sequence, learn)
        return total / self.shape.layers

    def observe(self, sequence: torch.Tensor) -> "list[Seen]":
        """What each layer's gate learns from one sequence `[tokens]`, for `loss_of`, in the host's memory."""
        layers = []
        self._observe(sequence, lambda layer, seen: layers.append(seen.to("cpu")))
        return layers

    def loss_of(self, layers: "list[Seen]", weight: float | None) -> float:
        """As `loss`, of a sequence that was observed before."""
        there = (seen.to(self.rope.device) for seen in layers)
        return sum(self._learn(layer, seen, weight) for layer, seen in enumerate(there)) / self.shape.layers

    def _observe(self, sequence: torch.Tensor, take):
        block = self.config.gate_block_size
        sequence = sequence[: len(sequence) // block * block]
        if self.rope is None or len(self.rope) < len(sequence):
            self.rope = rope_of(self.model, len(sequence))
        first = min(int(self.late * len(sequence)), len(sequence) - 1)
        positions = first + torch.randint(len(sequence) - first, (self.candidates,), generator=self.draw)
        positions = positions.to(self.rope.device)
        with (
            torch.no_grad(),
            visit_attention(self.model, lambda layer, q, k: take(layer, self._pick(layer, q, k, positions))),
        ):
            self.model.model(sequence[None].to(self.rope.device), use_cache=False)

    def _pick(self, layer: int, q, k, positions) -> "Seen":
        """What the layer's gate learns: of all positions, or of those that attend far."""
        if self.candidates == self.queries:
            return self._see(layer, q, k, positions)
        parts = [self._see(layer, q, k, some) for some in positions.split(self.queries)]
        return Seen.draw(parts, self.queries, self.draw)

    def _see(self, layer: int, q, k, positions) -> "Seen":
        block = self.config.gate_block_size
        q, blocks = q[positions], k.float().unflatten(0, (-1, block))
        where = (positions, len(blocks), block)
        mask = earlier_blocks(*where) if self.window is None else far_blocks(*where, self.window)
        rotated_q = rotate(q.flatten(1, 2), self.rope, positions).view_as(q)
        rotated_k = rotate(k, self.rope, torch.arange(len(k), device=k.device))
        scale = attention_layers(self.model)[layer].scaling
        targets, far = block_targets(rotated_q, rotated_k, positions, scale, block, mask)
        pooled = pool_blocks(blocks, self.config.parts)
        return Seen(positions, q, pooled, targets, mask, None if self.window is None else far)

    @torch.enable_grad()
    def _learn(self, layer: int, seen: "Seen", weight: float | None) -> float:
        weights = self.weights(layer)
        first = torch.arange(len(seen.pooled), device=seen.pooled.device) * self.config.gate_block_size
        gate_q = project_query(weights, seen.q.float(), seen.positions)
        gate_k = project_key(weights, seen.pooled, first)
        loss = gate_loss(gate_q, gate_k, seen.targets, seen.mask, seen.weights)
        if weight is not None:
            (loss * weight).backward()
        return loss.item()

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
