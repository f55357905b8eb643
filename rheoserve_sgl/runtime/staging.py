"""Prefixes on their way to prefill attention: while one is attended to, the next is gathered."""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.ops.gpu.gather import gather_prefix


class Staging:
    """Two rooms on the device, each for the longest prefix of a batch in one layer; a stream of its own fills them.

    The prefixes of a batch are taken in the order of layers, and in each of requests.

    Args:
        longest: tokens that a prefix may have
    """

    def __init__(self, pool: TwoTierKVPool, longest: int):
        self._pool, self._longest = pool, longest
        self._stream = torch.cuda.Stream()
        shape = (2, 2, 0, pool.head_num, pool.head_dim)  # rooms, keys and values, tokens
        self._rooms = torch.empty(shape, dtype=pool.dtype, device=pool.device)
        self._ready = [torch.cuda.Event() for _ in range(2)]
        self._prefixes: list[tuple[torch.Tensor, int]] = []
        self._at = 0  # the next to be taken, counted over the batch's layers

    def begin(self, prefixes: list[tuple[torch.Tensor, int]]):
        """Call before a batch's first layer: pages `[n]` int64 and tokens of each prefix, at least one."""
        self._prefixes, self._at = [prefix for prefix in prefixes if prefix[1]], 0
        if not self._prefixes:
            return
        most = max(len(pages) for pages, _ in self._prefixes) * PAGE_TOKENS
        if self._rooms.shape[2] < most:
            both, parts, had, heads, dim = self._rooms.shape
            # By half at least, and the old ones given back first: each chunk of a long prompt has a longer prefix.
            shape = (both, parts, min(max(most, had * 3 // 2), self._longest), heads, dim)
            self._rooms = self._rooms.new_empty(0)
            self._rooms = self._rooms.new_empty(shape)
        self._fetch(0)

    def take(self) -> torch.Tensor:
        """K and V `[2, tokens, kv_heads, head_dim]` of the next prefix, valid until the next call."""
        at = self._at
        self._at += 1
        torch.cuda.current_stream().wait_event(self._ready[at % 2])
        self._fetch(at + 1)
        _, tokens = self._prefixes[at % len(self._prefixes)]
        return self._rooms[at % 2, :, :tokens]

    def _fetch(self, at: int):
        """Fill a room once what was launched so far, which may read it, is done."""
        layer, row = divmod(at, len(self._prefixes))
        pool = self._pool
        if layer == pool.layer_num:
            return
        pages, _ = self._prefixes[row]
        room = self._rooms[at % 2, :, : len(pages) * PAGE_TOKENS]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            gather_prefix(
                pool.host.layers[layer], pool.frames.layers[layer], pool.residency.frame_of[layer], pages, room
            )
        self._ready[at % 2].record(self._stream)
