"""Gate scores of blocks: one log probability for each KV head and page."""

import torch


def score(gate_q: torch.Tensor, quick: torch.Tensor, pages: torch.Tensor, valid: torch.Tensor, scale: float):
    """Score the pages of each request.

    A page's score is the best, over the query heads of a group, of the log-softmax of the gate's logits over
    the request's pages: query heads count alike, however sharp each is.

    Args:
        gate_q: `[batch, kv_heads, group, key_dim]` float32
        quick: `[all_pages, kv_heads, key_dim]` float32
        pages: `[batch, max_pages]` int64
        valid: `[batch, max_pages]` bool
        scale: softmax scale

    Returns:
        `[batch, kv_heads, max_pages]` float32, -inf where not valid
    """
    keys = quick[pages].permute(0, 2, 3, 1)  # [batch, kv_heads, key_dim, max_pages]
    logits = (gate_q * scale) @ keys
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return torch.log_softmax(logits, -1).amax(2)
