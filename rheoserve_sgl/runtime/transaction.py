"""A request as RheoServe sees it, from its prefill until it leaves: whether it decodes or waits, and how long it did.

It lives on SGLang's Req, so that it goes where the request goes: into a retraction and back.
"""

import time

STATES = ("registered", "prefilling", "waiting", "decoding")


class Transaction:
    """One prefilled request.

    state: "waiting" with its KV in host memory, or "decoding"
    limit: pages that each KV head may select
    steps: decode steps since its prefill
    measured: its working set when it was measured last, in pages for each KV head; 0.0: not yet
    need: pages of frames that each KV head of a layer needs for it, as estimated last
    kept: the coordinator's Kept, while it waits
    waited: seconds it has waited, the present wait not included
    pauses: times it had to wait after it had decoded
    """

    def __init__(self):
        self.state = "waiting"
        self.limit, self.need = 0, 0.0
        self.steps, self.measured = 0, 0.0
        self.kept = None
        self.waited = 0.0
        self.pauses = 0
        self.since = time.monotonic()

    @classmethod
    def of(cls, request) -> "Transaction":
        """The transaction of one of SGLang's requests, made at first sight."""
        if not hasattr(request, "rheoserve"):
            request.rheoserve = cls()
        return request.rheoserve

    def enter(self, state: str) -> tuple[int, float]:
        """Change the state; returns the pauses that begin with it, and the seconds waited that end with it."""
        if state == self.state:
            return 0, 0.0
        now = time.monotonic()
        pauses, seconds = (1, 0.0) if state == "waiting" else (0, now - self.since)
        self.pauses, self.waited = self.pauses + pauses, self.waited + seconds
        self.state, self.since = state, now
        return pauses, seconds

    def waiting_seconds(self) -> float:
        """All its waits, the present one included."""
        return self.waited + (time.monotonic() - self.since if self.state == "waiting" else 0.0)


def leave(request):
    """A request loses its pages, for good or to come back with others."""
    if hasattr(request, "rheoserve"):
        one = request.rheoserve
        one.state, one.since, one.kept = "waiting", time.monotonic(), None
        one.steps, one.measured = 0, 0.0


def describe(scheduler, most: int = 100) -> dict:
    """Transactions by state, and the prefilled ones one by one, for `/server_info`.

    Args:
        scheduler: SGLang's Scheduler
        most: that are listed
    """
    chunked = scheduler.chunked_req
    running = [request for request in scheduler.running_batch.reqs if not request.finished()]
    known = [(request, Transaction.of(request)) for request in running]
    prefilling = {chunked} if chunked is not None else set()
    last = scheduler.last_batch
    if last is not None and last.forward_mode.is_extend():
        prefilling |= {request for request in last.reqs if request not in running and not request.finished()}
    counts = {
        "registered": len(scheduler.waiting_queue),
        "prefilling": len(prefilling),
        **{state: sum(one.state == state for _, one in known) for state in ("waiting", "decoding")},
    }
    listed = [
        {
            "rid": request.rid,
            "state": one.state,
            "tokens": len(request.origin_input_ids) + len(request.output_ids),
            "most_tokens": len(request.origin_input_ids) + request.sampling_params.max_new_tokens,
            "working_set_pages": round(one.need, 1),
            "waited_seconds": round(one.waiting_seconds(), 3),
            "pauses": one.pauses,
        }
        for request, one in known[:most]
    ]
    return {**counts, "prefilled": listed}
