"""Hooks on SGLang's scheduler, through which the controller decides what runs next."""

from rheoserve_sgl.runtime.controller import Controller, decodes
from rheoserve_sgl.runtime.step_clock import DECODE, NOTHING, PREFILL


def update_running_batch(original, scheduler, batch):
    """AROUND `Scheduler.update_running_batch`: the controller makes the step ready."""
    controller = Controller.of(scheduler)
    if controller is None:
        return original(scheduler, batch)
    # Hides the method for this call only: a mixed batch prepares its decodes itself.
    batch.prepare_for_decode = lambda: controller.prepare(batch)
    try:
        left = original(scheduler, batch)
    finally:
        del batch.prepare_for_decode
    if left.is_empty():
        controller.rest()
    return left


def get_next_batch_to_run(original, scheduler, *args, **kwargs):
    """AROUND `Scheduler.get_next_batch_to_run`: the part of the running batch that was made ready is what runs."""
    controller = Controller.of(scheduler)
    if controller is None:
        return original(scheduler, *args, **kwargs)
    controller.clock.tick()
    plan = original(scheduler, *args, **kwargs)
    part, runs = controller.slots.take(), plan.batch_to_run
    if part is not None and runs is plan.running_batch:
        plan.batch_to_run = part
    if runs is not None and runs.forward_mode.is_extend():
        controller.clock.launched(PREFILL, runs.extend_num_tokens, controller.beside)
    else:
        controller.clock.launched(NOTHING if runs is None else DECODE)
    return plan


def get_new_batch_prefill(original, scheduler, running_batch):
    """AROUND `Scheduler.get_new_batch_prefill`: none while the running batch has steps to decode first."""
    controller = Controller.of(scheduler)
    if controller is None:
        return original(scheduler, running_batch)
    if controller.owes_decode(running_batch):
        from sglang.srt.managers.schedule_batch import NextBatchPlan

        return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
    chunk, beside = scheduler.chunked_prefill_size, decodes(running_batch)
    allocatable = scheduler.get_num_allocatable_reqs
    room = controller.room(running_batch, allocatable(len(running_batch.reqs)))
    if beside:
        scheduler.chunked_prefill_size = controller.pace.chunk
    if room is not None:
        scheduler.get_num_allocatable_reqs = lambda running: min(allocatable(running), room)
    try:
        plan = original(scheduler, running_batch)
    finally:
        scheduler.chunked_prefill_size = chunk
        if room is not None:
            del scheduler.get_num_allocatable_reqs
    begun = 0 if plan.batch_to_run is None else len(plan.batch_to_run.reqs)
    if room is not None and begun >= room:
        plan.running_batch.batch_is_full = False  # the objective may allow more at any time
    if begun:
        controller.prefilled(plan.batch_to_run.extend_num_tokens, beside)
    return plan


def count_requests_once(original, checker):
    """AROUND `SchedulerInvariantChecker._get_total_uncached_sizes`: a part's requests are the running batch's, too, and
    a chunked prompt is in no batch while others decode between its chunks."""
    last, running = checker.get_last_batch(), checker.get_running_batch()
    if None in (last, running) or Controller.current is None:
        return original(checker)
    get_last_batch = checker.get_last_batch
    if last is not running and set(last.reqs) <= set(running.reqs):
        checker.get_last_batch = checker.get_running_batch
    try:
        full, *others = original(checker)
    finally:
        checker.get_last_batch = get_last_batch
    prompt = Controller.current.chunked_prompt()
    if prompt is not None and prompt.kv is not None and prompt not in {*last.reqs, *running.reqs}:
        full += -(-prompt.kv.kv_allocated_len // checker.page_size) * checker.page_size - prompt.cache_protected_len
    return full, *others
