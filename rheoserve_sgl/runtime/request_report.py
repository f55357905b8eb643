"""What a request's decode steps attended to, told in its answer when it asks: `{"rheoserve": {"report": true}}`.

SGLang sends what an answer ended with as a dict to whoever asked, in `meta_info["finish_reason"]`; the report is there
under the key "rheoserve".
"""

import torch

from rheoserve_sgl.coordinator.attended import Attended, named
from rheoserve_sgl.runtime.request_options import KEY
from rheoserve_sgl.runtime.transaction import Transaction


def wants_report(custom_params) -> bool:
    """Whether a request asks for its figures; its options were checked before."""
    options = custom_params.get(KEY) if isinstance(custom_params, dict) else None
    return isinstance(options, dict) and options.get("report") is True


class Report:
    """One request's counts, over all slots that it had: a retracted one comes back in another."""

    def __init__(self):
        self.before = self.base = 0  # `[3]` int64 of coordinator/attended.py
        self.told, self.copied = None, None  # the sum on the host, and when it is there
        self.waits: dict[str, float] = {}

    def enter(self, attended: Attended, slot: int):
        self.base = attended.of(slot)

    def leave(self, attended: Attended, slot: int):
        now = attended.of(slot)
        self.before, self.base = self.before + now - self.base, now
        self.told = torch.empty(now.shape, dtype=now.dtype, pin_memory=now.is_cuda)
        self.told.copy_(self.before, non_blocking=True)
        if now.is_cuda:  # later on this stream waits for the batch in flight
            self.copied = torch.cuda.Event()
            self.copied.record()

    def figures(self) -> dict:
        """Blocks over all layers and KV heads; of the selected ones, the share that was resident; of those attended
        to, the CPU's share; how long it waited to decode, and how often after it had decoded. SGLang's overlap schedule
        has begun one step more when it learns that an answer ended."""
        if self.copied is not None:
            self.copied.synchronize()
        blocks = named(self.told.tolist())
        selected, host = blocks["selected_blocks"], blocks["host_blocks"]
        attended = blocks["device_blocks"] + host
        return blocks | {
            "hit_rate": 1 - host / selected if selected else None,
            "host_share": host / attended if attended else None,
            **self.waits,
        }


def enter(request, attended: Attended):
    """A request has its slot, for the first time, with a further chunk, or after a retraction."""
    if not wants_report(request.sampling_params.custom_params):
        return
    if not hasattr(request, "rheoserve_report"):
        request.rheoserve_report = Report()
    request.rheoserve_report.enter(attended, request.req_pool_idx)


def leave(request, attended: Attended):
    """A request is about to give its slot back; if it is done, its answer gets the figures."""
    report = getattr(request, "rheoserve_report", None)
    if report is None:
        return
    report.leave(attended, request.req_pool_idx)
    one = Transaction.of(request)
    report.waits = {"waited_seconds": round(one.waiting_seconds(), 3), "pauses": one.pauses}
    reason = request.finished_reason
    if reason is not None:
        said = reason.to_json()
        reason.to_json = lambda: said | {KEY: report.figures()}
