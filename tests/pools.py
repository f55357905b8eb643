"""A real pool and allocator of small size, for tests that drive them without a server."""

import torch

from rheoserve_sgl.cache.allocator import TwoTierAllocator
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.coordinator.coordinator import Coordinator
from rheoserve_sgl.coordinator.exchange import SWAP_BYTES
from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.ops.pool_keys import pool_keys

LAYERS, HEADS, DIM = 2, 2, 64


def make_pool(tokens: int, device_tokens: int, device: str = "cpu", dtype=torch.float32, **settings):
    """(pool, allocator) as RheoServe's hooks build them in a server."""
    config = RheoConfig(device_tokens=device_tokens, **settings)
    pool = TwoTierKVPool(
        tokens,
        config=config,
        gate=make_gate(config.selector),
        dtype=dtype,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device=device,
        enable_memory_saver=False,
        start_layer=0,
        end_layer=LAYERS,
        enable_alt_stream=False,
    )
    pool.coordinator = Coordinator(pool)
    allocator = TwoTierAllocator(tokens, page_size=64, dtype=dtype, device=device, kvcache=pool, need_sort=False)
    return pool, allocator


def refresh_keys(pool, layer: int, pages: torch.Tensor, filled: torch.Tensor):
    """Gate keys of pages `[n]` of one layer, with `[n]` valid tokens each, from the host store."""
    filled = filled.to(torch.int32)
    pool_keys(pool.gate, pool.host.layers[layer], pages, filled, pool.quick.layers[layer], pool.threads)


class SlowLane:
    """Blocks that move while other things happen: for a CPU, what the coordinator's lane is on a GPU."""

    swap_bytes = SWAP_BYTES

    def __init__(self, pool):
        self.pool, self.moves, self.copied, self.more = pool, None, False, None
        self.short = self.still = self.unseen = self.fails = False

    @property
    def busy(self):
        return self.moves is not None

    def start(self, moves, more=None, short=False):
        assert not self.busy
        if self.fails:
            self.pool.residency.cancel(moves)
            raise RuntimeError("no memory")
        self.moves, self.copied, self.more, self.short = moves, False, more, short

    def copy(self):
        if self.busy and not self.copied:
            self.pool.fill(self.moves, beside=True)
            self.copied = True

    def hurry(self):
        self.short = True

    def finish(self):
        if self.still or (self.unseen and not self.short):
            return False
        self.unseen = False
        if self.busy and self.short:
            self.copy()
        if self.busy and self.copied:
            self.pool.residency.admit(self.moves)
            self.moves = None
            return bool(self.more)
        return False
