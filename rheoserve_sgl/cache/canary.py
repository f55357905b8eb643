"""A canary: are live blocks still what was written, in the host store and in their frames?

Each token that is written leaves a checksum for each layer and KV head. Between batches some random pages are looked
at in a random layer, and all pages in turn while nothing runs: every token in the host store against its checksum, and
a block's frame against the host store.
Modelled on SGLang's `--kv-canary`, which knows one tier.
"""

import logging
import time

import torch

from rheoserve_sgl import PAGE_TOKENS, environ

logger = logging.getLogger(__name__)
PAGES = 8  # looked at together in one layer, before a decode step
IDLE_BYTES = 8 << 20  # of pages looked at together in all layers where nothing runs: a new request waits for it
SECONDS = 0.05  # between looks
FAULT_PAGES = 20  # live, before a planted fault
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes of an element


class Canary:
    """Checksums of what was written to one pool, 8 bytes a token, layer and KV head.

    Args:
        pool: TwoTierKVPool
        raises: whether a finding ends the server, or is only logged
    """

    def __init__(self, pool, raises: bool):
        self.pool, self.raises = pool, raises
        generator = torch.Generator().manual_seed(0)
        self._factors = torch.randint(1 << 62, (2, 1, pool.head_dim), generator=generator)
        self._factors = (2 * self._factors + 1).to(pool.device)
        shape = (pool.layer_num, pool.host.pages, PAGE_TOKENS, pool.head_num)
        self.sums = torch.zeros(shape, dtype=torch.int64, device=pool.device)
        self.known = torch.zeros(shape[1:3], dtype=torch.bool, device=pool.device)
        self.looked = 0  # blocks so far
        self._draw = torch.Generator().manual_seed(1)
        self._last = 0.0
        self._turn = 0  # place in the list of live pages of the next idle look
        self._freed: list[torch.Tensor] = []
        self._planted = environ.planted_fault()

    def wrote(self, layer: int, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        """Tokens were given to the pool: see TwoTierKVPool.write. A CUDA graph may hold this."""
        sums = self._sum(torch.stack((k, v)).transpose(0, 1).transpose(1, 2))
        self.sums[layer].view(-1, sums.shape[1]).index_copy_(0, loc, sums)
        if layer == self.pool.layer_num - 1:
            self.known.view(-1).index_fill_(0, loc, True)
            self.known[0] = False  # the page of padded tokens is anybody's

    def freed(self, pages: torch.Tensor):
        """Pages went back to the allocator; a batch in flight may still write to them."""
        self._freed.append(pages)

    def settle(self):
        """No batch is in flight: what was freed is not live."""
        if self._freed:
            self.known[torch.cat(self._freed).long()] = False
            self._freed.clear()

    def clear(self):
        self._freed.clear()
        self.known.fill_(False)

    def look(self, idle: bool = False):
        """Look at some pages, if it is time; call between batches.

        Args:
            idle: nothing runs or waits: more is looked at, in turn

        Raises:
            RuntimeError: a block that is not what was written, by page, layer and KV head
        """
        if time.monotonic() - self._last < SECONDS:
            return
        try:
            self._look(idle)
        finally:
            self._last = time.monotonic()

    def _look(self, idle: bool):
        if self.pool.importance.is_cuda:
            torch.cuda.synchronize()
        self.settle()
        live = torch.nonzero(self.known.any(1))[:, 0]
        if not len(live):
            return
        if self._planted and len(live) >= FAULT_PAGES:
            self._plant(int(live[-1]))
        for layer, picked in self._pick(live, idle):
            finding = self.finding(layer, picked)
            self.looked += len(picked) * self.pool.head_num
            if finding:
                logger.error(finding)
                if self.raises:
                    raise RuntimeError(finding)

    def _pick(self, live: torch.Tensor, idle: bool) -> list[tuple[int, torch.Tensor]]:
        """Layers, and pages to look at in each."""
        layers = self.pool.layer_num
        if idle:
            page = layers * self.pool.head_num * self.pool.block_bytes
            count = min(max(IDLE_BYTES // page, 1), len(live))
            turn = (self._turn + torch.arange(count)) % len(live)
            self._turn += count
            return [(layer, live[turn.to(live.device)]) for layer in range(layers)]
        picked = live[torch.randint(len(live), (PAGES,), generator=self._draw).to(live.device)]
        return [(int(torch.randint(layers, (1,), generator=self._draw)), picked)]

    def finding(self, layer: int, pages: torch.Tensor) -> str:
        """What is wrong with the first wrong block of these pages `[n]` in a layer; "" if nothing is."""
        pool = self.pool
        stored = pool.host.layers[layer][pages.cpu()].to(pool.device)  # [n, heads, 2, 64, dim]
        sums = self._sum(stored.permute(0, 3, 1, 2, 4)).transpose(1, 2)  # [n, heads, 64]
        known = self.known[pages][:, None]
        wrong = known & (sums != self.sums[layer, pages].transpose(1, 2))
        if bool(wrong.any()):
            row, head, token = torch.nonzero(wrong)[0].tolist()
            return self._say(int(pages[row]), layer, head, f"token {token} in the host store is not what was written")
        frame = pool.residency.frame_of[layer, pages]
        held = pool.frames.layers[layer][frame.clamp(min=0).long()]  # [n, heads, 2, 64, dim]
        differs = (self._bits(held) != self._bits(stored)).any(4).any(2) & known & (frame >= 0)[..., None]
        if bool(differs.any()):
            row, head, token = torch.nonzero(differs)[0].tolist()
            what = f"token {token} in frame {int(frame[row, head])} is not the host store's"
            return self._say(int(pages[row]), layer, head, what)
        return ""

    def _say(self, page: int, layer: int, head: int, what: str) -> str:
        return f"RheoServe canary: page {page}, layer {layer}, KV head {head}: {what}"

    def _bits(self, values: torch.Tensor) -> torch.Tensor:
        return values.contiguous().view(WORDS[values.element_size()])

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Checksums `[...]` of `[..., 2, head_dim]`, keys and values of a token; integers wrap around."""
        return (self._bits(values).long() * self._factors[:, 0]).sum((-2, -1))

    def _plant(self, page: int):
        """For tests: change one bit of a live page, in the store or in a frame."""
        pool, layer = self.pool, self.pool.layer_num - 1
        frames = pool.residency.frame_of[layer, page]
        token = int(torch.nonzero(self.known[page])[0])
        if self._planted == "host":
            self._bits(pool.host.layers[layer][page, 0, 1, token])[3] ^= 1
        elif int(frames[0]) >= 0:
            self._bits(pool.frames.layers[layer][int(frames[0]), 1, token])[3] ^= 1
        else:
            return
        self._planted = ""
