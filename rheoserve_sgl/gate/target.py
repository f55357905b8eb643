"""What a gate is trained to say, and how far it is from it.

Source: SeerAttention-R (arXiv 2506.08889), section 2.3: each block's largest softmax probability of the true
attention, the largest over the query heads of a group, over the blocks before the query's own, normalised.
"""

import torch

TINY = 1e-9


def block_targets(q, k, positions, scale: float, block: int, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(targets `[queries, kv_heads, blocks]`, rows that sum to 1, or 0 where nothing is seen; what the maxima of a row
    summed to, at most 1, `[queries, kv_heads]`).

    Args:
        q: `[queries, kv_heads, group, head_dim]` after RoPE
        k: `[tokens, kv_heads, head_dim]` after RoPE, tokens a multiple of block
        positions: `[queries]` of the queries
        seen: `[queries, blocks]` bool, the blocks that count
    """
    tokens = len(k)
    logits = torch.einsum("nhgd,thd->nhgt", q, k).float() * scale
    at = torch.arange(tokens, device=k.device)
    logits.masked_fill_((at > positions[:, None])[:, None, None], -torch.inf)
    probability = torch.softmax(logits, -1).unflatten(-1, (-1, block)).amax(-1).amax(2)
    probability = probability * seen[:, None]
    total = probability.sum(-1, keepdim=True)
    return probability / (total + TINY), total[..., 0].clamp(max=1.0)


def gate_loss(gate_q, gate_k, targets, seen, weights=None) -> torch.Tensor:
    """Mean KL divergence of the gate's softmax from the targets, over queries and KV heads.

    The published code takes PyTorch's elementwise mean, which also divides by the number of blocks.

    Args:
        gate_q: `[queries, kv_heads, width]`
        gate_k: `[blocks, kv_heads, width]`
        seen: `[queries, blocks]` bool, the blocks that count
        weights: `[queries, kv_heads]` of each divergence in the mean; None: all alike
    """
    logits = torch.einsum("nhw,bhw->nhb", gate_q, gate_k).float() * gate_q.shape[-1] ** -0.5
    predicted = torch.log_softmax(logits.masked_fill(~seen[:, None], torch.finfo(torch.float32).min), -1)
    divergence = (torch.xlogy(targets, targets) - targets * predicted).sum(-1)
    if weights is None:
        return divergence.mean()
    return (divergence * weights).sum() / (weights.sum() + TINY)


def earlier_blocks(positions, blocks: int, block: int) -> torch.Tensor:
    """`[queries, blocks]` bool: the blocks before each query's own."""
    return torch.arange(blocks, device=positions.device) < (positions // block)[:, None]


def far_blocks(positions, blocks: int, block: int, window: int) -> torch.Tensor:
    """Of those, the blocks behind the first one and before the last `window` tokens' blocks."""
    at = torch.arange(blocks, device=positions.device)
    return (at > 0) & (at < (positions // block)[:, None] - window // block)
