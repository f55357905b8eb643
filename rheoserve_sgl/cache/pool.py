"""The two-tier KV pool: what SGLang sees as its KV cache."""

import logging
import time

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.canary import Canary
from rheoserve_sgl.cache.frames import Frames
from rheoserve_sgl.cache.host_store import HostStore
from rheoserve_sgl.cache.quick_keys import QuickKeys
from rheoserve_sgl.cache.residency import Moves, Residency
from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.gate.base import Gate
from rheoserve_sgl.ops.append import append
from rheoserve_sgl.ops.processors import usable_threads

logger = logging.getLogger(__name__)
GIB = 1 << 30


def addresses(tensors: list[torch.Tensor], device) -> torch.Tensor:
    """Where the tensors begin, `[n]` int64, for a kernel that takes them all."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=device)


class TwoTierKVPool(MHATokenToKVPool):
    """Host store, frames, residency and quick keys behind SGLang's pool interface.

    Locations are *logical* token ids, `page * 64 + offset`, of the host store; SGLang's allocator,
    `req_to_token` and radix tree use them unchanged. Only this class and the coordinator know frames.

    Args (beyond MHATokenToKVPool's):
        size: logical tokens, the host store's capacity
        config: settings, with `device_tokens` resolved
        gate: what scores blocks
    """

    def __init__(self, size: int, *, config: RheoConfig, gate: Gate, **kwargs):
        self.config = config
        self.gate = gate
        self.threads = config.host_threads or usable_threads()
        self.frame_count = config.device_tokens // PAGE_TOKENS * kwargs["head_num"]
        super().__init__(size, page_size=PAGE_TOKENS, **kwargs)

    def _create_buffers(self):
        began = time.perf_counter()
        pages = self.size // PAGE_TOKENS + 1  # page 0 is the padding sink
        on_gpu = torch.device(self.device).type == "cuda"
        shape = (self.layer_num, pages, self.head_num)
        self.k_buffer, self.v_buffer = [], []  # SGLang's own buffers stay empty
        self.host = HostStore(*shape, self.head_dim, self.store_dtype, pin=on_gpu, threads=self.threads)
        self.frames = Frames(self.layer_num, self.frame_count, self.head_dim, self.store_dtype, self.device)
        self.residency = Residency(*shape, self.frame_count, self.device)
        self.quick = QuickKeys(*shape, self.head_dim, self.gate, self.store_dtype, self.device)
        self.moved = torch.zeros((), dtype=torch.int64, device=self.device)  # blocks copied into frames so far
        tiers = self.host.layers, self.frames.layers
        self._addresses = tuple(addresses(layers, self.device) for layers in tiers)
        # Of blocks that move beside a step: for each layer, how many of the kernel's programs are done with it.
        self.arrived = torch.zeros(self.layer_num, dtype=torch.int32, device=self.device)
        self.importance = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.canary = None if self.config.canary == "off" else Canary(self, raises=self.config.canary == "raise")
        logger.info(
            "RheoServe pool: host store %.2f GiB (%d tokens%s), frames %.2f GiB (%d tokens), quick keys %.3f GiB, "
            "made in %.1f s",
            self.host.nbytes / GIB,
            self.size,
            ", pinned" if on_gpu else "",
            self.frames.nbytes / GIB,
            self.frame_count // self.head_num * PAGE_TOKENS,
            self.quick.nbytes / GIB,
            time.perf_counter() - began,
        )

    @property
    def block_bytes(self) -> int:
        return 2 * PAGE_TOKENS * self.head_dim * self.store_dtype.itemsize

    def get_kv_size_bytes(self):
        half = (self.host.nbytes + self.frames.nbytes) // 2
        return half, half

    def set_kv_buffer(
        self,
        layer,
        loc_info,
        cache_k,
        cache_v,
        k_scale=None,
        v_scale=None,
        layer_id_override=None,
        dcp_kv_mask=None,
    ):
        """Write tokens through to the host store and to the frames of resident blocks.

        Gate keys are refreshed by the caller, who knows how full each page is.
        """
        if dcp_kv_mask is not None or k_scale is not None or v_scale is not None:
            raise NotImplementedError("RheoServe's pool has no scaled or context-parallel writes")
        loc = unwrap_write_loc(loc_info)[0]
        index = (layer.layer_id if layer_id_override is None else layer_id_override) - self.start_layer
        self.write(index, loc, cache_k.to(self.dtype), cache_v.to(self.dtype))

    def write(self, index: int, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Store tokens of layer `index`: loc `[tokens]` int64; k, v `[tokens, kv_heads, head_dim]`."""
        frame_of = self.residency.frame_of[index]
        arguments = self.host.layers[index], self.frames.layers[index], frame_of, loc, k, v
        if k.is_cuda:
            from rheoserve_sgl.ops.gpu.append import NewTokens, append_gpu

            append_gpu(NewTokens(*arguments))
        else:
            append(*arguments)
        if self.canary is not None:
            self.canary.wrote(index, loc, k, v)

    def write_prefill(self, index: int, loc: torch.Tensor, writes, k: torch.Tensor, v: torch.Tensor):
        """As `write`, on a GPU, of a batch whose pages are known (rheoserve_sgl.runtime.writes.Writes)."""
        from rheoserve_sgl.ops.gpu.append_pages import append_pages_gpu

        append_pages_gpu(
            self.host.layers[index], self.frames.layers[index], self.residency.frame_of[index], writes, k, v
        )
        if self.canary is not None:
            self.canary.wrote(index, loc, k, v)

    def forget_pages(self, pages: torch.Tensor):
        """Give back the frames of pages that left their owner."""
        self.importance.index_fill_(1, pages, 0.0)
        self.residency.drop_pages(pages)

    def exchange(self, wanted: torch.Tensor, most: int):
        """Make resident what is wanted, up to `most` blocks copied in a layer; the rest leaves.

        Two phases: victims leave the table before their frames are written, arrivals enter it after.

        Args:
            wanted: `[layers, pages, kv_heads]` bool
        """
        self.load(self.let_go(wanted), most)

    def let_go(self, wanted: torch.Tensor) -> torch.Tensor:
        """Take resident blocks that are not wanted out of their frames; returns what is wanted and not resident."""
        resident = self.residency.frame_of >= 0
        self.residency.release(resident & ~wanted)
        return wanted & ~resident

    def load(self, arriving: torch.Tensor, most: int):
        """Copy blocks `[layers, pages, kv_heads]` bool into free frames, up to `most` in a layer, and admit them."""
        moves = self.residency.reserve(arriving, most)
        try:
            self.fill(moves)
            self.residency.admit(moves)
        except BaseException:
            self.residency.cancel(moves)
            raise

    def fill(self, moves: Moves, beside: bool = False):
        """Copy blocks from the host store into the frames reserved for them.

        Args:
            beside: whether other work on the GPU goes on meanwhile
        """
        if moves.block.is_cuda:
            from rheoserve_sgl.ops.gpu.move import ALONE, BESIDE, fill_frames

            how = (BESIDE, self.arrived) if beside else (ALONE, None)
            fill_frames(*self._addresses, self.block_bytes, moves, *how)
        else:
            for index, count in enumerate(moves.count.tolist()):
                if count:
                    blocks = self.host.blocks(index).index_select(0, moves.block[index, :count])
                    self.frames.fill(index, moves.frame[index, :count], blocks)
        self.moved += moves.count.sum()

    def clear(self):
        """Forget all pages (flush_cache)."""
        self.residency.clear()
        self.importance.zero_()

    def get_cpu_copy(self, indices, mamba_indices=None):
        at = indices.cpu()
        return [layer[at // PAGE_TOKENS, :, :, at % PAGE_TOKENS] for layer in self.host.layers]

    def load_cpu_copy(self, kv_cache_cpu, indices, mamba_indices=None):
        for index, kv in enumerate(kv_cache_cpu):
            kv = kv.to(self.device)
            self.write(index, indices, kv[:, :, 0].contiguous(), kv[:, :, 1].contiguous())

    def _no_flat_buffer(self, *_):
        raise NotImplementedError(
            "RheoServe's pool is in blocks, not in rows of tokens: read it through pool.host and pool.frames"
        )

    get_key_buffer = get_value_buffer = _get_key_buffer = _get_value_buffer = _no_flat_buffer
    get_contiguous_buf_infos = move_kv_cache = _no_flat_buffer
