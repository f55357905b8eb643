"""Mean pooling: the logit of a block's average key.

Source: the training-free scores of MoBA (arXiv 2502.13189) and InfLLM (arXiv 2402.04617), with one
key per 64-token block.
"""

import torch

from rheoserve_sgl.gate.base import PooledGate


class MeanGate(PooledGate):
    pooling = 1
    kind = "mean"

    def key_dim(self, head_dim: int) -> int:
        return head_dim

    def pool(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return keys.masked_fill(~valid, 0).sum(2) / valid.sum(2)

    def query(self, q: torch.Tensor) -> torch.Tensor:
        return q
