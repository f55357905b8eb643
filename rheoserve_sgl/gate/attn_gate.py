"""The maths of SeerAttention-R's AttnGate, in plain torch: what is served, what is trained, and the oracle.

Source: Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning" (arXiv 2506.08889), equation 1,
and the published gates of SeerAttention/SeerAttention-Decode-*-AttnGates. All inputs are before RoPE, after the
model's own QK-norm. All arithmetic is in the dtype of the inputs; serving uses float32.
"""

from dataclasses import dataclass

import torch

Q_POOLINGS = ("Qproj", "Qavgproj", "Qavg")
K_PARTS = ("max", "min", "avg")  # in this order, any of them: "Kmaxminavg", "Kmax", ...
EPSILON = 1e-6


@dataclass(frozen=True)
class GateWeights:
    """One layer's gate, or a rank's KV heads of it.

    q: `[kv_heads, group, head_dim, gate_dim]` (Qproj), `[kv_heads, head_dim, gate_dim]` (Qavgproj), None (Qavg)
    k: `[kv_heads, len(parts) * head_dim, gate_dim]`; both float32 or, on a GPU, what they were rounded to
    q_norm, k_norm: `[gate_dim]`, or None
    rope: `[positions, gate_dim]`, cosines then sines of half the width each; None: no rotation
    parts: which of K_PARTS a block's key is made of
    """

    q: torch.Tensor | None
    k: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    rope: torch.Tensor | None
    parts: tuple[str, ...] = K_PARTS

    @property
    def gate_dim(self) -> int:
        return self.k.shape[-1]


def project_query(weights: GateWeights, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gate queries `[tokens, kv_heads, gate_dim]` of queries `[tokens, kv_heads, group, head_dim]` at `[tokens]`."""
    if weights.q is None:
        out = q.mean(2)
    elif weights.q.ndim == 3:
        out = torch.einsum("nhi,hio->nho", q.mean(2), weights.q.to(q.dtype))
    else:
        out = torch.einsum("nhgi,hgio->nho", q, weights.q.to(q.dtype))
    return rotate(rms_norm(out, weights.q_norm), weights.rope, positions)


def project_key(weights: GateWeights, pooled: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gate keys `[blocks, kv_heads, gate_dim]` of pooled keys `[blocks, kv_heads, len(parts) * head_dim]`.

    Args:
        positions: `[blocks]` where each key is rotated: its block's first token
    """
    out = torch.einsum("nhi,hio->nho", pooled, weights.k.to(pooled.dtype))
    return rotate(rms_norm(out, weights.k_norm), weights.rope, positions)


def pool_blocks(keys: torch.Tensor, parts: tuple[str, ...]) -> torch.Tensor:
    """Pool `[blocks, block_tokens, kv_heads, head_dim]` to `[blocks, kv_heads, len(parts) * head_dim]`."""
    pools = {"max": keys.amax, "min": keys.amin, "avg": keys.mean}
    return torch.cat([pools[part](1) for part in parts], -1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def rotate(x: torch.Tensor, rope: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of `[n, kv_heads, gate_dim]` by the angles at `[n]`."""
    return x if rope is None else rotate_by(x, rope[positions])


def rotate_by(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of `[n, heads, width]` by angles `[n, width]`, cosines then sines."""
    cosine, sine = angles[:, None].to(x.dtype).chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)
