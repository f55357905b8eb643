"""What a gate is: a pooled key per block, and a query that meets it in a dot product."""

from abc import ABC, abstractmethod

import torch


class Gate(ABC):
    """Scores blocks by `query(q) . pool(block)`, per query head, in float32.

    pooling: the C++ form of `pool`, a rheo::Pooling of csrc/quick_keys.h
    """

    pooling: int

    @abstractmethod
    def key_dim(self, head_dim: int) -> int:
        """Length of a pooled key."""

    @abstractmethod
    def pool(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Pool `keys` `[n, kv_heads, 64, head_dim]` where `valid` `[n, 1, 64, 1]` into `[n, kv_heads, key_dim]`."""

    @abstractmethod
    def query(self, q: torch.Tensor) -> torch.Tensor:
        """Map queries `[..., head_dim]` to `[..., key_dim]`."""
