"""Merge of two partial attentions by log-sum-exp.

Source: the state merge of FlashInfer (arXiv 2501.01005, section 2.2), in natural logarithms.
"""

import torch


def merge_torch(out_a, lse_a, out_b, lse_b):
    """Combine attentions over disjoint sets of keys.

    Args:
        out_a, out_b: `[..., head_dim]` float32
        lse_a, lse_b: `[...]` float32, -inf for an empty set

    Returns:
        out, lse of the union; zero and -inf where both are empty
    """
    top = torch.maximum(lse_a, lse_b)
    safe = torch.where(torch.isneginf(top), 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
    total = weight_a + weight_b
    out = (weight_a[..., None] * out_a + weight_b[..., None] * out_b) / torch.where(total == 0, 1.0, total)[..., None]
    return out, safe + torch.log(total)
