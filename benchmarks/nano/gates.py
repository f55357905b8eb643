"""Gates that are trained beside the model, so that its keys become such that a gate can tell blocks apart.

A gate sees a block through the maxima, minima and means of its keys. A model that never heard of gates may put what it
recalls by where pooling drowns it; here the gates' divergence is a part of the model's own loss, through queries and
keys before RoPE. The target, the model's attention, is not changed by it.
"""

import torch
from torch import nn

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import GateWeights, pool_blocks, project_key, project_query
from rheoserve_sgl.gate.checkpoint import GateConfig, ModelShape, read_gate, write_gate
from rheoserve_sgl.gate.target import block_targets, far_blocks, gate_loss

WINDOW = 256  # tokens before a query's block that are always attended to
ROWS = 8  # sequences of a step that are looked at, at most
QUERIES = 256  # of each


class Gates(nn.Module):
    """One gate a layer, in SeerAttention-R's format.

    Args:
        size: benchmarks.nano.model.Size
    """

    def __init__(self, size):
        super().__init__()
        self.shape = ModelShape(size.layers, size.heads, size.kv_heads, size.head_dim)
        self.config = GateConfig(gate_hidden_size=size.head_dim, use_qk_norm=True)
        fresh = {name: self._fresh(name, shape) for name, shape in self.config.shapes(self.shape).items()}
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(make()) for name, make in fresh.items()}) for _ in range(size.layers)
        )

    @staticmethod
    def _fresh(name: str, shape: tuple[int, ...]):
        return lambda: torch.ones(shape) if "norm" in name else torch.randn(shape) * 0.02

    def load(self, folder):
        """Go on from the gates of a folder."""
        _, layers = read_gate(folder, self.shape)
        with torch.no_grad():
            for mine, stored in zip(self.layers, layers, strict=True):
                for name, tensor in mine.items():
                    tensor.copy_(stored[name])

    def save(self, folder):
        write_gate(folder, self.config, [dict(layer.items()) for layer in self.layers], "rheoserve_sgl/nano/model")

    def weights(self, layer: int, rope: torch.Tensor) -> GateWeights:
        own = {name: self.layers[layer][name] for name in ("q", "k", "q_norm", "k_norm")}
        return GateWeights(**own, rope=rope, parts=self.config.parts)

    @staticmethod
    def keys(weights: GateWeights, k: torch.Tensor) -> torch.Tensor:
        """`[blocks, kv_heads, gate_dim]` of the whole blocks of keys `[tokens, kv_heads, head_dim]` before RoPE."""
        whole = len(k) // PAGE_TOKENS
        first = torch.arange(whole, device=k.device) * PAGE_TOKENS
        blocks = k[: whole * PAGE_TOKENS].unflatten(0, (-1, PAGE_TOKENS))
        return project_key(weights, pool_blocks(blocks, weights.parts), first)

    def loss(self, layer: int, plain, rotated, rope, positions) -> torch.Tensor:
        """Divergence of one layer's gate from its attention beyond the window, for some queries of one sequence.

        Args:
            plain, rotated: (q `[tokens, heads, head_dim]`, k `[tokens, kv_heads, head_dim]`) before and after RoPE
            rope: `[tokens, head_dim]`, cosines then sines
            positions: `[queries]` of the queries
        """
        tokens = len(rope) // PAGE_TOKENS * PAGE_TOKENS
        (q, k), (turned_q, turned_k) = ((a.float(), b.float()[:tokens]) for a, b in (plain, rotated))
        group = lambda t: t[positions].unflatten(1, (self.shape.kv_heads, -1))  # noqa: E731
        far = far_blocks(positions, tokens // PAGE_TOKENS, PAGE_TOKENS, WINDOW)
        with torch.no_grad():
            scale = self.shape.head_dim**-0.5
            targets, weights = block_targets(group(turned_q), turned_k, positions, scale, PAGE_TOKENS, far)
        own = self.weights(layer, rope)
        return gate_loss(project_query(own, group(q), positions), self.keys(own, k), targets, far, weights)


def draw_positions(recalls: torch.Tensor, length: int) -> torch.Tensor:
    """`[QUERIES]` positions of one sequence: half of those that recall something, where there are any, half of all.

    Args:
        recalls: `[length]` bool
    """
    every = torch.randint(length, (QUERIES,), device=recalls.device)
    some = torch.nonzero(recalls)[:, 0]
    if len(some):
        every[: QUERIES // 2] = some[torch.randint(len(some), (QUERIES // 2,), device=some.device)]
    return every
