"""What a gate is: a key per block, and queries that meet it in a dot product."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from rheoserve_sgl.ops.pool_keys import pool_keys
from rheoserve_sgl.ops.score import score


@dataclass(frozen=True)
class Tapped:
    """Queries and keys of a layer's new tokens before RoPE, as a learned gate needs them.

    q, k: `[tokens, heads * head_dim]` in the model's dtype
    positions: `[tokens]` int64
    """

    q: torch.Tensor
    k: torch.Tensor
    positions: torch.Tensor

    def take(self, rows: torch.Tensor) -> "Tapped":
        return Tapped(self.q[rows], self.k[rows], self.positions[rows])


class Gate(ABC):
    """Scores the blocks of a pool for queries.

    needs_taps: whether it works on queries and keys before RoPE
    kind: the form of its kernels on a GPU (ops/gpu): "max_min", "mean" or "seer"; "" where there is none
    """

    needs_taps = False
    kind = ""

    @abstractmethod
    def key_dim(self, head_dim: int) -> int:
        """Length of a block's key."""

    def key_dtype(self, dtype: torch.dtype, device: str) -> torch.dtype:
        """What keys are stored in, for a KV cache of `dtype`."""
        return torch.float32

    @abstractmethod
    def refresh(self, pool, layer: int, writes, k: torch.Tensor, tapped: Tapped | None):
        """Bring the keys of pages up to date, after their tokens were stored.

        Args:
            pool: TwoTierKVPool
            writes: rheoserve_sgl.runtime.writes.Writes
            k: `[tokens, kv_heads, head_dim]`, the new tokens' keys after RoPE
        """

    @abstractmethod
    def score(self, pool, layer: int, heads: torch.Tensor, scale: float, batch, tapped: Tapped | None) -> torch.Tensor:
        """Log scores `[batch, kv_heads, max_pages]` float32 of one query a request, as `ops.score.score` defines them.

        Args:
            heads: `[batch, kv_heads, group, head_dim]` float32 queries after RoPE
            scale: the layer's softmax scale
            batch: rheoserve_sgl.runtime.batch.Batch
            tapped: the same queries before RoPE
        """


class PooledGate(Gate):
    """A training-free gate: its keys are pooled from stored K, its scores are those of every query head.

    pooling: the C++ form of `pool`, a rheo::Pooling of csrc/quick_keys.h
    """

    pooling: int

    @abstractmethod
    def pool(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Pool `keys` `[n, kv_heads, 64, head_dim]` where `valid` `[n, 1, 64, 1]` into `[n, kv_heads, key_dim]`."""

    @abstractmethod
    def query(self, q: torch.Tensor) -> torch.Tensor:
        """Map queries `[..., head_dim]` to `[..., key_dim]`."""

    def refresh(self, pool, layer, writes, k, tapped=None):
        quick = pool.quick.layers[layer]
        if k.is_cuda:
            from rheoserve_sgl.ops.gpu.fold import pool_gpu

            pool_gpu(self.kind, k, writes, quick)
        else:
            pool_keys(self, pool.host.layers[layer], writes.pages, writes.filled, quick, pool.threads)

    def score(self, pool, layer, heads, scale, batch, tapped=None):
        quick = pool.quick.layers[layer]
        return score(self.query(heads), quick, batch.pages, batch.n_pages, scale, pool.threads)
