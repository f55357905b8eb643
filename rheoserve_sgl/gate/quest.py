"""Quest: an upper bound of the logits in a block, from the channelwise extremes of its keys.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (ICML 2024),
Algorithm 1. The bound sum_c max(q_c * min_c, q_c * max_c) equals relu(q) . max - relu(-q) . min, which is
one dot product with the key [max, min].
"""

import torch

from rheoserve_sgl.gate.base import PooledGate


class QuestGate(PooledGate):
    pooling = 0
    kind = "max_min"

    def key_dim(self, head_dim: int) -> int:
        return 2 * head_dim

    def key_dtype(self, dtype: torch.dtype, device: str) -> torch.dtype:
        # An extreme of keys is one of them. The CPU's kernels take float32.
        return dtype if torch.device(device).type == "cuda" else torch.float32

    def pool(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        high = keys.masked_fill(~valid, -torch.inf).amax(2)
        low = keys.masked_fill(~valid, torch.inf).amin(2)
        return torch.cat((high, low), -1)

    def query(self, q: torch.Tensor) -> torch.Tensor:
        return torch.cat((q.clamp(min=0), q.clamp(max=0)), -1)
