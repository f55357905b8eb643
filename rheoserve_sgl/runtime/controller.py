"""The runtime controller: turns between prefill and decode, and who decodes.

SGLang prefills whatever waits before it decodes again, and decodes all that was prefilled. With a host store many more
requests can be prefilled than should decode at once, and long prompts would hold up those that do. So decode steps are
run between the batches of a prefill, and of the prefilled requests those decode whose working sets fit the frames.
"""

import logging
import math
from functools import reduce

import torch

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.coordinator.coordinator import LONG_PREFILL
from rheoserve_sgl.coordinator.working_set import UNKNOWN
from rheoserve_sgl.runtime.admission import Admission, Candidate
from rheoserve_sgl.runtime.latency_model import StepLoad
from rheoserve_sgl.runtime.pace import FILLED, LEAST_CHUNK, Pace
from rheoserve_sgl.runtime.ranks import largest
from rheoserve_sgl.runtime.slots import Slots
from rheoserve_sgl.runtime.step_clock import TIMED_STEPS, StepClock
from rheoserve_sgl.runtime.transaction import Transaction, logical_pages

logger = logging.getLogger(__name__)
LEARNING_STEPS = 16  # of a request: until then its working set is guessed
GUESS = 1.25  # of what it may select
NOBODY = (0, 0, 0)  # requests, their pages, those that each KV head selects
FEW = 8  # those that decode are so many times those that joined them, or the window tells nothing of misses
RISE = 0.02  # of the share that is taken for missed, in a window in which requests joined
# Decode steps of others from when a request has its room until it joins them, unless a prefill goes between: an
# exchange that brings its blocks takes up to 40 ms.
LOAD_STEPS = 4


