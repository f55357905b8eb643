"""A request as RheoServe sees it, from its prefill until it leaves: whether it decodes or waits, and how long it did.

It lives on SGLang's Req, so that it goes where the request goes: into a retraction and back.
"""

import time
from collections import Counter

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.config import ALL_PAGES
from rheoserve_sgl.runtime.batch import pages_of

RECENT = 0.25  # weight of the newest window in the mean of a working set
STATES = ("decoding", "waiting", "prefilling", "registered")


class Transaction:
    """One prefilled request.

    age: its place among all that were prefilled, which it keeps when it is retracted; None: not yet prefilled
    state: "waiting" with its KV in host memory, or "decoding"
    limit: pages that each KV head may select, 0 for sink and window only; None: it has not decoded yet
    steps: decode steps since its prefill
    measured: its working set, in pages for each KV head, the mean of the last windows; 0.0: not yet measured
    need: pages of frames that each KV head of a layer needs for it, as estimated last
    kept: the coordinator's Kept, while it waits
    coming: decode steps of others in which it had its room, while its blocks came into frames for it to join
    waited: seconds it has waited, the present wait not included
    pauses: times it had to wait after it had decoded
    """

    def __init__(self):
        self.age: int | None = None
        self.state = "waiting"
        self.limit: int | None = None
        self.need = 0.0
        self.steps, self.measured = 0, 0.0
        self.kept = None
        self.coming = 0
        self.waited = 0.0
        self.pauses = 0
        self.since = time.monotonic()

    @classmethod
    def of(cls, request) -> "Transaction":
        """The transaction of one of SGLang's requests, made at first sight."""
        if not hasattr(request, "rheoserve"):
            request.rheoserve = cls()
        return request.rheoserve

    def learn(self, need: float):
        """Take in the working set of one more window, in pages. One window alone sends nobody away."""
        self.measured += (need - self.measured) * (RECENT if self.measured else 1.0)

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
        one.waited = one.waiting_seconds()
        one.state, one.since, one.kept = "waiting", time.monotonic(), None
        one.steps, one.coming, one.measured = 0, 0, 0.0


def requests_by_state(scheduler) -> list[tuple[str, object]]:
    """(state, SGLang's Req) of every request of a Scheduler, by STATES: what was prefilled first, then what is being
    prefilled, then what waits for that."""
    running = [request for request in scheduler.running_batch.reqs if not request.finished()]
    last = scheduler.last_batch
    prefilling = list(last.reqs) if last is not None and last.forward_mode.is_extend() else []
    if scheduler.chunked_req is not None:
        prefilling.append(scheduler.chunked_req)
    prefilling = dict.fromkeys(one for one in prefilling if one not in running and not one.finished())
    return [
        *((Transaction.of(request).state, request) for request in running),
        *(("prefilling", request) for request in prefilling),
        *(("registered", request) for request in scheduler.waiting_queue),
    ]


def count_by_state(found: list[tuple[str, object]]) -> dict[str, int]:
    """How many of `requests_by_state` are in each of STATES."""
    counts = Counter(state for state, _ in found)
    return {state: counts[state] for state in STATES}


def describe(scheduler, most: int = 100) -> dict:
    """Transactions by state, and one by one, for `/server_info`.

    Args:
        scheduler: SGLang's Scheduler
        most: that are listed of those that were prefilled, and of the others
    """
    found = requests_by_state(scheduler)
    prefilled = [request for state, request in found if state in ("decoding", "waiting")][:most]
    others = [(state, request) for state, request in found if state in ("prefilling", "registered")][:most]
    return {
        **count_by_state(found),
        "prefilled": [
            {**_size(request), "frames": frames, **_progress(Transaction.of(request))}
            for request, frames in zip(prefilled, _frames(scheduler, prefilled), strict=True)
        ],
        "arriving": [
            {**_size(request), "state": state, "prefilled_tokens": len(request.prefix_indices)}
            for state, request in others
        ],
    }


def _size(request) -> dict:
    tokens = len(request.origin_input_ids) + len(request.output_ids)
    return {
        "rid": request.rid,
        "tokens": tokens,
        "most_tokens": len(request.origin_input_ids) + request.sampling_params.max_new_tokens,
        "pages": pages_of(tokens),
    }


def _progress(one: Transaction) -> dict:
    return {
        "state": one.state,
        "budget_pages": one.limit if one.limit != ALL_PAGES else None,  # None: it has not decoded yet, or selects all
        "working_set_pages": round(one.need, 1),
        "waited_seconds": round(one.waiting_seconds(), 3),
        "pauses": one.pauses,
    }


def _frames(scheduler, requests) -> list[int]:
    """How many frames each has, over all layers and KV heads; those of a shared prefix count for each."""
    frame_of = scheduler.token_to_kv_pool_allocator.get_kvcache().residency.frame_of
    held = [(frame_of[:, logical_pages(scheduler, request)] >= 0).sum() for request in requests]
    return torch.stack(held).tolist() if held else []


def logical_pages(scheduler, request) -> torch.Tensor:
    """A prefilled request's pages, `[n]` int64."""
    table = scheduler.req_to_token_pool.req_to_token
    return table[request.req_pool_idx, : request.kv.kv_allocated_len : PAGE_TOKENS].long() // PAGE_TOKENS
