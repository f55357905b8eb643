"""What one request may choose: `custom_params={"rheoserve": {...}}` of its sampling parameters.

Keys: `token_budget`, tokens selected per KV head and step; or `mode`, "full" to attend to all blocks and "window" to
sink and window only, on a server that selects by a budget. Blocks that are resident are attended on top, unless the
server was started with `--rheoserve-device-attention selected`. `report`: whether the answer tells what was attended to
(rheoserve_sgl/runtime/request_report.py).
"""

import logging
from functools import cache

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.config import ALL_PAGES, RheoConfig
from rheoserve_sgl.runtime.telemetry import count_refusal, refusals

logger = logging.getLogger(__name__)
KEY = "rheoserve"
OPTIONS = ("token_budget", "mode", "report")
REASONS = (*OPTIONS, "unknown", KEY, "token")  # of a refusal, as they are counted
MOST_SAID = 100  # characters of a bad value that its refusal repeats


def selected_pages(custom_params, config: RheoConfig) -> int:
    """Pages that a KV head of this request may select, sink and window included.

    Args:
        custom_params: of SGLang's SamplingParams, a dict or None

    Raises:
        ValueError: an option that does not exist or a value outside its legal ones, by name
    """
    options = custom_params.get(KEY) if isinstance(custom_params, dict) else None
    if options is None:
        return config.budget_pages
    if not isinstance(options, dict):
        _refuse("", options, "an object with token_budget, mode or report")
    for name in options:
        if name not in OPTIONS:
            _refuse("." + name, options[name], f"{', '.join(OPTIONS)} are the options")
    if not isinstance(options.get("report", False), bool):
        _refuse(".report", options["report"], "true, false")
    mode = options.get("mode", config.mode)
    if mode == config.mode and "token_budget" not in options:
        return config.budget_pages
    if not config.takes_budgets:
        _refuse("", options, "nothing: the server does not select by a token budget (see --rheoserve-mode)")
    most = config.most_token_budget
    modes = [*(["full"] if most is None else []), "window", config.mode]
    if mode not in modes:
        _refuse(".mode", mode, ", ".join(modes))
    if "token_budget" not in options:
        return ALL_PAGES if mode == "full" else 0
    if mode != config.mode:
        _refuse(".mode", mode, f"{config.mode} with a token_budget")
    budget = options["token_budget"]
    if isinstance(budget, float) and budget.is_integer():  # protobuf has no integers in a Struct
        budget = int(budget)
    if type(budget) is not int or budget % PAGE_TOKENS or budget < config.always_tokens:
        legal = f"a multiple of {PAGE_TOKENS}, at least {config.always_tokens} (sink, window and the newest page)"
        _refuse(".token_budget", budget, legal)
    if most is not None and budget > most:
        _refuse(".token_budget", budget, f"at most {most}, as the server has it")
    return min(budget // PAGE_TOKENS, ALL_PAGES)


class RefusedOption(ValueError):
    """An option of a request that is refused; `reason` is its name, or "unknown" for one that does not exist."""

    def __init__(self, name: str, value, legal: str):
        super().__init__(f"custom_params.{KEY}{clipped(name)} is {clipped(repr(value))}; legal: {legal}")
        option = name.removeprefix(".")
        self.reason = option if option in OPTIONS else "unknown" if option else KEY


def clipped(text: str) -> str:
    """A client's words in an answer of ours, if they are many the first of them."""
    return text if len(text) <= MOST_SAID else text[:MOST_SAID] + "..."


def _refuse(name: str, value, legal: str):
    raise RefusedOption(name, value, legal)


class SelectionLimits:
    """Pages that each running request's KV heads may select, by SGLang's req_pool_idx: `pages` `[slots]` int32."""

    def __init__(self, slots: int, config: RheoConfig, device):
        self._config = config
        self._known = [config.budget_pages] * slots
        self.pages = torch.full((slots,), config.budget_pages, dtype=torch.int32, device=device)

    def of(self, slot: int) -> int:
        """Pages that the request of a slot may select, known without a GPU."""
        return self._known[slot]

    def of_request(self, request) -> int:
        """The same of one of SGLang's requests, whether it has a slot or not."""
        slot = request.req_pool_idx
        return self._wanted(request.sampling_params.custom_params)[0] if slot is None else self._known[slot]

    def _wanted(self, custom_params) -> tuple[int, ValueError | None]:
        """Pages, and why they are the server's where the request's options are no good."""
        try:
            return selected_pages(custom_params, self._config), None
        except ValueError as error:  # `check_options` did not see it: it came by another way than HTTP
            return self._config.budget_pages, error

    def admit(self, slot: int, custom_params):
        """A request takes a slot."""
        pages, error = self._wanted(custom_params)
        if error:
            logger.warning("RheoServe: a request's options are left out: %s", error)
        if self._known[slot] != pages:
            self._known[slot] = pages
            self.pages[slot] = pages


def check_options(result, params, *_):
    """AFTER `SamplingParams.verify`: a bad option is the client's error (400), before the request is queued."""
    if isinstance(params.custom_params, dict) and KEY in params.custom_params:
        from sglang.srt.runtime_context import get_server_args

        from rheoserve_sgl.server_args import selects_rheoserve

        server_args = get_server_args()
        if selects_rheoserve(server_args):
            try:
                selected_pages(params.custom_params, RheoConfig.from_server_args(server_args))
            except RefusedOption as refused:
                if server_args.enable_metrics:
                    count_refusal(refused.reason)
                raise


@cache
def announce_reasons():
    """Each reason is counted from 0 on, not only from its first refusal."""
    for reason in REASONS:
        refusals().labels(reason=reason)


def check_tokens(manager, request, input_ids):
    """BEFORE `TokenizerManager._validate_one_request`: a token that the model does not have is a 400.

    SGLang 0.5.17 would look it up in the model's embedding, and end the server.
    """
    from rheoserve_sgl.server_args import selects_rheoserve

    if not selects_rheoserve(manager.server_args):
        return
    if manager.server_args.enable_metrics:
        announce_reasons()
    if input_ids:
        most = manager.model_config.vocab_size - 1
        for token in (min(input_ids), max(input_ids)):
            if not 0 <= token <= most:
                if manager.server_args.enable_metrics:
                    count_refusal("token")
                raise ValueError(f"input_ids has token {token}; legal: 0 to {most}")


def requests_enter(result, batch):
    """AFTER `alloc_for_extend`: the batch's requests have their slots."""
    pool = batch.tree_cache.token_to_kv_pool_allocator.get_kvcache()
    limits = getattr(pool, "limits", None)
    if limits is not None:
        from rheoserve_sgl.runtime import request_report
        from rheoserve_sgl.runtime.controller import Controller

        told = [request_report.wants_report(request.sampling_params.custom_params) for request in batch.reqs]
        if any(told) and pool.importance.is_cuda and Controller.current is not None:
            # The step in flight may still count for who had a slot before.
            torch.cuda.current_stream().wait_stream(Controller.current.scheduler.forward_stream)
        for request in batch.reqs:
            limits.admit(request.req_pool_idx, request.sampling_params.custom_params)
            request_report.enter(request, pool.coordinator.attended)
