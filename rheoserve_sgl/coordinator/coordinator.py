"""The coordinator: decides when blocks move between the tiers, and counts what happened.

It runs inside the forward path, at the start of each batch, so that on a GPU everything it does is ordered
with the attention that reads the same tables. Pages are freed by the scheduler at other times, also while a
batch is in flight; those reports wait in a queue until the next batch begins, which is always before a
reused page can be written.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch

from rheoserve_sgl import PAGE_TOKENS, environ
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.coordinator.attended import Attended
from rheoserve_sgl.coordinator.exchange import (
    BEFORE_BYTES,
    BESIDE_BYTES,
    RANKED_AT_ONCE,
    equal_shares,
    layers_at_once,
    rank_blocks,
    wanted_blocks,
)
from rheoserve_sgl.coordinator.idle import IdleFrames
from rheoserve_sgl.coordinator.lane import Lane
from rheoserve_sgl.coordinator.swap import Ranking, swap_blocks
from rheoserve_sgl.coordinator.working_set import STEPS, WorkingSets
from rheoserve_sgl.ops.score import record
from rheoserve_sgl.runtime.batch import Batch, pages_of
from rheoserve_sgl.runtime.latency_model import LatencyModel

logger = logging.getLogger(__name__)
# The recorder's past fades by this at each step, so that it halves in about 3. Replayed traces of the bundled model hit
# most with 0.8 to 0.9, and with few frames a slower past keeps what left the selection (docs/LOG.md).
DECAY = 0.8
MOST_WEIGHT = 1e6
# A block swaps in with this importance, a step's selection being 1: it was selected in the last three steps. Others
# wait for an exchange: there are many of nearly no importance, and they took the turns of those that matter.
LEAST = 0.5
LOAD = (
    *("transactions_decoding", "transactions_waiting", "working_set_pages"),
    *("predicted_step_seconds", "measured_step_seconds", "pauses", "waited_seconds"),
)
LONG_PREFILL = 2048  # tokens: takes longer than any copy
WARN_STEPS = 256  # between two warnings of the same
ROUNDING = 0.999  # of an importance that has faded step by step


class Kept:
    """What was important to a request that waits: it must not fade while others decode.

    pages, now: `[n]` int64, the request's when it began to wait and when it ceased to
    importance: `[layers, n, kv_heads]` float32, in shares of a step's; None until the next batch begins
    """

    def __init__(self, pages: torch.Tensor):
        self.pages, self.now, self.importance = pages, pages, None


class Coordinator:
    """Owns the residency policy of one pool.

    Written by the scheduler: _freed, _turns, _changed and load. By the forward path: everything else.
    """

    def __init__(self, pool: TwoTierKVPool):
        self.pool = pool
        self.config = pool.config
        self._ranking = Ranking.of(pool.config)
        self._freed: list[torch.Tensor] = []
        self._turns: list[tuple[Kept, bool]] = []  # of requests that begin to wait (True), or decode from now on
        self.idle = IdleFrames(pool.residency, pool.host.pages, pool.device)
        self._steps, self._warns_at = 0, 0
        self._due = False  # whether an exchange waits for the one before
        self._fits = False  # whether this step's requests have frames for all their blocks
        self._failed = False  # whether the last exchange or swap failed
        self._changed = True  # whether requests joined or left since the last exchange
        # Where blocks move beside the forward pass; None: they move before it.
        self.lane = Lane(pool) if pool.importance.is_cuda else None
        # Of this step's scores in the importance: it grows instead of the past being multiplied down.
        self.weight = 1.0
        seed = environ.random_exchange_seed()
        self.gpu = None  # the GpuDecode, on a GPU
        self.seconds = {"selection_seconds": 0.0, "host_attention_seconds": 0.0}  # of decode steps on a CPU alone
        self._random = None if seed is None else torch.Generator().manual_seed(seed)
        self._most = self._blocks(BEFORE_BYTES if self.lane is None else BESIDE_BYTES)
        self.counts = dict.fromkeys(("decode_steps", "exchanges", "exchanges_failed", "stored_bytes"), 0)
        self.attended = Attended(1, pool.device)  # the backend knows how many requests there can be
        self.working_sets: WorkingSets | None = None  # the backend's, too
        self.latency: LatencyModel | None = None  # likewise
        # Gives the pages, `[n]` int64 each, of requests that join those that decode soon, and whether there are some;
        # the runtime controller's.
        self.coming: Callable[[], list[torch.Tensor]] = list
        self.expecting = False
        self.load = dict.fromkeys(LOAD, 0)  # the runtime controller's figures

    def page_freed(self, pages: torch.Tensor):
        """Pages went back to the allocator. Safe to call while a batch is in flight."""
        self._freed.append(pages)
        if self.pool.canary is not None:
            self.pool.canary.freed(pages)

    def begins_to_wait(self, pages: torch.Tensor) -> Kept:
        """A prefilled request with these pages waits; give back what this returns when it decodes (again).

        Safe to call while a batch is in flight, as is `ends_to_wait`.
        """
        kept = Kept(pages)
        self._turns.append((kept, True))
        return kept

    def ends_to_wait(self, kept: Kept, pages: torch.Tensor):
        """The request decodes from now on.

        Args:
            pages: its pages now: SGLang may have given it others of the same content, and its own to somebody else
        """
        kept.now = pages
        self._turns.append((kept, False))

    def batch_changed(self):
        """Other requests decode than before, or one ended: frames are to be shared out anew. What the radix tree keeps
        of it stays in frames while others need none."""
        self._changed = True

    def stores(self, tokens: int):
        """Count what a batch writes to the host store: K and V of so many new tokens, in every layer."""
        pool = self.pool
        self.counts["stored_bytes"] += tokens * pool.block_bytes // PAGE_TOKENS * pool.head_num * pool.layer_num

    def begin_extend(self, pages: torch.Tensor, fresh: torch.Tensor):
        """Call before a prefill's first layer.

        Pages that get their first tokens in it are written to frames that no other request holds: what is prefilled
        need not come back over PCIe to be decoded.

        Args:
            pages: of its requests, int64 in any shape
            fresh: `[n]` int64, those without tokens so far
        """
        self.settle()
        self._changed = True  # what is prefilled now decodes next
        self.idle.use(pages)
        self._finish_copies()
        if len(fresh) and not self._ranking.forced_only and not (self.lane and self.lane.busy):
            self._move(self._receive, (fresh, pages))
        if self.lane is not None and len(fresh) * PAGE_TOKENS >= LONG_PREFILL:
            self.lane.hurry()

    def _receive(self, what: tuple[torch.Tensor, torch.Tensor]):
        """Frames for fresh pages of a prefill that has those pages: what is written to them needs no copy."""
        fresh, pages = what
        residency, blocks = self.pool.residency, len(fresh) * self.pool.head_num
        self.idle.make_room(blocks, pages)
        arriving = torch.zeros_like(residency.frame_of, dtype=torch.bool).index_fill_(1, fresh, True)
        arriving[:, 0] = False  # padding and SGLang's dummy batches have page 0
        moves = residency.reserve(arriving & (residency.frame_of == -1), blocks)
        try:
            residency.admit(moves)
        except BaseException:
            residency.cancel(moves)
            raise

    def settle(self):
        """Apply the waiting reports: a page that nobody has holds no frames."""
        self._take_turns()
        if not self._freed:
            return
        if self._freed[0].is_cuda:
            # Made on the scheduler's stream, read on this one: their memory must not be reused meanwhile.
            for pages in self._freed:
                pages.record_stream(torch.cuda.current_stream())
        pages = torch.cat(self._freed).long()
        self._freed.clear()
        self._changed = True  # a request that goes on may have got others for them, with what the radix tree had
        self.pool.forget_pages(pages)
        if self.pool.canary is not None:
            self.pool.canary.settle()

    def clear(self):
        """All pages were freed at once (flush_cache)."""
        self._freed.clear()
        self._turns.clear()
        self._changed = True
        self.pool.clear()  # what is on its way will not be admitted
        if self.pool.canary is not None:
            self.pool.canary.clear()

    def begin_decode(self, make_batch: Callable[[], Batch], lens: torch.Tensor | None = None):
        """Call before a decode step's first layer.

        Args:
            make_batch: gives the step's Batch; called only if blocks are exchanged
            lens: `[batch]` tokens of each request on the CPU, the new one included, where blocks move beside the step
        """
        self.settle()
        self.attended.settle()
        if self.pool.canary is not None and self.lane is None:  # a look would wait for a GPU
            self.pool.canary.look()
        self._steps += 1
        self.counts["decode_steps"] += 1
        self._fade()
        self._finish_copies()
        self._fits = lens is not None and not self.expecting and self._all_fit(lens)
        periodic = self._steps % self.config.exchange_interval == 0
        self._due |= self._changed or self._random is not None or (periodic and (self._failed or not self._fits))
        self._due |= self._fits and bool((lens % PAGE_TOKENS == 1).any())  # a request starts a page
        make_batch = cache(make_batch)
        if self.working_sets is not None and periodic:
            recent = self.weight * DECAY**STEPS * ROUNDING
            rests = self.gpu is not None and self.gpu.step.rests
            frame_of = self.pool.residency.frame_of if rests else None
            self.working_sets.measure(self.pool.importance, make_batch(), recent, self.attended.counts, frame_of)
        if self._due and not (self.lane and self.lane.busy):
            self._due = self._changed = False
            self._move(self._exchange, make_batch)

    def _finish_copies(self):
        """Admit what was copied beside the forward pass, if all of it was."""
        if self.lane is not None:
            self._due |= self.lane.finish()

    def _all_fit(self, lens: torch.Tensor) -> bool:
        """Whether there are frames for all blocks of these requests, those that several share counted for each.

        Then exchanges go on until all are there, and a new page has one of its own: no periodic one, and no swap, is
        needed.
        """
        return int(pages_of(lens).sum()) * self.pool.head_num <= self.pool.frame_count

    def swap(self, tables):
        """Let blocks that matter more now take others' frames, beside the step; call after `begin_decode` on a GPU.

        Args:
            tables: the step's page table, without padding
        """
        if self.lane is not None and not self.lane.busy and self._random is None and not self._fits:
            self._move(self.swap_now, tables)

    def swap_now(self, tables):
        """As `swap`, at any time. Raises what went wrong."""
        pool, pairs = self.pool, len(tables.pages) * self.pool.head_num
        bound = self._blocks(self.lane.swap_bytes)
        most = max(bound // pairs, 1)
        newest, others = swap_blocks(self._ranking, pool.residency, pool.importance, tables, most, LEAST * self.weight)
        try:
            pool.fill(newest)  # the step writes to these pages: they move in its order, before it
            pool.residency.admit(newest)
        except BaseException:
            pool.residency.cancel(newest)
            pool.residency.cancel(others)
            raise
        self.lane.start(others, short=most * pairs <= bound)

    def record(self, layer: int, batch: Batch, log_scores: torch.Tensor, chosen: torch.Tensor | None = None):
        """Add gate scores, and what was selected, both `[batch, kv_heads, max_pages]`, to a layer's importance."""
        importance, weight = self.pool.importance[layer], self.weight
        record(log_scores, chosen, importance, batch.pages, batch.n_pages, weight, self.pool.threads)

    def forget(self, layer: int, pages: torch.Tensor, shared: torch.Tensor):
        """Importance that a chunk of a prompt finds in a layer: of earlier chunks nothing stays, its own last query
        counts. Of what others decode with, they know better.

        Args:
            pages: `[n]` int64, the prompt's; shared: `[n]` bool, those that prefilled requests have
        """
        importance = self.pool.importance[layer]
        importance.index_copy_(0, pages, importance[pages] * shared[:, None])

    def _fade(self):
        self.weight /= DECAY
        if self.weight > MOST_WEIGHT:
            self.pool.importance /= self.weight
            self.weight = 1.0

    def _take_turns(self):
        importance = self.pool.importance
        for kept, begins in self._turns:
            pages = kept.pages
            if pages.is_cuda:
                pages.record_stream(torch.cuda.current_stream())
            if begins:
                kept.importance = importance[:, pages] / self.weight
            elif kept.importance is not None:
                now = kept.now
                if now.is_cuda:
                    now.record_stream(torch.cuda.current_stream())
                was = kept.importance * self.weight * (now == pages)[:, None]
                # Pages that it shares with requests that went on may matter more by now.
                importance.index_copy_(1, now, torch.maximum(importance[:, now], was))
        self._turns.clear()

    def _move(self, move: Callable, argument):
        """Exchange, swap or receive, or go on without: all is in the host store, so what fails costs speed only."""
        try:
            move(argument)
            self._failed = False
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors among them
            self._failed = True
            self.counts["exchanges_failed"] += 1
            if self._steps >= self._warns_at:
                self._warns_at = self._steps + WARN_STEPS
                logger.warning(
                    "RheoServe: an exchange failed, the %d. so far; its blocks are attended to in host memory: %s",
                    self.counts["exchanges_failed"],
                    error,
                )

    def _exchange(self, make_batch: Callable[[], Batch]):
        pool, batch = self.pool, make_batch()
        rows = batch.beside(self.coming(), self.config.sink_pages, self.config.window_pages)
        wanted = self.idle.keep(self._wanted(rows), rows.pages)
        self.counts["exchanges"] += 1
        if self.lane is None:
            return pool.exchange(wanted, self._most)
        arriving = pool.let_go(wanted)
        # The newest pages are written by every step, those of a request that joins as soon as it does: they move in the
        # step's order, before it. A copy beside it would be admitted without what was written meanwhile.
        ends = rows.pages.gather(1, rows.n_pages[:, None].long() - 1)[:, 0]
        newest = torch.zeros(pool.host.pages, dtype=torch.bool, device=ends.device).index_fill_(0, ends, True)
        pool.load(arriving & newest[:, None], len(ends) * pool.head_num)
        others = arriving & ~newest[:, None]
        more = (others.flatten(1).sum(1) > self._most).any()
        self.lane.start(pool.residency.reserve(others, self._most), more)

    def _wanted(self, rows) -> torch.Tensor:
        """The blocks of these requests that should be resident; `[layers, all_pages, kv_heads]` bool."""
        pool = self.pool
        capacity = pool.frame_count // pool.head_num
        shares = equal_shares(rows.n_pages, capacity)
        # By a threshold heads select from few to many blocks; by a budget each as many as the others (docs/LOG.md).
        joint = self.config.threshold is not None
        some, wanted = layers_at_once(rows.pages, pool.head_num, RANKED_AT_ONCE), []
        for importance, frame_of in zip(pool.importance.split(some), pool.residency.frame_of.split(some), strict=True):
            worth = rank_blocks(
                importance,
                frame_of >= 0,
                rows.pages,
                rows.valid,
                rows.forced,
                ranks_by=self._ranking.ranks_by,
                forced_only=self._ranking.forced_only,
                # Where blocks swap at every step an exchange shares frames out, fills them and moves nothing in vain.
                least=LEAST * self.weight if self.lane is not None else 0.0,
            )
            if self._random is not None:
                worth = self._shuffle(worth)
            wanted.append(wanted_blocks(worth, rows.pages, shares, pool.host.pages, capacity, joint))
        return torch.cat(wanted)

    def _blocks(self, amount: int) -> int:
        """Blocks of each layer in so many bytes of all."""
        return max(amount // (self.pool.layer_num * self.pool.block_bytes), 1)

    def _shuffle(self, worth: torch.Tensor) -> torch.Tensor:
        """A random order, with a random half of the blocks shut out."""
        noise = torch.rand(worth.shape, generator=self._random).to(worth.device)
        return noise.masked_fill((noise < 0.5) | torch.isneginf(worth), -torch.inf)

    def stats(self, free_pages: int) -> dict:
        """Counts for `/server_info`.

        Args:
            free_pages: pages free in the allocator
        """
        pool = self.pool
        if pool.importance.is_cuda:
            torch.cuda.synchronize()  # a batch may be in flight on SGLang's forward stream
        self.settle()
        blocks = self.attended.totals()
        self._finish_copies()
        used, moved = pool.residency.used, int(pool.moved)
        frames = pool.frame_count * pool.layer_num
        host_pages = pool.host.pages - 1
        live = (host_pages - free_pages) * pool.layer_num * pool.head_num
        attended = blocks["device_blocks"] + blocks["host_blocks"]
        return {
            "frames_used": used,
            "frames_free": frames - used,
            "host_pages_used": host_pages - free_pages,
            "host_pages_free": free_pages,
            "page_tokens": PAGE_TOKENS,
            "resident_fraction": used / live if live else 0.0,
            "host_attention_share": blocks["host_blocks"] / attended if attended else 0.0,
            "exchanged_blocks": moved,
            "exchanged_bytes": moved * pool.block_bytes,
            **self.counts,
            **self.load,
            **blocks,
            **(self.seconds if self.gpu is None else self.gpu.times()),
        }
