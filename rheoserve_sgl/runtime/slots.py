"""The part of SGLang's running batch that decodes in a step.

The running batch stays whole, so that SGLang's own accounting (memory, retraction, aborts, load reports) sees every
request that was prefilled. A step runs a batch over some of its rows; the other rows wait, with their KV in the host
store. Nothing is copied when a request joins or leaves the part, but for some numbers a request, and penalties.
"""

from copy import copy

import torch

from rheoserve_sgl.runtime.penalties import cumulate, part_of, write_back


class Slots:
    """Keeps the part from step to step; it is made anew when its members change.

    part: SGLang's ScheduleBatch of the last step that was one of a part
    """

    def __init__(self):
        self.part = None
        self._ready = None
        self._members: list = []  # of the whole batch, when `_steps` was made
        self._rows: list[int] = []  # of it, likewise
        self._steps: tuple[torch.Tensor, ...] = ()

    def prepare_whole(self, batch, launched):
        """All requests of the running batch decode; launched: see `cumulate`."""
        self.part = self._ready = None
        prepare_for_decode(batch, launched)

    def prepare(self, batch, rows: list[int], launched):
        """These rows of the running batch, in ascending order, decode: `prepare_for_decode`, for them alone."""
        chosen = [batch.reqs[row] for row in rows]
        part = self.part
        if part is not None:
            part.filter_batch()  # finished requests leave it as they left the running batch
        if part is None or part.reqs != chosen or not same_rows(part, batch, rows):
            part = self.part = cut(batch, rows)
        prepare_for_decode(part, launched)
        write_back(part.sampling_info.penalizer_orchestrator, batch.sampling_info.penalizer_orchestrator, rows)
        self._ready = part
        batch.forward_mode = part.forward_mode
        self._advance(batch, rows)

    def take(self):
        """The part that was made ready and has not run; None if there is none."""
        ready, self._ready = self._ready, None
        return ready

    def _advance(self, batch, rows: list[int]):
        """The whole batch's lengths follow the part's."""
        if not self._steps or self._members != batch.reqs or self._rows != rows:
            self._members, self._rows = batch.reqs, rows
            step = torch.zeros(len(batch.reqs), dtype=torch.int64)
            step[rows] = 1
            self._steps = (step, step.to(batch.seq_lens.device))
        step, on_device = self._steps
        # New tensors: a forward pass that is in flight may still read the old ones.
        batch.seq_lens = batch.seq_lens + on_device.to(batch.seq_lens.dtype)
        batch.orig_seq_lens = batch.orig_seq_lens + on_device.to(batch.orig_seq_lens.dtype)
        batch.seq_lens_cpu = batch.seq_lens_cpu + step.to(batch.seq_lens_cpu.dtype)
        batch.seq_lens_sum = None
        batch.out_cache_loc = None


def prepare_for_decode(batch, launched):
    """SGLang's own, with the tokens that penalties count; launched: see `cumulate`."""
    if batch.enable_overlap:
        batch.cumulate_penalty_output_tokens = lambda: cumulate(batch, launched)
    type(batch).prepare_for_decode(batch)
    vars(batch).pop("cumulate_penalty_output_tokens", None)


def same_rows(part, batch, rows: list[int]) -> bool:
    """Whether a part's numbers are those of the whole batch: requests that were retracted come back with others."""
    kept = ((part.req_pool_indices_cpu, batch.req_pool_indices_cpu), (part.seq_lens_cpu, batch.seq_lens_cpu))
    return all(torch.equal(own, whole[rows]) for own, whole in kept)


def cut(batch, rows: list[int]):
    """A batch of some rows of another, which stays as it is."""
    part = copy(batch)
    vars(part).pop("prepare_for_decode", None)  # what hides the method of the whole batch (runtime/scheduling.py)
    part.sampling_info = copy(batch.sampling_info)
    part.sampling_info.penalizer_orchestrator = part_of(batch.sampling_info.penalizer_orchestrator, part)
    part.filter_batch(keep_indices=rows)
    return part
