"""SGLang's ServerArgs with the `--rheoserve-*` flags.

SGLang derives its command line, `/server_info` and YAML configuration from the fields of this
dataclass, so a subclass is all that is needed. Nothing heavier than SGLang's own module is imported here:
this runs before the command line is parsed.
"""

import dataclasses
from typing import Annotated

from sglang.srt.arg_groups.arg_utils import NS, Arg
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs

from rheoserve_sgl import BACKEND_NAME, PAGE_TOKENS, environ
from rheoserve_sgl.config import ADMISSION, CANARY, DEVICE_ATTENTION, GATE_ROPE, MODES, SELECTORS, RheoConfig
from rheoserve_sgl.refusals import (
    refuse_flags,
    refuse_gate,
    refuse_graphs,
    refuse_model,
    refuse_threads,
    refuse_unused,
)


@dataclasses.dataclass
class RheoServerArgs(ServerArgs):
    """ServerArgs; inert unless `attention_backend` is "rheoserve"."""

    rheoserve_mode: Annotated[
        str,
        Arg(
            help="RheoServe: what stays on the device and what the CPU visits. 'balanced': sink, window and the "
            "most important blocks stay, the CPU visits selected blocks that do not; 'retrieval': sink and window "
            "stay, the CPU visits the selection; 'window': sink and window only; 'full': every block is attended.",
            choices=list(MODES),
        ),
        NS("memory"),
    ] = "balanced"
    rheoserve_selector: Annotated[
        str,
        Arg(
            help="RheoServe: the gate that scores blocks of the quick K cache. 'seer': a learned AttnGate; 'quest' and "
            "'mean' need no weights; 'oracle': the attention itself, slow, for accuracy studies; 'auto': seer with "
            "--rheoserve-gate-path, else quest.",
            choices=list(SELECTORS),
        ),
        NS("memory"),
    ] = "auto"
    rheoserve_gate_path: Annotated[
        str | None,
        "RheoServe: folder of a learned gate (SeerAttention-R's published format, or what "
        "`python -m rheoserve_sgl.gate.distill` writes).",
        NS("memory"),
    ] = None
    rheoserve_gate_rope: Annotated[
        str,
        Arg(
            help="RheoServe: where a learned gate's key is rotated: at its block's 'first' token, as in training, or, "
            "for blocks completed while decoding, at the 'last', as SeerAttention's published code does.",
            choices=list(GATE_ROPE),
        ),
        NS("memory"),
    ] = "first"
    rheoserve_dense_layers: Annotated[
        int | None,
        "RheoServe: the first layers, this many, attend to all blocks (default: what the learned gate says, or 0).",
        NS("memory"),
    ] = None
    rheoserve_token_budget: Annotated[
        int | None,
        "RheoServe: tokens selected per KV head per step, sink and window included (default 4096).",
        NS("memory"),
    ] = None
    rheoserve_most_token_budget: Annotated[
        int | None,
        "RheoServe: the largest token budget that a request may choose for itself; with it none may attend to all "
        "blocks (default: any).",
        NS("memory"),
    ] = None
    rheoserve_threshold: Annotated[
        float | None,
        "RheoServe: select blocks whose softmax gate score exceeds this, instead of a token budget.",
        NS("memory"),
    ] = None
    rheoserve_device_tokens: Annotated[
        int | None,
        "RheoServe: device memory for KV blocks, in tokens (default: what memory profiling yields; on CPU 5%% of "
        "the free memory).",
        NS("memory"),
    ] = None
    rheoserve_host_size: Annotated[
        float | None,
        "RheoServe: size of the host store of each rank in GB; overrides the ratio.",
        NS("memory"),
    ] = None
    rheoserve_host_ratio: Annotated[
        float | None,
        "RheoServe: host store as a multiple of the device tokens (default 4, capped at 70%% of free host memory).",
        NS("memory"),
    ] = None
    rheoserve_sink_tokens: Annotated[
        int, "RheoServe: tokens at the start of a sequence that are always attended.", NS("memory")
    ] = 64
    rheoserve_window_tokens: Annotated[
        int, "RheoServe: recent tokens, before the newest page, that are always attended.", NS("memory")
    ] = 512
    rheoserve_exchange_interval: Annotated[
        int, "RheoServe: decode steps between two exchanges of blocks between the tiers.", NS("memory")
    ] = 16
    rheoserve_host_threads: Annotated[
        int | None,
        "RheoServe: threads of the CPU kernels (default: the processors this process may use, shared "
        "between tensor-parallel ranks).",
        NS("memory"),
    ] = None
    rheoserve_device_attention: Annotated[
        str,
        Arg(
            help="RheoServe: the device attends to all its resident blocks ('resident') or only to the selected "
            "ones ('selected').",
            choices=list(DEVICE_ATTENTION),
        ),
        NS("memory"),
    ] = "resident"
    rheoserve_canary: Annotated[
        str,
        Arg(
            help="RheoServe: between batches, hold random live blocks against checksums of what was written, and "
            "frames against the host store; 'log' or 'raise' (which ends the server) what differs. For tests and "
            "doubts: it costs time and 8 bytes a token, layer and KV head.",
            choices=list(CANARY),
        ),
        NS("memory"),
    ] = "off"
    rheoserve_admission: Annotated[
        str,
        Arg(
            help="RheoServe: of the prefilled requests only those decode at once whose working sets (blocks selected "
            "over the last steps) fit the device's memory; the others wait with their KV in host memory. 'auto': on "
            "where there is a GPU. In mode 'balanced' only.",
            choices=list(ADMISSION),
        ),
        NS("schedule"),
    ] = "auto"
    rheoserve_most_missed: Annotated[
        float,
        "RheoServe: while more than this share of the selection stays not resident, the newest requests pause.",
        NS("schedule"),
    ] = 0.25
    rheoserve_join_group: Annotated[
        int,
        "RheoServe: prefilled requests that join those that decode together, while more are being prefilled; "
        "nothing with --rheoserve-join-patience 0.",
        NS("schedule"),
    ] = 4
    rheoserve_join_patience: Annotated[
        int,
        "RheoServe: decode steps that a prefilled request waits at most for its group; 0: it joins as soon as it can.",
        NS("schedule"),
    ] = 0
    rheoserve_decode_interleave: Annotated[
        int,
        "RheoServe: decode steps between two batches (chunks) of prefill, so that long prompts do not stall what "
        "decodes; 0: prefill first, as SGLang does.",
        NS("schedule"),
    ] = 8
    rheoserve_tpot_slo_ms: Annotated[
        float | None,
        "RheoServe: milliseconds that a token may take, on average: fewer requests decode at once, the next ones begin "
        "later, and others' prompts are read in smaller chunks with more steps between, as far as times ask for it.",
        NS("schedule"),
    ] = None

    def __post_init__(self):
        if not selects_rheoserve(self):
            refuse_unused(self)
            return super().__post_init__()
        RheoConfig.from_server_args(self)
        require_extension()
        refuse_flags(self)
        refuse_threads(self)
        self._apply_defaults()
        super().__post_init__()
        refuse_flags(self)  # again, of what SGLang made of others
        if self.model_path.lower() not in ("none", "dummy"):  # of which SGLang resolves nothing
            refuse_graphs(self)
            refuse_model(self.get_model_config())
            refuse_gate(self, self.get_model_config())

    def _apply_defaults(self):
        if self.page_size is None:
            self.page_size = PAGE_TOKENS
        self.disable_prefill_cuda_graph = True
        if current_platform.device_type == "cpu" or self.rheoserve_selector == "oracle":
            self.disable_decode_cuda_graph = True
        if current_platform.device_type == "cpu":
            environ.quiet_openmp()


def selects_rheoserve(server_args) -> bool:
    """Whether this ServerArgs (before or after resolution) asks for RheoServe anywhere."""
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    return any(getattr(server_args, name, None) == BACKEND_NAME for name in names)


def require_extension():
    """Raise RuntimeError with the remedy if the compiled extension cannot be loaded."""
    try:
        import rheoserve_sgl._C  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"rheoserve_sgl._C, the compiled extension, cannot be loaded ({error}); "
            "reinstall with `pip install --force-reinstall --no-deps .` in a checkout of RheoServe"
        ) from error
