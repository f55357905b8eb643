"""The places where RheoServe touches SGLang, as one table, and the check that they are in place.

SGLang's plugin loader logs and swallows exceptions, and would serve on without us; `require_hooks` is
called from the attention backend, which is looked up by name and so cannot be lost in silence.
"""

import inspect
import pkgutil
import sys
from dataclasses import dataclass

SRT = "sglang.srt."
ENGINE = SRT + "entrypoints.engine"


@dataclass(frozen=True)
class Hook:
    """One hooked target.

    target: dotted path in SGLang
    kind: HookType by name: "before", "after", "around" or "replace"
    handler: dotted path of ours, imported when the hook is registered
    role: "scheduler" for the model's process only, "main" for the launching one only, "all" for both, "engine" for one
        that imported the offline engine before the plugins were loaded
    """

    target: str
    kind: str
    handler: str
    role: str = "scheduler"


_SIZES = SRT + "mem_cache.kv_cache_configurator.KVCacheConfigurator."
_SCHEDULER = SRT + "managers.scheduler.Scheduler."
_REPORTS = SRT + "managers.scheduler_components."
_XGRAMMAR = SRT + "constrained.xgrammar_backend."
_OURS = "rheoserve_sgl.runtime."
_PAGE = "rheoserve_sgl.observe.routes."

HOOKS = (
    Hook(SRT + "server_args.ServerArgs", "replace", "rheoserve_sgl.server_args.RheoServerArgs", role="all"),
    Hook(
        ENGINE + ".Engine.server_args_class",
        "replace",
        "rheoserve_sgl.server_args.RheoServerArgs",
        role="engine",
    ),
    Hook(_SIZES + "_resolve_memory_pool_config", "around", _OURS + "construction.resolve_sizes"),
    Hook(_SIZES + "_build_token_to_kv_pool", "around", _OURS + "construction.build_pool"),
    Hook(_SIZES + "_build_token_to_kv_pool_allocator", "around", _OURS + "construction.build_allocator"),
    Hook(SRT + "utils.common.support_triton", "around", _OURS + "platform_cpu.support_triton"),
    Hook(
        SRT + "distributed.parallel_state.init_model_parallel_group",
        "before",
        _OURS + "platform_cpu.plain_groups",
    ),
    Hook(_XGRAMMAR + "_allocate_token_bitmask", "around", _OURS + "platform_cpu.plain_bitmask"),
    Hook(_XGRAMMAR + "XGrammarGrammar.apply_vocab_mask", "around", _OURS + "platform_cpu.apply_bitmask"),
    Hook(
        SRT + "models.utils.enable_fused_set_kv_buffer",
        "around",
        _OURS + "lifecycle.enable_fused_set_kv_buffer",
    ),
    Hook(SRT + "mem_cache.common.release_kv_cache", "before", _OURS + "lifecycle.request_left"),
    Hook(SRT + "mem_cache.allocation.alloc_for_extend", "after", _OURS + "request_options.requests_enter"),
    Hook(_SCHEDULER + "process_batch_result", "before", _OURS + "gpu_decode.require_answers"),
    Hook(
        SRT + "sampling.sampling_params.SamplingParams.verify",
        "after",
        _OURS + "request_options.check_options",
        role="all",
    ),
    Hook(_SCHEDULER + "get_next_batch_to_run", "around", _OURS + "scheduling.get_next_batch_to_run"),
    Hook(_SCHEDULER + "update_running_batch", "around", _OURS + "scheduling.update_running_batch"),
    Hook(_SCHEDULER + "get_new_batch_prefill", "around", _OURS + "scheduling.get_new_batch_prefill"),
    Hook(
        _REPORTS + "invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes",
        "around",
        _OURS + "scheduling.count_requests_once",
    ),
    Hook(
        _REPORTS + "pool_stats_observer.PoolStats.get_decode_usage_msg_parts",
        "after",
        _OURS + "telemetry.add_log_parts",
    ),
    Hook(
        SRT + "observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        "after",
        _OURS + "telemetry.export_metrics",
    ),
    Hook(_SCHEDULER + "on_idle", "before", _OURS + "lifecycle.look_when_idle"),
    Hook(_SCHEDULER + "get_internal_state", "after", _OURS + "lifecycle.add_state"),
    Hook(
        SRT + "managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "before",
        _OURS + "request_options.check_tokens",
        role="main",
    ),
    Hook(SRT + "utils.common.set_uvicorn_logging_configs", "before", _PAGE + "add_routes", role="main"),
    Hook(SRT + "utils.auth.decide_request_auth", "around", _PAGE + "allow_page", role="main"),
)


def hooks_for(in_scheduler: bool) -> list[Hook]:
    """The hooks that a process registers."""
    roles = {"all", "scheduler" if in_scheduler else "main"}
    if ENGINE in sys.modules:  # and a process that somebody else has spawned may launch a server, or hold an engine
        roles |= {"main", "engine"}
    return [hook for hook in HOOKS if hook.role in roles]


def misfit(hook: Hook) -> str:
    """Why a hook does not fit the installed SGLang: its target or handler does not exist, or the handler cannot take
    the target's arguments. "" if it fits."""
    try:
        target, handler = pkgutil.resolve_name(hook.target), pkgutil.resolve_name(hook.handler)
    except (ImportError, AttributeError) as error:
        return f"{hook.target}: {error}"
    if hook.kind == "replace":
        fits = issubclass(handler, target) or issubclass(target, handler)
        return "" if fits else f"{hook.target}: {hook.handler} is no subclass of it"
    given = inspect.signature(inspect.unwrap(target)).parameters.values()
    positional = [None] * sum(p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in given)
    keywords = {p.name: None for p in given if p.kind == p.KEYWORD_ONLY}
    extra = [None] if hook.kind in ("around", "after") else []
    try:
        inspect.signature(handler).bind(*extra, *positional, **keywords)
    except TypeError as error:
        return f"{hook.target}: {hook.handler}: {error}"
    return ""


def require_hooks():
    """Raise RuntimeError naming each hook of a scheduler process that is not in place."""
    from importlib.metadata import version

    from sglang.srt.plugins.hook_registry import HookRegistry

    ours = [hook.target for hook in HOOKS if hook.role in ("scheduler", "all")]
    missing = [target for target in ours if target not in HookRegistry._patched]
    if missing:
        raise RuntimeError(
            "RheoServe cannot serve: these hooks into SGLang are not in place: "
            + ", ".join(missing)
            + f". Installed sglang is {version('sglang')}, RheoServe is made for 0.5.17; see the log above for the "
            "first error, and check that SGLANG_PLUGINS, if set, lists rheoserve."
        )
