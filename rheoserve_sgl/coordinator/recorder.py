"""The recorder: a running importance for each block."""

import torch

# Weight of the past at each step: a block that stops mattering halves its importance in about 22 steps,
# a little more than one default exchange interval.
DECAY = 0.97


def record(importance: torch.Tensor, pages: torch.Tensor, valid: torch.Tensor, log_scores: torch.Tensor, decay: float):
    """Fold one step's scores into a layer's importance, in place.

    A page that several requests share takes the largest of their values.

    Args:
        importance: `[all_pages, kv_heads]` float32
        pages: `[batch, max_pages]` int64
        valid: `[batch, max_pages]` bool; the others are written to page 0, which nobody reads
        log_scores: `[batch, kv_heads, max_pages]` float32 log probabilities
        decay: weight of the past; 0 starts afresh, as at the end of a prefill
    """
    where = torch.where(valid, pages, 0)
    values = torch.exp(log_scores).transpose(1, 2)
    if decay:
        values = values + decay * importance[where]
    index = where.reshape(-1, 1).expand(-1, importance.shape[1])
    importance.scatter_reduce_(0, index, values.reshape(index.shape), "amax", include_self=False)
