"""SeerAttention-R's gate written out in float64, one block and one head at a time, apart from RheoServe's code.

Formulas: arXiv 2506.08889, equation 1 and sections 2.2 and 3.1.
"""

import math

import numpy as np


def rotate(x, position, theta):
    """RoPE of one vector: pairs (j, j + half)."""
    half = len(x) // 2
    out = np.empty_like(x)
    for j in range(half):
        angle = position * theta ** (-j / half)
        out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return out


def finish(x, norm, position, theta):
    if norm is not None:
        x = x / math.sqrt((x * x).mean() + 1e-6) * norm
    return x if theta is None else rotate(x, position, theta)


def query(q, weights, norm, position, theta):
    """Gate query of one KV head: q `[group, head_dim]`; weights None, `[head_dim, w]` or `[group, head_dim, w]`."""
    if weights is None:
        out = q.mean(0)
    elif weights.ndim == 2:
        out = q.mean(0) @ weights
    else:
        out = sum(q[g] @ weights[g] for g in range(len(q)))
    return finish(out, norm, position, theta)


def key(block, parts, weights, norm, position, theta):
    """Gate key of one block of one KV head: block `[tokens, head_dim]`."""
    pooled = {"max": block.max(0), "min": block.min(0), "avg": block.mean(0)}
    return finish(np.concatenate([pooled[part] for part in parts]) @ weights, norm, position, theta)


def probabilities(query, keys):
    """Softmax over blocks of one KV head."""
    logits = np.array([query @ k for k in keys]) / math.sqrt(len(query))
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
