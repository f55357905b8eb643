"""The oracle: the attention itself, summed up per block. For accuracy studies; it costs what it would save.

Source: SeerAttention-R (arXiv 2506.08889), section 4.2: a block's largest softmax probability, the target that
gates are trained on.
"""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.base import Gate


class OracleGate(Gate):
    def key_dim(self, head_dim: int) -> int:
        return 16  # unused

    def refresh(self, pool, layer, writes, k, tapped=None):
        pass

    def score(self, pool, layer, heads, scale, batch, tapped=None):
        rows = [self._row(pool, layer, q, scale, batch, i) for i, q in enumerate(heads)]
        return torch.stack(rows)

    def _row(self, pool, layer, q, scale, batch, row: int):
        """Log scores `[kv_heads, max_pages]` of one request."""
        keys = pool.host.layers[layer][batch.pages[row].cpu(), :, 0].to(q.device).float()
        logits = torch.einsum("hgd,phtd->hgpt", q, keys) * scale
        at = torch.arange(logits.shape[2] * PAGE_TOKENS, device=q.device).view(-1, PAGE_TOKENS)
        length = (batch.n_pages[row] - 1) * PAGE_TOKENS + batch.tail_len[row]
        logits = logits.masked_fill(at >= length, -torch.inf)
        log_p = torch.log_softmax(logits.flatten(2), -1).view_as(logits)
        return log_p.amax((1, 3))
