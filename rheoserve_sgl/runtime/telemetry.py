"""RheoServe in SGLang's decode log line and, with `--enable-metrics`, in its Prometheus metrics.

A scheduler process has one pool; its backend calls `observe`, and until then the hooks here do nothing.
"""

from functools import cache

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.coordinator.figures import Figures
from rheoserve_sgl.runtime.batch import pages_of
from rheoserve_sgl.runtime.controller import Controller
from rheoserve_sgl.runtime.transaction import count_by_state, requests_by_state

PREFIX = "sglang:rheoserve_"
COUNTERS = {
    "decode_steps": "Decode steps.",
    "device_blocks": "Blocks that the device attended to, over all layers and KV heads.",
    "resident_hits": "Selected blocks that were resident, over all layers and KV heads.",
    "host_blocks": "Blocks that the CPU attended to in place, over all layers and KV heads.",
    "selected_blocks": "Blocks that were selected, over all layers and KV heads; the CPU visited some.",
    "exchanges": "Exchanges of blocks between the tiers; swaps of a step are not counted.",
    "exchanges_failed": "Exchanges and swaps that failed, for want of memory perhaps: they cost speed, and no answer.",
    "exchanged_bytes": "Bytes copied from the host store into frames.",
    "stored_bytes": "Bytes of new tokens written to the host store.",
    "pauses": "Times that a request which decoded had to wait for others.",
    "waited_seconds": "Seconds that prefilled requests waited before they decoded, or decoded again.",
    "host_attention_seconds": "Seconds in which the CPU attended to blocks.",
    "selection_seconds": "Seconds in which blocks were scored and picked (on a CPU alone).",
    "exposed_wait_seconds": "Seconds in which the GPU waited for the CPU's attention (on a GPU only).",
    "exchange_wait_seconds": "Seconds in which the GPU waited for blocks on their way into frames (on a GPU only).",
}
GAUGES = {
    "frames": "Frames on the device, each for one block.",
    "frames_used": "Frames that hold a block.",
    "host_pages": "Pages of 64 tokens that the host store has room for.",
    "transactions_registered": "Requests that wait for their prefill.",
    "transactions_prefilling": "Requests that are being prefilled.",
    "transactions_decoding": "Prefilled requests that decode.",
    "transactions_waiting": "Prefilled requests that wait in host memory for their turn to decode.",
    "working_set_pages": "Pages of frames that each KV head needs for what the decoding requests select.",
    "predicted_step_seconds": "Seconds of a decode step, as predicted before its window.",
    "measured_step_seconds": "Seconds of a decode step in that window.",
    "host_pages_used": "Those that hold something, of a request or of the radix tree.",
    "host_pages_running": "Those of running requests; the rest of what is used can be evicted.",
}


class Telemetry:
    """Turns figures into parts of a log line, and into metrics."""

    def __init__(self, figures: Figures):
        self._figures = figures
        self._logged = {"device_blocks": 0, "host_blocks": 0}
        self._exported: dict[str, float] = {}
        self._metrics: dict = {}

    def log_parts(self) -> list[str]:
        """Of the steps since the last line."""
        now = self._figures.read()
        attended = {name: now[name] - before for name, before in self._logged.items()}
        self._logged = {name: now[name] for name in self._logged}
        share = attended["host_blocks"] / max(sum(attended.values()), 1)
        return [f"frame usage: {now['frames_used'] / max(now['frames'], 1):.2f}", f"host share: {share:.3f}"]

    def export(self, labels: dict[str, str], running_tokens: int, free_tokens: int, states: dict[str, int]):
        """Bring the metrics up to date.

        Args:
            labels: SGLang's, of this scheduler
            running_tokens: of the host store, that running requests hold
            free_tokens: of the host store, that nobody holds
            states: requests in each
        """
        if not self._metrics:
            self._metrics = make_metrics(list(labels))
        now = self._figures.read()
        now["host_pages_used"] = now["host_pages"] - free_tokens // PAGE_TOKENS
        now["host_pages_running"] = pages_of(running_tokens)
        now |= {f"transactions_{state}": count for state, count in states.items()}
        for name in COUNTERS.keys() & now.keys():
            self._metrics[name].labels(**labels).inc(max(now[name] - self._exported.get(name, 0), 0))
            self._exported[name] = now[name]
        for name in GAUGES:
            self._metrics[name].labels(**labels).set(now[name])


def make_metrics(labels: list[str]) -> dict:
    """The metrics by name, registered with Prometheus' client."""
    # Not before SGLang has set where several processes keep their metrics.
    from prometheus_client import Counter, Gauge

    counters = {name: Counter(PREFIX + name, text, labels) for name, text in COUNTERS.items()}
    gauges = {name: Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent") for name, text in GAUGES.items()}
    return counters | gauges


@cache
def refusals():
    """The counter of refused requests, in the process that takes requests in."""
    from prometheus_client import Counter

    return Counter(
        PREFIX + "refused_requests",
        "Requests refused for an option of theirs, by its name, or for a token.",
        ["reason"],
    )


def count_refusal(reason: str):
    """A request was refused (400). The reasons are few and fixed: no client can make labels."""
    refusals().labels(reason=reason).inc()


_telemetry: Telemetry | None = None


def observe(coordinator):
    """Tell about this coordinator from now on."""
    global _telemetry
    _telemetry = Telemetry(Figures(coordinator))


def add_log_parts(parts, pool_stats):
    """AFTER `PoolStats.get_decode_usage_msg_parts`: two more parts of the decode log line."""
    return parts if _telemetry is None else [*parts, *_telemetry.log_parts()]


def export_metrics(result, collector, stats):
    """AFTER `SchedulerMetricsCollector.log_stats`: ours beside SGLang's, with the same labels."""
    controller = Controller.current
    if _telemetry is not None and controller is not None:
        free = controller.scheduler.token_to_kv_pool_allocator.available_size()
        states = count_by_state(requests_by_state(controller.scheduler))
        _telemetry.export(collector.labels, stats.num_used_tokens, free, states)
    return result
