"""Prefill attention: new tokens causally over themselves, and fully over their prefix.

Both parts are fused attention kernels that return the log-sum-exp; they are merged by it. On a Hopper GPU they are
FlashAttention-3's, which SGLang brings and uses there itself, elsewhere torch's.
"""

import functools
import logging

import torch

from rheoserve_sgl.ops.merge import merge_torch

logger = logging.getLogger(__name__)
_ATEN = torch.ops.aten


def attend_with_lse(q, k, v, causal: bool, scale: float):
    """Fused attention that also returns its LSE.

    Args:
        q: `[batch, heads, queries, head_dim]`
        k, v: `[batch, heads, keys, head_dim]`, strides of any kind (heads may be expanded)

    Returns:
        out like q, lse `[batch, heads, queries]` float32, natural log
    """
    if q.device.type == "cpu":
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]


def flash_attention(q, k, v, causal: bool, scale: float):
    """FlashAttention on a GPU, for fp16 and bf16; query heads share KV heads without a copy.

    Args:
        q: `[queries, heads, head_dim]`
        k, v: `[keys, kv_heads, head_dim]`

    Returns:
        out like q, lse `[heads, queries]` float32
    """
    run = flash_attention_3()
    if run is not None:
        lengths = {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": len(q), "max_seqlen_k": len(k)}
        out, lse, *_ = run(
            q[None], k[None], v[None], **lengths, softmax_scale=scale, causal=causal, return_softmax_lse=True
        )
        return out[0], lse[0]
    out, lse, *_ = _ATEN._flash_attention_forward(
        q[None], k[None], v[None], None, None, len(q), len(k), 0.0, causal, False, scale=scale
    )
    return out[0], lse[0, :, : len(q)]


@functools.cache
def flash_attention_3():
    """SGLang's FlashAttention-3 if it runs on this GPU, else None."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func
    except ImportError as error:
        logger.warning("RheoServe: prefill by FlashAttention-2, since FlashAttention-3 cannot be loaded: %s", error)
        return None
    return flash_attn_varlen_func


def prefill_flash(q, k, v, prefix, scale: float) -> torch.Tensor:
    """As `prefill_attention`, on a GPU and in half precision.

    Args:
        prefix: `[2, prefix_tokens, kv_heads, head_dim]`, or None
    """
    out, lse = flash_attention(q, k, v, True, scale)
    if prefix is None:
        return out
    before, before_lse = flash_attention(q, prefix[0], prefix[1], False, scale)
    both = torch.logaddexp(lse, before_lse)
    own, earlier = (torch.exp(part - both).T[..., None] for part in (lse, before_lse))
    return (out * own + before * earlier).to(q.dtype)


def prefill_attention(q, k, v, prefix, scale: float) -> torch.Tensor:
    """Attention of one request's new tokens.

    Args:
        q: `[tokens, heads, head_dim]`
        k, v: `[tokens, kv_heads, head_dim]`, the new tokens' own
        prefix: `[2, kv_heads, prefix_tokens, head_dim]`, K and V before them, or None
        scale: softmax scale

    Returns:
        `[tokens, heads, head_dim]` in q's dtype
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3)  # [kv_heads, group, tokens, dim]
    own_k, own_v = (t.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for t in (k, v))
    out, lse = attend_with_lse(q, own_k, own_v, True, scale)
    if prefix is not None:
        # Without a mask the group folds into the queries, and each key is read once for all its heads.
        folded = q.reshape(kv_heads, 1, group * tokens, dim)
        before, before_lse = attend_with_lse(folded, prefix[0][:, None], prefix[1][:, None], False, scale)
        out, _ = merge_torch(
            out.float(),
            lse.float(),
            before.reshape(out.shape).float(),
            before_lse.reshape(lse.shape).float(),
        )
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(q.dtype)
