"""Merge of two partial attentions by log-sum-exp.

Source: the state merge of FlashInfer (arXiv 2501.01005, section 2.2), in natural logarithms.
"""

import torch

from rheoserve_sgl.ops.extension import address, extension


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


def merge_cpu(out_a, lse_a, out_b, lse_b):
    rows, dim = lse_a.numel(), out_a.shape[-1]
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    arguments = [
        address(tensor, torch.float32, like.shape, name)
        for tensor, like, name in (
            (out_a, out_a, "out_a"), (lse_a, lse_a, "lse_a"), (out_b, out_a, "out_b"), (lse_b, lse_a, "lse_b"),
        )
    ]
    extension().merge(*arguments, out.data_ptr(), lse.data_ptr(), rows, dim)
    return out, lse


def merge(out_a, lse_a, out_b, lse_b):
    run = merge_cpu if out_a.device.type == "cpu" else merge_torch
    return run(out_a, lse_a, out_b, lse_b)
