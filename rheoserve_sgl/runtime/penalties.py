"""Penalties of a batch of which some rows decode. SGLang keeps their state for all rows in one place: an orchestrator
with a penalizer for each kind of penalty (sglang/srt/sampling/penaltylib), each of which has tensors with a row for
each request.
"""

import weakref
from copy import copy

import torch


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


def write_back(own, orchestrator, rows: list[int]):
    """Put what a part's penalties have become into the whole ones, of which it has these rows."""
    if not own.is_required:
        return
    index = torch.tensor(rows, device=orchestrator.device)
    for kind, penalizer in own.penalizers.items():
        if penalizer.is_prepared():
            for name, tensor in tensors_of(penalizer):
                getattr(orchestrator.penalizers[kind], name)[index] = tensor


def tensors_of(penalizer) -> list[tuple[str, torch.Tensor]]:
    return [(name, value) for name, value in vars(penalizer).items() if isinstance(value, torch.Tensor)]
