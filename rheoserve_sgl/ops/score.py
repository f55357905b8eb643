"""Gate scores of blocks, one log probability for each KV head and page, and their running sum."""

import torch

from rheoserve_sgl.ops.extension import address
from rheoserve_sgl.ops.workers import worker_pool


def score(gate_q, quick, pages, n_pages, scale: float, threads: int = 1):
    """Score the pages of each request.

    A page's score is the best, over the query heads of a group, of the log-softmax of the gate's logits over
    the request's pages: query heads count alike, however sharp each is.

    Args:
        gate_q: `[batch, kv_heads, group, key_dim]` float32
        quick: `[all_pages, kv_heads, key_dim]`, on a CPU float32
        pages: `[batch, max_pages]` int64
        n_pages: `[batch]` int32, at least 1
        scale: softmax scale
        threads: size of the worker pool, where tensors are on a CPU

    Returns:
        `[batch, kv_heads, max_pages]` float32, -inf beyond n_pages
    """
    if pages.device.type == "cpu":
        return score_cpu(gate_q, quick, pages, n_pages, scale, threads)
    return score_torch(gate_q, quick, pages, n_pages, scale)


def score_torch(gate_q, quick, pages, n_pages, scale: float):
    valid = torch.arange(pages.shape[1], device=pages.device) < n_pages[:, None]
    keys = quick[pages].float().permute(0, 2, 3, 1)  # [batch, kv_heads, key_dim, max_pages]
    logits = (gate_q * scale) @ keys
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return torch.log_softmax(logits, -1).amax(2)


def score_cpu(gate_q, quick, pages, n_pages, scale: float, threads: int = 1):
    batch, kv_heads, group, key_dim = gate_q.shape
    scores = torch.empty((batch, kv_heads, pages.shape[1]), dtype=torch.float32)
    worker_pool(threads).score(
        *_table(pages, n_pages, len(quick)),
        address(gate_q, torch.float32, (batch, kv_heads, group, key_dim), "gate_q"),
        address(quick, torch.float32, (len(quick), kv_heads, key_dim), "quick"),
        scores.data_ptr(),
        kv_heads,
        group,
        key_dim,
        scale,
    )
    return scores


def record(scores, chosen, importance, pages, n_pages, weight: float, threads: int = 1):
    """Add one step to a layer's importance, in place: weight * (exp(score), and 1 if the page was selected).

    A selected block outweighs all that nearly was: only for what is attended it pays to move. A NaN score adds nothing.

    Args:
        scores: `[batch, kv_heads, max_pages]` float32 log probabilities
        chosen: `[batch, kv_heads, max_pages]` bool, the step's selection, or None
        importance: `[all_pages, kv_heads]` float32
        pages, n_pages, threads: as for `score`
        weight: of this step; where it grows from step to step, the past decays
    """
    if pages.device.type == "cpu":
        record_cpu(scores, chosen, importance, pages, n_pages, weight, threads)
    else:
        record_torch(scores, chosen, importance, pages, n_pages, weight)


def record_torch(scores, chosen, importance, pages, n_pages, weight: float):
    valid = torch.arange(pages.shape[1], device=pages.device) < n_pages[:, None]
    where = torch.where(valid, pages, 0)  # page 0 is nobody's
    values = torch.exp(scores).nan_to_num(nan=0.0)
    if chosen is not None:
        values = values + (chosen & valid[:, None])
    values = weight * values.transpose(1, 2)
    index = where.reshape(-1, 1).expand(-1, importance.shape[1])
    importance.scatter_add_(0, index, values.reshape(index.shape))


def record_cpu(scores, chosen, importance, pages, n_pages, weight: float, threads: int = 1):
    all_pages, kv_heads = importance.shape
    worker_pool(threads).record(
        *_table(pages, n_pages, all_pages),
        address(scores, torch.float32, (len(pages), kv_heads, pages.shape[1]), "scores"),
        0 if chosen is None else address(chosen, torch.bool, scores.shape, "chosen"),
        address(importance, torch.float32, (all_pages, kv_heads), "importance"),
        kv_heads,
        weight,
    )


def _table(pages, n_pages, all_pages: int) -> tuple:
    batch, max_pages = pages.shape
    return (
        address(pages, torch.int64, (batch, max_pages), "pages"),
        address(n_pages, torch.int32, (batch,), "n_pages"),
        batch,
        max_pages,
        all_pages,
    )
