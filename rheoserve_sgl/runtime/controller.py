"""The runtime controller: turns between prefill and decode, and who decodes.

SGLang prefills whatever waits before it decodes again, and decodes all that was prefilled. With a host store many more
requests can be prefilled than should decode at once, and long prompts would hold up those that do. So decode steps are
run between the batches of a prefill, and of the prefilled requests those decode whose working sets fit the frames.
"""

import torch

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.runtime.admission import Admission, Candidate
from rheoserve_sgl.runtime.slots import Slots, divisible
from rheoserve_sgl.runtime.transaction import Transaction

LEARNING_STEPS = 16  # of a request: until then its working set is guessed
GUESS = 1.25  # of what it may select


class Controller:
    """One scheduler's; all ranks of a tensor-parallel group decide alike.

    Args:
        scheduler: SGLang's Scheduler
        pool: its TwoTierKVPool
    """

    def __init__(self, scheduler, pool: TwoTierKVPool):
        self._scheduler, self._pool = scheduler, pool
        self.slots = Slots()
        self.admission = None
        if pool.config.admits(on_gpu=pool.importance.is_cuda) and not scheduler.is_mixed_chunk:
            self.admission = Admission(
                pool.frame_count // pool.head_num,
                pool.config.most_missed,
                pool.config.join_group,
                pool.config.join_patience,
            )
        # Mixed batches decode while they prefill.
        self._between = 0 if scheduler.is_mixed_chunk else pool.config.decode_interleave
        self._owed = 0  # decode steps before the next batch of a prefill
        self._seen = -1  # measurements of the working sets
        self._counts = (0.0, 0.0)
        self._decoding: list = []
        self._steady = False  # whether the same requests decode as at the last measurement
        self._needs: list[float] = []

    @classmethod
    def of(cls, scheduler) -> "Controller | None":
        """The scheduler's controller, made at first sight; None where another KV pool serves."""
        if not hasattr(scheduler, "rheoserve_controller"):
            pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
            scheduler.rheoserve_controller = cls(scheduler, pool) if isinstance(pool, TwoTierKVPool) else None
        return scheduler.rheoserve_controller

    def owes_decode(self, batch) -> bool:
        """Whether the running batch decodes before a prefill goes on."""
        return bool(self._owed) and not batch.is_prefill_only and any(not one.finished() for one in batch.reqs)

    def prefilled(self):
        """A batch of a prefill is about to run."""
        self._owed = self._between

    def prepare(self, batch):
        """Make a decode step of some or all requests of the running batch ready, instead of `prepare_for_decode`."""
        self._owed = max(self._owed - 1, 0)
        known = [Transaction.of(request) for request in batch.reqs]
        rows = list(range(len(known)))
        if self.admission is not None and divisible(batch):
            self._learn()
            rows = self._choose(batch.reqs, known)
        if len(rows) == len(known):
            self.slots.prepare_whole(batch)
        else:
            self.slots.prepare(batch, rows)
        self._mark(batch.reqs, known, set(rows))

    def _choose(self, requests, known) -> list[int]:
        for request, one in zip(requests, known, strict=True):
            one.need = self._need(request)
        candidates = [
            Candidate(one.need, one.state == "decoding", request.to_finish is not None)
            for request, one in zip(requests, known, strict=True)
        ]
        scheduler = self._scheduler
        return self.admission.choose(candidates, bool(scheduler.waiting_queue) or scheduler.chunked_req is not None)

    def _need(self, request) -> float:
        """Pages of frames for each KV head, as measured, or guessed for one that has hardly decoded."""
        tokens = len(request.origin_input_ids) + len(request.output_ids)
        pages = -(-tokens // self._pool.page_size)
        slot = request.req_pool_idx
        if request.decode_batch_idx >= LEARNING_STEPS and self._needs and self._needs[slot]:
            return min(self._needs[slot], pages)
        return min(GUESS * self._pool.limits.of(slot), pages)

    def _learn(self):
        """Take in what was measured last, if it is new."""
        sets = self._pool.coordinator.working_sets
        if sets is None or sets.measured == self._seen:
            return
        ranks = self._scheduler.ps.tp_size
        found = sets.read(wait=ranks > 1)
        if found is None:
            return
        self._seen = sets.measured
        *self._needs, visited, selected = found if ranks == 1 else self._agree(found)
        before, self._counts = self._counts, (visited, selected)
        if self._steady and selected > before[1]:
            self.admission.observe((visited - before[0]) / (selected - before[1]), len(self._decoding))
        self._steady = True

    def _agree(self, values: list[float]) -> list[float]:
        """The largest of all ranks: each has other KV heads. They come here at the same step."""
        shared = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self._scheduler.tp_cpu_group)
        return shared.tolist()

    def _mark(self, requests, known, rows: set[int]):
        """Enter the new states, and let the coordinator share frames out anew if others decode than before."""
        for row, one in enumerate(known):
            one.enter("decoding" if row in rows else "waiting")
        now = [request for row, request in enumerate(requests) if row in rows]
        if now != self._decoding:
            self._decoding, self._steady = now, False
            self._pool.coordinator.batch_changed()
        self._pool.coordinator.load = {
            "transactions_decoding": len(now),
            "transactions_waiting": len(known) - len(now),
            "working_set_pages": round(sum(one.need for row, one in enumerate(known) if row in rows), 1),
        }


def update_running_batch(original, scheduler, batch):
    """AROUND `Scheduler.update_running_batch`: the controller makes the step ready."""
    controller = Controller.of(scheduler)
    if controller is None:
        return original(scheduler, batch)
    # Hides the method for this call only: a mixed batch prepares its decodes itself.
    batch.prepare_for_decode = lambda: controller.prepare(batch)
    try:
        return original(scheduler, batch)
    finally:
        del batch.prepare_for_decode


def get_next_batch_to_run(original, scheduler, *args, **kwargs):
    """AROUND `Scheduler.get_next_batch_to_run`: the part of the running batch that was made ready is what runs."""
    plan = original(scheduler, *args, **kwargs)
    controller = Controller.of(scheduler)
    if controller is not None:
        part = controller.slots.take()
        if part is not None and plan.batch_to_run is plan.running_batch:
            plan.batch_to_run = part
    return plan


def get_new_batch_prefill(original, scheduler, running_batch):
    """AROUND `Scheduler.get_new_batch_prefill`: none while the running batch has steps to decode first."""
    controller = Controller.of(scheduler)
    if controller is None:
        return original(scheduler, running_batch)
    if controller.owes_decode(running_batch):
        from sglang.srt.managers.schedule_batch import NextBatchPlan

        return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
    plan = original(scheduler, running_batch)
    if plan.batch_to_run is not None:
        controller.prefilled()
    return plan


def count_requests_once(original, checker):
    """AROUND `SchedulerInvariantChecker._get_total_uncached_sizes`: a part's requests are the running batch's, too."""
    last, running = checker.get_last_batch(), checker.get_running_batch()
    inside = None not in (last, running) and last is not running and set(last.reqs) <= set(running.reqs)
    if not inside:
        return original(checker)
    get_last_batch = checker.get_last_batch
    checker.get_last_batch = checker.get_running_batch
    try:
        return original(checker)
    finally:
        checker.get_last_batch = get_last_batch
