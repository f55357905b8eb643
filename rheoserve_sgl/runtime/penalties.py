"""Penalties of a batch of which some rows decode. SGLang keeps their state for all rows in one place: an orchestrator
with a penalizer for each kind of penalty (sglang/srt/sampling/penaltylib), each of which has tensors with a row for
each request.
"""

import weakref
from copy import copy

import torch

from rheoserve_sgl.runtime.writes import to_device

# What a step changes of BatchedFrequencyPenalizer, BatchedPresencePenalizer, BatchedRepetitionPenalizer and
# BatchedMinNewTokensPenalizer; the rest is as the requests asked.
CHANGES = (
    *("cumulated_frequency_penalties", "cumulated_presence_penalties", "cumulated_repetition_penalties"),
    "len_output_tokens",
)


def part_of(orchestrator, batch):
    """An orchestrator for a batch that was copied from the whole one, and is about to lose rows: it has the same
    tensors, and takes others when it is filtered. The whole one stays as it is.
    """
    own = copy(orchestrator)
    own.batch = batch
    own.penalizers = {kind: copy(penalizer) for kind, penalizer in orchestrator.penalizers.items()}
    for penalizer in own.penalizers.values():
        penalizer._orchestrator_ref = weakref.ref(own)
    return own


def cumulate(batch, launched):
    """In place of `ScheduleBatch.cumulate_penalty_output_tokens`, where steps overlap with the scheduler.

    A step is prepared before the tokens of the one in flight are known, so penalties count them one step late. SGLang
    counts what is known: for a request that was not in what was launched last, since it waited or a prefill came
    between, one token is passed over and the next one counted twice. Here each is counted once, one step late.

    Args:
        launched: ScheduleBatch, the last one; None: nothing is in flight
    """
    ahead = {id(request) for request in launched.reqs} if launched is not None else set()
    tokens = []
    for request in batch.reqs:
        known = [request.origin_input_ids[-1], *request.output_ids[-2:]]
        tokens.append(known[-1] if id(request) in ahead or len(known) == 1 else known[-2])
    own = batch.sampling_info.penalizer_orchestrator
    own.cumulate_output_tokens(to_device(torch.tensor(tokens), torch.device(batch.device)))


def write_back(own, orchestrator, rows: list[int]):
    """Put what a part's penalties have become into the whole ones, of which it has these rows."""
    if not own.is_required:
        return
    index = to_device(torch.tensor(rows), torch.device(orchestrator.device))
    for kind, penalizer in own.penalizers.items():
        for name in CHANGES:
            if hasattr(penalizer, name):
                getattr(orchestrator.penalizers[kind], name)[index] = getattr(penalizer, name)
