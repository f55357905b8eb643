"""What a request's decode steps attended to, told in its answer when it asks: `{"rheoserve": {"report": true}}`.

SGLang sends what an answer ended with as a dict to whoever asked, in `meta_info["finish_reason"]`; the report is there
under the key "rheoserve".
"""

from rheoserve_sgl.coordinator.attended import Attended, named
from rheoserve_sgl.runtime.request_options import KEY


def wants_report(custom_params) -> bool:
    """Whether a request asks for its figures; its options were checked before."""
    options = custom_params.get(KEY) if isinstance(custom_params, dict) else None
    return isinstance(options, dict) and options.get("report") is True


class Report:
    """One request's counts, over all slots that it had: a retracted one comes back in another."""

    def __init__(self):
        self.before = [0, 0, 0]
        self.base = [0, 0, 0]

    def enter(self, attended: Attended, slot: int):
        self.base = attended.of(slot)

    def leave(self, attended: Attended, slot: int):
        now = attended.of(slot)
        self.before = [sum_ + count - base for sum_, count, base in zip(self.before, now, self.base, strict=True)]
        self.base = now

    def figures(self) -> dict:
        """Blocks over all layers and KV heads; of the selected ones, the share that was resident; of those attended
        to, the CPU's share. SGLang's overlap schedule has begun one step more when it learns that an answer ended."""
        blocks = named(self.before)
        selected, host = blocks["selected_blocks"], blocks["host_blocks"]
        attended = blocks["device_blocks"] + host
        return blocks | {
            "hit_rate": 1 - host / selected if selected else None,
            "host_share": host / attended if attended else None,
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
    reason = request.finished_reason
    if reason is not None:
        said = reason.to_json()
        reason.to_json = lambda: said | {KEY: report.figures()}
