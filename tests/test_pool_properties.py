"""What must always hold (docs/how-it-works.md), under random sequences of what a server does to the pool.

Each rule is one kind of event: prefill, decode, exchange, radix dedup of identical pages, release with or
without the radix tree keeping pages, eviction, flush. A shadow copy holds what was written.
"""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pools import DIM, HEADS, LAYERS, SlowLane, make_pool, refresh_keys

from rheoserve_sgl.cache.residency import ARRIVING, ON_ITS_WAY, RESERVED
from rheoserve_sgl.runtime.batch import Batch

TOKENS, DEVICE_TOKENS, CONTEXT, SLOTS = 64 * 24, 64 * 6, 64 * 10, 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class PoolMachine(RuleBasedStateMachine):
    device = "cpu"

    @initialize(
        mode=st.sampled_from(["balanced", "full", "window", "retrieval"]),
        seed=st.integers(0, 2**31),
        slow=st.booleans(),
    )
    def start(self, mode, seed, slow):
        self.pool, self.allocator = make_pool(
            TOKENS,
            DEVICE_TOKENS,
            self.device,
            mode=mode,
            window_tokens=64,
            token_budget=256,
            exchange_interval=2,
            canary="raise",
        )
        self.pool.coordinator.idle.held = self.held
        if slow and self.device == "cpu":
            self.pool.coordinator.lane = SlowLane(self.pool)
        self.random = torch.Generator().manual_seed(seed)
        self.table = torch.zeros(SLOTS, CONTEXT, dtype=torch.int32, device=self.device)
        self.lens = {}  # slot -> tokens
        self.tree = set()  # pages that the radix tree holds
        self.shadow = {}  # (layer, page) -> [HEADS, 2, 64, DIM]
        self.filled = {}  # page -> valid tokens
        self.failed = 0  # exchanges and swaps that were made to fail

    def held(self):
        """Pages of all requests, as the runtime controller gives them."""
        return self.tensor([page for slot, n in self.lens.items() for page in self.pages(slot, (n + 63) // 64)])

    def tensor(self, values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype, device=self.device)

    def store(self, loc):
        """Write random K and V at these locations in every layer, and remember them."""
        for layer in range(LAYERS):
            kv = torch.randn(2, len(loc), HEADS, DIM, generator=self.random)
            k, v = kv.to(self.device)
            self.pool.write(layer, loc, k, v)
            for i, at in enumerate(loc.tolist()):
                page, offset = divmod(at, 64)
                block = self.shadow.setdefault((layer, page), torch.zeros(HEADS, 2, 64, DIM))
                block[:, 0, offset], block[:, 1, offset] = kv[0, i], kv[1, i]
                self.filled[page] = max(self.filled.get(page, 0), offset + 1)
        pages = loc.div(64, rounding_mode="floor").unique()
        filled = self.tensor([self.filled[page] for page in pages.tolist()])
        for layer in range(LAYERS):
            refresh_keys(self.pool, layer, pages, filled)

    def batch(self, slots=None):
        slots = slots or sorted(self.lens)
        lens = self.tensor([self.lens[slot] for slot in slots])
        config = self.pool.config
        return Batch.build(
            self.table, self.tensor(slots), lens, int(lens.max()), config.sink_pages, config.window_pages
        )

    def forget(self, pages):
        for page in pages:
            self.filled.pop(page, None)
            for layer in range(LAYERS):
                self.shadow.pop((layer, page), None)

    @precondition(lambda self: len(self.lens) < SLOTS)
    @rule(new=st.integers(1, 200), data=st.data())
    def prefill(self, new, data):
        """A request arrives, perhaps with a cached prefix of another one's full pages."""
        slot = min(set(range(SLOTS)) - set(self.lens))
        prefix = 0
        others = [s for s, n in self.lens.items() if n >= 64 and set(self.pages(s, n // 64)) <= self.tree]
        if others:
            other = data.draw(st.sampled_from([None, *sorted(others)]))
            if other is not None:
                prefix = self.lens[other] // 64 * 64
                self.table[slot, :prefix] = self.table[other, :prefix]
        total = min(prefix + new, CONTEXT)
        if total == prefix:
            return
        last = self.table[slot, prefix - 1 : prefix].long() if prefix else self.tensor([-1])
        before, after = self.tensor([prefix]), self.tensor([total])
        loc = self.allocator.alloc_extend(before, before.cpu(), after, after.cpu(), last, total - prefix)
        if loc is None:
            return
        self.table[slot, prefix:total] = loc.to(torch.int32)
        self.lens[slot] = total
        pages = self.tensor(self.pages(slot, (total + 63) // 64))
        self.pool.coordinator.begin_extend(pages, pages[prefix // 64 :])
        self.store(loc)

    @precondition(lambda self: self.lens)
    @rule(coming=st.sets(st.integers(0, SLOTS - 1)))
    def decode(self, coming=()):
        """Some requests wait, and join soon; the others decode."""
        coming = [slot for slot in coming if slot in self.lens]
        self.pool.coordinator.coming = lambda: [
            self.tensor(self.pages(slot, (self.lens[slot] + 63) // 64)) for slot in coming
        ]
        slots = sorted(s for s in self.lens if self.lens[s] < CONTEXT and s not in coming)
        if not slots:
            return
        lens = self.tensor([self.lens[s] + 1 for s in slots])
        last = torch.stack([self.table[s, self.lens[s] - 1] for s in slots]).long()
        loc = self.allocator.alloc_decode(lens, lens.cpu(), last)
        if loc is None:
            return
        for slot, at in zip(slots, loc.tolist(), strict=True):
            self.table[slot, self.lens[slot]] = at
            self.lens[slot] += 1
        batch = self.batch(slots)
        self.pool.coordinator.begin_decode(lambda: batch)
        self.pool.coordinator.swap(batch)
        self.store(loc)
        for layer in range(LAYERS):
            scores = torch.randn(len(batch.pages), HEADS, batch.pages.shape[1], generator=self.random).to(self.device)
            self.pool.coordinator.record(layer, batch, scores.masked_fill(~batch.valid[:, None], -torch.inf))

    @precondition(lambda self: self.lens)
    @rule(share=st.floats(0, 1))
    def exchange_at_random(self, share):
        """Any choice among the running requests' blocks is legal."""
        wanted = torch.rand(self.pool.residency.frame_of.shape, generator=self.random) < share
        running = torch.zeros(self.pool.host.pages, dtype=torch.bool)
        running[self.batch().pages[self.batch().valid].cpu()] = True
        coordinator = self.pool.coordinator
        coordinator.settle()
        if coordinator.lane is not None:
            coordinator.lane.finish()
            if coordinator.lane.busy:
                return
        self.pool.exchange((wanted & running[None, :, None]).to(self.device), 10**6)

    @precondition(lambda self: self.lens)
    @rule(aside=st.booleans(), copied=st.booleans())
    def copies_fail(self, aside, copied):
        """Those before a step, or those beside it; what was copied by then is forgotten."""
        pool, coordinator = self.pool, self.pool.coordinator
        fill, lane, failed = pool.fill, coordinator.lane, coordinator.counts["exchanges_failed"]
        aside = aside and lane is not None

        def failing(moves, beside=False):
            if copied or beside != aside:
                fill(moves, beside)
            if beside == aside:
                raise RuntimeError("no memory")

        if aside and isinstance(lane, SlowLane):
            lane.fails = True  # copies later than it is asked to
        else:
            pool.fill = failing
        coordinator.batch_changed()
        self.decode()
        pool.fill = fill
        if isinstance(lane, SlowLane):
            lane.fails = False
        self.failed += coordinator.counts["exchanges_failed"] - failed

    @rule(seen=st.booleans())
    def blocks_arrive(self, seen):
        """Copies beside the forward pass come to their end, at any time, and that is seen then or later."""
        lane = self.pool.coordinator.lane
        if isinstance(lane, SlowLane):
            lane.copy()
            lane.unseen = not seen

    @precondition(lambda self: self.lens)
    @rule(data=st.data())
    def insert_into_tree(self, data):
        """The radix tree takes a request's full pages; they outlive it."""
        slot = data.draw(st.sampled_from(sorted(self.lens)))
        self.tree |= set(self.pages(slot, self.lens[slot] // 64))

    @precondition(lambda self: any(n >= 64 for n in self.lens.values()))
    @rule(data=st.data())
    def dedup(self, data):
        """The tree already had a page with this content: the request gets the tree's, its own is freed."""
        slot = data.draw(st.sampled_from(sorted(s for s, n in self.lens.items() if n >= 64)))
        at = data.draw(st.integers(0, self.lens[slot] // 64 - 1))
        old = self.pages(slot, self.lens[slot] // 64)[at]
        if old in self.tree or self.used_by(old) != {slot}:
            return
        fresh = self.allocator.alloc(64)
        if fresh is None:
            return
        self.pool.coordinator.settle()
        new = int(fresh[0]) // 64
        for layer in range(LAYERS):
            content = self.shadow[layer, old].to(self.device)
            self.pool.write(
                layer,
                fresh,
                content[:, 0].transpose(0, 1).contiguous(),
                content[:, 1].transpose(0, 1).contiguous(),
            )
            self.shadow[layer, new] = self.shadow[layer, old]
        self.filled[new] = 64
        self.table[slot, at * 64 : at * 64 + 64] = fresh.to(torch.int32)
        self.tree.add(new)
        self.allocator.free(self.tensor([old * 64 + i for i in range(64)]))
        self.forget([old])

    @precondition(lambda self: self.lens)
    @rule(data=st.data(), keep=st.booleans())
    def leave(self, data, keep):
        """Finish, abort or retraction: pages go back unless the tree, or another request, has them."""
        slot = data.draw(st.sampled_from(sorted(self.lens)))
        length = self.lens.pop(slot)
        pages = self.pages(slot, (length + 63) // 64)
        if keep:
            self.tree |= set(pages[: length // 64])
        self.pool.coordinator.batch_changed()
        dead = [page for page in pages if page not in self.tree and not self.used_by(page)]
        self.release(dead)

    @precondition(lambda self: self.tree)
    @rule()
    def evict(self):
        idle = [page for page in self.tree if not self.used_by(page)]
        self.tree -= set(idle)
        self.release(idle)

    @precondition(lambda self: not self.lens)
    @rule()
    def flush(self):
        self.allocator.clear()
        self.tree.clear()
        self.forget(list(self.filled))

    def release(self, pages):
        if pages:
            self.allocator.free(torch.cat([self.tensor(range(page * 64, page * 64 + 64)) for page in pages]))
        self.forget(pages)

    def pages(self, slot, count):
        return (self.table[slot, : count * 64 : 64] // 64).tolist()

    def used_by(self, page):
        return {slot for slot, n in self.lens.items() if page in self.pages(slot, (n + 63) // 64)}

    @invariant()
    def holds(self):
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        lane = pool.coordinator.lane
        if isinstance(lane, SlowLane):
            lane.still = True  # looking moves nothing
        stats = pool.coordinator.stats(len(self.allocator.free_pages))
        if isinstance(lane, SlowLane):
            lane.still = False
        assert stats["exchanges_failed"] == self.failed
        live = set(self.filled)
        # Host pages in use + free = all.
        assert stats["host_pages_used"] == len(live)
        assert stats["host_pages_used"] + stats["host_pages_free"] == TOKENS // 64
        assert not live & set(self.allocator.free_pages.tolist())
        # The two maps are inverse to each other, frames in use + free = all, none held by a dead page.
        frame_of, owner = pool.residency.frame_of.cpu(), pool.residency.owner.cpu()
        held = torch.nonzero(frame_of >= 0).tolist()
        assert len(held) == int((owner >= 0).sum()) == stats["frames_used"]
        assert stats["frames_used"] + stats["frames_free"] == LAYERS * HEADS * DEVICE_TOKENS // 64
        # Frames are on their way only while blocks are.
        reserved = torch.nonzero(owner == RESERVED).tolist()
        moves = getattr(lane, "moves", getattr(lane, "_moves", None))
        if moves is None:
            assert not reserved and not (frame_of <= ON_ITS_WAY).any()
        else:
            counts = enumerate(zip(moves.frame.tolist(), moves.count.tolist(), strict=True))
            assert {tuple(place) for place in reserved} <= {(layer, at) for layer, (to, n) in counts for at in to[:n]}
        # A block that says into which frame it is on its way has that frame reserved, and is there once it is copied.
        for layer, page, head in torch.nonzero(frame_of <= ARRIVING).tolist():
            frame, block = ARRIVING - int(frame_of[layer, page, head]), page * HEADS + head
            assert owner[layer, frame] == RESERVED
            at = moves.block[layer, : int(moves.count[layer])].tolist().index(block)
            assert moves.frame[layer, at] == frame
            if getattr(lane, "copied", False):
                whole = slice(None, self.filled[page])
                there = pool.frames.layers[layer][frame, :, whole].cpu()
                assert torch.equal(there, pool.host.layers[layer][page, head, :, whole])
        # Nothing was changed that the canary would find.
        written = torch.nonzero(pool.canary.known.any(1))[:, 0]
        assert set(written.tolist()) <= live
        assert not any(pool.canary.finding(layer, written) for layer in range(LAYERS) if len(written))
        # No frame is held by page 0 or by a page that nobody has.
        for layer, page, head in held:
            assert owner[layer, frame_of[layer, page, head]] == page * HEADS + head
            assert page in live
        # Every live block is in the host store bit for bit, and its frame agrees.
        for (layer, page), block in self.shadow.items():
            filled = self.filled[page]
            stored = pool.host.layers[layer][page]
            assert torch.equal(stored[:, :, :filled], block[:, :, :filled])
            for head in range(HEADS):
                if frame_of[layer, page, head] >= 0:
                    frame = pool.frames.layers[layer][frame_of[layer, page, head]].cpu()
                    assert torch.equal(frame[:, :filled], block[head, :, :filled])
        if not live:
            assert stats["frames_used"] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_invariants(device):
    machine = type("Machine", (PoolMachine,), {"device": device})
    count = 40 if device == "cpu" else 15
    run_state_machine_as_test(machine, settings=settings(max_examples=count, stateful_step_count=30, deadline=None))
