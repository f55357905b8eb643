"""SeerAttention-R's gate while serving.

Source: arXiv 2506.08889, sections 2.2 and 3.2. A block's key comes from the keys of its 64 tokens before RoPE, so
it exists once the block is complete; until then it is zero, as in the published code (the newest block is
always attended). Kept are the keys, and for each request the running max, min and sum of its newest page.
"""

import logging
from dataclasses import replace

import torch

from rheoserve_sgl.gate.attn_gate import GateWeights
from rheoserve_sgl.gate.base import Gate
from rheoserve_sgl.ops.attn_gate import gate_keys, gate_queries
from rheoserve_sgl.ops.score import score

logger = logging.getLogger(__name__)


class SeerGate(Gate):
    """A learned gate.

    Args:
        layers: this rank's KV heads of each layer's weights, on the pool's device, see `take_heads`
        rotates: whether queries and keys are rotated
        rotate_last: see Writes.of_decode
    """

    needs_taps = True
    kind = "seer"

    def __init__(self, layers: list[GateWeights], *, rotates: bool = True, rotate_last: bool = False):
        self.layers = layers
        self.rotates = rotates
        self.rotate_last = rotate_last
        self.running: list[torch.Tensor] = []

    def key_dim(self, head_dim: int) -> int:
        return self.layers[0].gate_dim

    def key_dtype(self, dtype: torch.dtype, device: str) -> torch.dtype:
        # As the published code keeps them; a step reads all of them. (Without a norm float16 might not hold them.)
        return torch.bfloat16 if dtype.itemsize == 2 and torch.device(device).type == "cuda" else torch.float32

    def prepare(self, rope: torch.Tensor, slots: int, head_dim: int):
        """Before the first step: the model's rotations, and room for the incomplete pages of so many requests.

        Args:
            rope: `[positions, rotary_dim]` float32, see GateWeights

        Raises:
            ValueError: the gate's width is not that of the rotation
        """
        if self.rotates:
            if rope.shape[1] != self.layers[0].gate_dim:
                raise ValueError(
                    f"--rheoserve-gate-path: the gate's width is {self.layers[0].gate_dim}; the model rotates "
                    f"{rope.shape[1]} components of each head, and a gate with RoPE must have as many"
                )
            self.layers = [replace(layer, rope=rope.contiguous()) for layer in self.layers]
        kv_heads, device = self.layers[0].k.shape[0], self.layers[0].k.device
        shape = (slots + 1, kv_heads, 3, head_dim)
        room = len(self.layers) * torch.Size(shape).numel() * 4
        logger.info(
            "RheoServe: learned gate of %d layers, %.3f GiB for incomplete pages", len(self.layers), room / 2**30
        )
        self.running = [torch.zeros(shape, dtype=torch.float32, device=device) for _ in self.layers]

    def refresh(self, pool, layer, writes, k, tapped):
        kv_heads = self.layers[layer].k.shape[0]
        plain = tapped.k.float().reshape(len(tapped.k), kv_heads, -1).contiguous()
        gate_keys(self.layers[layer], plain, writes, self.running[layer], pool.quick.layers[layer], pool.threads)

    def score(self, pool, layer, heads, scale, batch, tapped):
        plain = tapped.q.float().reshape(heads.shape).contiguous()
        query = gate_queries(self.layers[layer], plain, tapped.positions, pool.threads)
        scale = query.shape[-1] ** -0.5
        return score(query[:, :, None], pool.quick.layers[layer], batch.pages, batch.n_pages, scale, pool.threads)