class Controller:
    """One scheduler's; all ranks of a tensor-parallel group decide alike.

    Args:
        scheduler: SGLang's Scheduler
        pool: its TwoTierKVPool
    """

    current: "Controller | None" = None  # of this process

    def __init__(self, scheduler, pool: TwoTierKVPool):
        config = pool.config
        self.scheduler, self._pool, self._config = scheduler, pool, config
        self._coordinator = pool.coordinator
        chunk = scheduler.chunked_prefill_size
        self.slots = Slots()
        # (On a CPU a batch has run when it is launched, whatever the schedule.)
        overlap = scheduler.enable_overlap and pool.importance.is_cuda
        self.clock = StepClock(overlap, least=min(chunk or LEAST_CHUNK, LEAST_CHUNK))
        self.admission = None
        # Where SGLang prepares batches for several ranks' experts at once, the whole batch is what it prepares.
        if config.admits(on_gpu=pool.importance.is_cuda) and not (
            scheduler.is_mixed_chunk or scheduler.require_mlp_sync
        ):
            capacity = pool.frame_count // pool.head_num
            self.admission = Admission(capacity, config.most_missed, config.join_group, config.join_patience)
        if config.tpot_slo_ms is not None and self.admission is None:
            logger.warning(
                "RheoServe: --rheoserve-tpot-slo-ms limits how many decode only with admission, which is off here: it "
                "takes all of --rheoserve-mode balanced, no --enable-mixed-chunk, and --rheoserve-admission on (auto "
                "is off on a CPU)"
            )
        if config.tpot_slo_ms is not None and not config.decode_interleave:
            logger.warning(
                "RheoServe: --rheoserve-tpot-slo-ms does not pace others' prompts with --rheoserve-decode-interleave 0"
            )
        self._coordinator.idle.held = self._held_pages
        self._coordinator.coming = lambda: [
            logical_pages(self.scheduler, one) for one in self._coming if one.req_pool_idx is not None
        ]
        objective = None if config.tpot_slo_ms is None else config.tpot_slo_ms / 1000
        # Mixed batches decode while they prefill.
        between = 0 if scheduler.is_mixed_chunk else config.decode_interleave
        self.pace = Pace(between, chunk, objective, gpu=pool.importance.is_cuda)
        self._prefills, self._waited = 0, self.clock.waited  # of the clock's, those that the pace knows
        self.beside = False  # whether others decode, which the prefill that was made ready last holds up
        self._measured = 0  # of the working sets' measurements, those taken in
        self._counts = (0.0, 0.0)  # blocks visited and selected, at the last measurement
        self._missed = 0.0  # share of the selection, since then
        self._decoding: list = []
        self._load_steps = 1 if self._coordinator.lane is None else LOAD_STEPS  # without a lane blocks come at once
        self._coming: list = []  # requests that have their room, and join when their blocks had time to come
        self._ages = 0  # requests that were prefilled so far: the age of the next
        # Since the last measurement: how many joined those that decode, whether any joined or left, the most at once.
        self._joined, self._changed, self._most = math.inf, True, 0
        self._predicted = 0.0  # seconds of a step of those that decode
        self._always = config.always_tokens // pool.page_size  # pages that each KV head selects of any request

    @classmethod
    def of(cls, scheduler) -> "Controller | None":
        """The scheduler's controller, made at first sight; None where another KV pool serves."""
        if not hasattr(scheduler, "rheoserve_controller"):
            pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
            cls.current = cls(scheduler, pool) if isinstance(pool, TwoTierKVPool) else None
            scheduler.rheoserve_controller = cls.current
        return scheduler.rheoserve_controller

    def chunked_prompt(self):
        """SGLang's Req whose prefill is under way, if there is one."""
        return self.scheduler.chunked_req

    def owes_decode(self, batch) -> bool:
        """Whether the running batch decodes before a prefill goes on."""
        if self.clock.prefills != self._prefills:
            self._learn_waits()
        if not self.pace.waits or not decodes(batch):
            return False
        if not self._leaves_room(batch):
            self.pace.go()
        return self.pace.waits

    def _leaves_room(self, batch) -> bool:
        """Whether a chunked prompt still fits after a step of the running batch.

        SGLang takes one in when all of it fits, and fails if others have used its room before the last chunk.
        """
        scheduler, page = self.scheduler, self._pool.page_size
        prompt = scheduler.chunked_req
        if prompt is None:
            return True
        left = len(prompt.full_untruncated_fill_ids) - len(prompt.prefix_indices)
        free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
        return free - left >= page + batch.new_tokens_required_next_decode()

    def _learn_waits(self):
        """Tell the pace for how long those that decode waited for their tokens since the last call."""
        clock = self.clock
        if not self.pace.learns:
            return
        since = [now - then for now, then in zip(clock.waited, self._waited, strict=True)]
        self._prefills, self._waited = clock.prefills, clock.waited
        took = [*since, clock.chunk_seconds, clock.chunk_tokens]
        if self.scheduler.ps.tp_size > 1:  # they come here at the same iteration
            took = largest(took, self.scheduler.tp_cpu_group)
        self.pace.learn(*took)

    def room(self, batch, most: int) -> int | None:
        """Requests that may be in the next batch of a prefill: those that the objective would let decode beside what
        was prefilled or is being; None: any. Rather a first token comes late than that its request waits for another.

        Args:
            batch: the running batch
            most: new ones, whatever the objective
        """
        if self._config.tpot_slo_ms is None or self.admission is None:
            return None
        scheduler, begun = self.scheduler, self.scheduler.chunked_req
        if most > 1 and len(scheduler.waiting_queue) > 1:
            scheduler.policy.calc_priority(scheduler.waiting_queue, batch)  # who comes first
        known = [one for one in (*batch.reqs, begun) if one is not None and not one.finished()]
        load = reduce(self._with, known, NOBODY)
        for count, request in enumerate(scheduler.waiting_queue[: max(most, 0)]):
            load = self._with(load, request)
            if (known or count) and not self._keeps(load, FILLED):
                return count + (begun is not None)
        return None

    def prefilled(self, tokens: int, beside: bool):
        """A batch of a prefill of so many tokens is about to run.

        Args:
            beside: whether others decode, which it holds up
        """
        self.beside = beside
        if not beside:
            self._rest_pace()
        self.pace.held()
        if tokens >= LONG_PREFILL:  # meanwhile their blocks come
            for request in self._coming:
                Transaction.of(request).coming = self._load_steps

    def _rest_pace(self):
        self.pace.rest()
        self.clock.rest()
        self._waited = self.clock.waited

    def rest(self):
        """The last request has ended."""
        self._decoding, self._joined, self._changed = [], math.inf, True
        self._rest_pace()
        self._expect([])
        self._coordinator.load |= {"transactions_decoding": 0, "transactions_waiting": 0, "working_set_pages": 0.0}

    def prepare(self, batch):
        """Make a decode step of some or all requests of the running batch ready, instead of `prepare_for_decode`."""
        self._learn()
        known = [Transaction.of(request) for request in batch.reqs]
        for request, one in zip(batch.reqs, known, strict=True):
            one.limit = self._pool.limits.of(request.req_pool_idx)
            one.need = min(one.measured or max(GUESS * one.limit, self._always), self._pages(request))
        rows, coming = list(range(len(known))), []
        if self.admission is not None:
            rows, coming = self._choose(batch, known)
        if len(rows) == len(known):
            self.slots.prepare_whole(batch, self.scheduler.last_batch)
        else:
            self.slots.prepare(batch, rows, self.scheduler.last_batch)
        self._mark(batch.reqs, known, rows)
        self.pace.stepped(self._predict(batch.reqs, rows) if self.pace.learns else 0.0)
        self._expect([batch.reqs[row] for row in coming])

    def _choose(self, batch, known: list[Transaction]) -> tuple[list[int], list[int]]:
        """The rows that decode, and those that have their room and join soon."""
        requests = batch.reqs
        for one in known:
            if one.age is None:
                one.age, self._ages = self._ages, self._ages + 1
        # What was retracted comes back as the last row.
        order = sorted(range(len(known)), key=lambda row: (self._urgency(requests[row]), known[row].age))
        by_age = [requests[row] for row in order]
        pool, scheduler = self._pool, self.scheduler
        # Where there are frames for all of them nothing is to be loaded.
        fit = sum(map(self._pages, requests)) * pool.head_num <= pool.frame_count
        candidates = [
            Candidate(
                known[row].need,
                decodes=known[row].state == "decoding",
                ends=requests[row].to_finish is not None,
                loaded=fit or known[row].coming >= self._load_steps,
            )
            for row in order
        ]
        more_coming = scheduler.chunked_req is not None or (bool(scheduler.waiting_queue) and self.room(batch, 1) != 0)
        chosen = self.admission.choose(candidates, more_coming, self._objective(by_age))
        return tuple(sorted(order[place] for place in places) for places in (chosen, self.admission.coming))

    def _urgency(self, request) -> int:
        """Smaller goes first, as SGLang has it for prefill."""
        args = self.scheduler.server_args
        if not args.enable_priority_scheduling or request.priority is None:
            return 0
        return request.priority if args.schedule_low_priority_values_first else -request.priority

    def _objective(self, requests):
        """Tells, by its row, whether one more is allowed: whether a step of it and all that were allowed before is
        predicted to leave time for chunks, or, if it decodes already, to take no longer than it may. The first is."""
        allowed = NOBODY

        def allows(row: int) -> bool:
            nonlocal allowed
            if self._config.tpot_slo_ms is None:
                return True
            more = self._with(allowed, requests[row])
            decodes = Transaction.of(requests[row]).state == "decoding"
            if allowed[0] and not self._keeps(more, 1.0 if decodes else FILLED):
                return False
            allowed = more
            return True

        return allows

    def _predict(self, requests, rows: list[int]) -> float:
        """Seconds of a step of these rows."""
        load = reduce(self._with, (requests[row] for row in rows), NOBODY)
        return self._coordinator.latency.predict(self._load(*load))

    def _with(self, load: tuple[int, int, int], request) -> tuple[int, int, int]:
        """One more than in `load`: see NOBODY."""
        requests, pages, selected = load
        own = self._pages(request)
        return requests + 1, pages + own, selected + min(max(self._pool.limits.of_request(request), self._always), own)

    def _keeps(self, load: tuple[int, int, int], share: float) -> bool:
        """Whether a step of these is predicted to take no more than this share of the objective."""
        return 1000 * self._coordinator.latency.predict(self._load(*load)) <= share * self._config.tpot_slo_ms

    def _pages(self, request) -> int:
        tokens = len(request.origin_input_ids) + len(request.output_ids)
        return -(-tokens // self._pool.page_size)

    def _load(self, requests: int, pages: int, selected: int) -> StepLoad:
        """What a step reads, while as much is missed as lately.

        Args:
            pages: of all the requests
            selected: of those, by each KV head
        """
        pool = self._pool
        blocks = pool.layer_num * pool.head_num
        resident = min(selected if self._config.attends_selected_only else pages, pool.frame_count // pool.head_num)
        return StepLoad(
            requests=requests,
            resident=resident * blocks * pool.block_bytes,
            scored=pages * blocks * pool.quick.block_bytes if self._config.selects else 0,
            visited=self._missed * selected * blocks * pool.block_bytes,
        )

    def _learn(self):
        """Take in what was measured last, if it is new."""
        sets = self._coordinator.working_sets
        if sets.measured == self._measured:
            return
        ranks = self.scheduler.ps.tp_size
        found = sets.read(wait=ranks > 1)
        if found is None:
            return
        self._measured = sets.measured
        clock = self.clock
        found = [*found, clock.step_seconds if clock.steps >= TIMED_STEPS else 0.0]
        if ranks > 1:  # each has other KV heads; they come here at the same step
            found = largest(found, self.scheduler.tp_cpu_group)
        *needs, visited, selected, step = found
        for request in self._decoding:
            one = Transaction.of(request)
            slot = request.req_pool_idx
            if one.steps >= LEARNING_STEPS and slot is not None and needs[slot] != UNKNOWN:
                one.learn(needs[slot])
        before, self._counts = self._counts, (visited, selected)
        if selected > before[1]:
            missed = (visited - before[0]) / (selected - before[1])
            # Those that have just joined miss much for some steps, and would be sent away for it.
            steady = FEW * self._joined <= self._most
            self._missed = missed if steady else min(self._missed + RISE, missed)
            if self.admission is not None:
                self.admission.observe(missed, self._most, steady)
            if step and not self._changed:
                self._learn_time(step)
        self._joined, self._changed, self._most = 0, False, len(self._decoding)
        clock.restart()

    def _learn_time(self, step: float):
        latency = self._coordinator.latency
        if self._predicted:
            self._coordinator.load |= {"predicted_step_seconds": self._predicted, "measured_step_seconds": step}
        load = self._load(*reduce(self._with, self._decoding, NOBODY))
        latency.observe(load, step)
        self._predicted = latency.predict(load)

    def _held_pages(self) -> torch.Tensor:
        """Logical pages, int64, of the requests that decode or wait to."""
        requests = self.scheduler.running_batch.reqs
        live = [one for one in requests if one.req_pool_idx is not None and not one.finished()]
        none = torch.zeros(0, dtype=torch.int64, device=self._pool.device)
        return torch.cat([none, *(logical_pages(self.scheduler, one) for one in live)])

    def _turn(self, request, one: Transaction):
        """Tell the coordinator of a request that begins to wait, or ceases to."""
        if (one.state == "waiting") == (one.kept is not None):
            return
        if one.kept is None:
            one.kept = self._coordinator.begins_to_wait(logical_pages(self.scheduler, request))
        else:
            self._restore(request, one)
            one.kept = None

    def _restore(self, request, one: Transaction):
        """Its blocks matter again as when it began to wait."""
        # (The page that its next step begins was not there then.)
        self._coordinator.ends_to_wait(one.kept, logical_pages(self.scheduler, request)[: len(one.kept.pages)])

    def _expect(self, coming: list):
        """What matters of these comes into frames while others decode, so that they find it there when they join."""
        for request in coming:
            one = Transaction.of(request)
            if request not in self._coming:
                self._restore(request, one)
            one.coming += 1
        if coming != self._coming:
            self._coordinator.batch_changed()
        self._coming, self._coordinator.expecting = coming, bool(coming)

    def _mark(self, requests, known, rows: list[int]):
        """Enter the new states, and let the coordinator share frames out anew if others decode than before."""
        chosen, load = set(rows), self._coordinator.load
        for row, one in enumerate(known):
            pauses, seconds = one.enter("decoding" if row in chosen else "waiting")
            load["pauses"] += pauses
            load["waited_seconds"] += seconds
            self._turn(requests[row], one)
            if row in chosen:
                one.steps, one.coming = one.steps + 1, 0
        now = [requests[row] for row in rows]
        if now != self._decoding:
            # (An aborted request has one step to end in: it misses nothing.)
            new = sum(request.to_finish is None for request in set(now) - set(self._decoding))
            self._joined += new
            if now and new:
                self._learn_waits()  # before what those that decoded have saved is divided
                self.pace.joined(new, len(now))
            self._changed, self._most = True, max(self._most, len(now))
            # Held against the first window that nobody joins or leaves: of these together none was seen before.
            self._decoding, self._predicted = now, self._predict(requests, rows) if rows else 0.0
            self.clock.restart()
            self._coordinator.batch_changed()
        load |= {
            "transactions_decoding": len(now),
            "transactions_waiting": len(known) - len(now),
            "working_set_pages": round(sum(known[row].need for row in rows), 1),
        }


def decodes(batch) -> bool:
    """Whether SGLang's running batch has requests that a prefill would hold up."""
    return not batch.is_prefill_only and any(not one.finished() for one in batch.reqs)
