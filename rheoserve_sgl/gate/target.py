"""What a gate is trained to say, and how far it is from it.

Source: SeerAttention-R (arXiv 2506.08889), section 2.3: each block's largest softmax probability of the true
attention, the largest over the query heads of a group, over the blocks before the query's own, normalised.
"""

import torch

TINY = 1e-9


def block_targets(q, k, positions, scale: float, block: int) -> torch.Tensor:
    """`[queries, kv_heads, blocks]`, rows that sum to 1 (or 0 for a query in the first block).

    Args:
        q: `[queries, kv_heads, group, head_dim]` after RoPE
        k: `[tokens, kv_heads, head_dim]` after RoPE, tokens a multiple of block
        positions: `[queries]` of the queries
    """
    tokens = len(k)
    logits = torch.einsum("nhgd,thd->nhgt", q, k).float() * scale
    at = torch.arange(tokens, device=k.device)
    logits.masked_fill_((at > positions[:, None])[:, None, None], -torch.inf)
    probability = torch.softmax(logits, -1).unflatten(-1, (-1, block)).amax(-1).amax(2)
    probability = probability * earlier_blocks(positions, tokens // block, block)[:, None]
    return probability / (probability.sum(-1, keepdim=True) + TINY)


def gate_loss(gate_q, gate_k, targets, positions, block: int) -> torch.Tensor:
    """Mean KL divergence of the gate's softmax from the targets, over queries and KV heads.

    The published code takes PyTorch's elementwise mean, which also divides by the number of blocks.

    Args:
        gate_q: `[queries, kv_heads, width]`
        gate_k: `[blocks, kv_heads, width]`
    """
    logits = torch.einsum("nhw,bhw->nhb", gate_q, gate_k).float() * gate_q.shape[-1] ** -0.5
    earlier = earlier_blocks(positions, len(gate_k), block)[:, None]
    predicted = torch.log_softmax(logits.masked_fill(~earlier, torch.finfo(torch.float32).min), -1)
    divergence = torch.xlogy(targets, targets) - targets * predicted
    return divergence.sum(-1).mean()


def earlier_blocks(positions, blocks: int, block: int) -> torch.Tensor:
    """`[queries, blocks]` bool: the blocks before each query's own."""
    return torch.arange(blocks, device=positions.device) < (positions // block)[:, None]
