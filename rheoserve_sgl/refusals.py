"""What RheoServe does not serve, said at start-up with the flag or field and what to do instead."""

from rheoserve_sgl import BACKEND_NAME, PAGE_TOKENS
from rheoserve_sgl.config import PREFIX, RheoConfig, flag
from rheoserve_sgl.ops.extension import DTYPES
from rheoserve_sgl.ops.processors import usable_threads

# (ServerArgs field, is it a legal value, legal values and remedy)
_FLAGS = (
    (
        "page_size",
        lambda v: v in (None, PAGE_TOKENS),
        f"leave it out: RheoServe's pages have {PAGE_TOKENS} tokens",
    ),
    ("attention_backend", lambda v: v == BACKEND_NAME, "rheoserve: prefill and decode share its pool"),
    ("prefill_attention_backend", lambda v: v in (None, BACKEND_NAME), "leave it out, or rheoserve"),
    ("decode_attention_backend", lambda v: v in (None, BACKEND_NAME), "leave it out, or rheoserve"),
    ("speculative_algorithm", lambda v: v is None, "leave it out: speculative decoding is not supported"),
    (
        "enable_hierarchical_cache",
        lambda v: not v,
        "leave it out: RheoServe already keeps all KV in host memory",
    ),
    ("enable_hisparse", lambda v: not v, "leave it out: RheoServe selects blocks itself"),
    ("enable_flexkv", lambda v: not v, "leave it out: RheoServe already keeps all KV in host memory"),
    ("enable_lmcache", lambda v: not v, "leave it out: RheoServe already keeps all KV in host memory"),
    ("enable_page_major_kv_layout", lambda v: not v, "leave it out: RheoServe has its own layout"),
    ("enable_fused_qk_norm_rope", lambda v: not v, "leave it out"),
    (
        "kv_cache_dtype",
        lambda v: v in ("auto", "bfloat16", "bf16", "float16", "fp16"),
        "auto: no fp8 or fp4 KV cache",
    ),
    ("pp_size", lambda v: v == 1, "1: use --tp-size"),
    ("dcp_size", lambda v: v in (None, 1), "1: use --tp-size"),
    ("attn_cp_size", lambda v: v in (None, 1), "1: use --tp-size"),
    ("enable_prefill_cp", lambda v: not v, "leave it out: use --tp-size"),
    ("enable_memory_saver", lambda v: not v, "leave it out: the two tiers stay where they are"),
    ("disaggregation_mode", lambda v: v in (None, "null"), "null: prefill and decode share one pool"),
    ("dwdp_size", lambda v: v in (None, 0, 1), "leave it out: its ranks serve requests of their own; use --tp-size"),
    ("enable_dp_attention", lambda v: not v, "--tp-size, or a server a GPU behind SGLang's router"),
    (
        "dp_size",
        lambda v: v == 1,
        "1: each replica would count on all of the host's memory and processors. Start a "
        "server a GPU behind SGLang's router, each with its --rheoserve-host-size and --rheoserve-host-threads",
    ),
    ("nnodes", lambda v: v == 1, "1: tensor parallelism over several machines is not supported"),
    ("tokenizer_worker_num", lambda v: v == 1, "1: requests are checked in the process that takes them in"),
    ("enable_two_batch_overlap", lambda v: not v, "leave it out"),
    ("enable_torch_compile", lambda v: not v, "leave it out"),
    ("cuda_graph_backend_decode", lambda v: v in (None, "full", "disabled"), "full, or leave it out"),
    ("cuda_graph_backend_prefill", lambda v: v in (None, "disabled"), "leave it out: not supported yet"),
    ("enable_pdmux", lambda v: not v, "leave it out"),
)

# Fields of configs whose models have layers with a state instead of KV.
_RECURRENT = ("mamba_d_state", "linear_num_key_heads", "ssm_state_size", "mamba2_config")


def refuse_flags(server_args):
    """Raise ValueError for the first ServerArgs field that RheoServe cannot work with."""
    for field, legal, remedy in _FLAGS:
        value = getattr(server_args, field, None)
        if not legal(value):
            name = "--" + field.replace("_", "-")
            raise ValueError(f"{name} is {value!r}, which --attention-backend rheoserve cannot serve; use {remedy}")
    if server_args.rheoserve_tpot_slo_ms is not None and server_args.min_free_slots_delay:
        raise ValueError(
            f"--min-free-slots-delay is {server_args.min_free_slots_delay}; legal with --rheoserve-tpot-slo-ms: leave "
            "it out, because the objective may leave fewer slots free than that for good"
        )


def refuse_unused(server_args):
    """Raise ValueError for a RheoServe flag where another attention backend serves, which knows nothing of it."""
    for name, field in RheoConfig.__dataclass_fields__.items():
        value = getattr(server_args, PREFIX + name)
        if value != field.default:
            raise ValueError(
                f"{flag(name)} is {value!r}, but --attention-backend is {server_args.attention_backend!r}; legal: "
                f"{BACKEND_NAME}, or no --rheoserve-* flags"
            )


def refuse_graphs(server_args):
    """Raise ValueError for CUDA graphs that RheoServe cannot run in, whichever flag asked for them.

    Args:
        server_args: ServerArgs after SGLang has resolved them
    """
    decode = ("disabled",) if server_args.disable_decode_cuda_graph else ("full", "disabled")
    for phase, legal in (("decode", decode), ("prefill", ("disabled",))):
        backend = getattr(server_args.cuda_graph_config, phase).backend
        if backend not in legal:
            raise ValueError(
                f"--cuda-graph-config or --cuda-graph-backend-{phase}: the backend of {phase} is {backend!r}, which "
                f"--attention-backend rheoserve cannot serve here; legal: {' or '.join(legal)}"
            )


def refuse_threads(server_args):
    """Raise ValueError if the ranks would run more CPU threads than there are processors for them: they poll."""
    threads, ranks = server_args.rheoserve_host_threads, server_args.tp_size
    if ranks < 1:
        raise ValueError(f"--tp-size is {ranks}; legal: at least 1")
    most = max(usable_threads() // ranks, 1)
    if threads is not None and threads > most:
        raise ValueError(
            f"--rheoserve-host-threads is {threads}; legal: 1 to {most}, what affinity and CPU quota leave "
            + ("this process" if ranks == 1 else f"each of {ranks} ranks")
        )


def refuse_model(model_config):
    """Raise ValueError for a model architecture other than plain MHA/GQA decoders.

    Args:
        model_config: sglang.srt.configs.model_config.ModelConfig
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch

    config = model_config.hf_config
    text = model_config.hf_text_config
    name = (config.architectures or ["?"])[0]
    reason = None
    if model_config.attention_arch != AttentionArch.MHA:
        reason = "it uses multi-head latent attention (MLA)"
    elif model_config.is_hybrid_swa or _has_window(text):
        reason = "it has sliding-window layers"
    elif getattr(config, "is_encoder_decoder", False):
        reason = "it has cross-attention"
    elif not model_config.is_generation:
        reason = "it is an embedding or reward model"
    elif mambaish_config(model_config) is not None or any(hasattr(text, key) for key in _RECURRENT):
        reason = "it has Mamba or linear-attention layers"
    elif model_config.v_head_dim != model_config.head_dim:
        reason = f"its key and value head dims differ ({model_config.head_dim}, {model_config.v_head_dim})"
    elif model_config.head_dim % 16 or model_config.head_dim > 256:
        reason = f"its head_dim is {model_config.head_dim}; legal: multiples of 16 up to 256"
    elif model_config.num_attention_heads // model_config.num_key_value_heads > 16:
        reason = (
            f"more than 16 query heads share a KV head ({model_config.num_attention_heads} over "
            f"{model_config.num_key_value_heads})"
        )
    if reason:
        raise ValueError(
            f"{name} (--model-path) cannot be served by --attention-backend rheoserve because {reason}. "
            "It serves MHA and GQA decoders such as Qwen2, Qwen3, Llama and Mistral without a window; "
            "use another --attention-backend for this model."
        )


def refuse_gate(server_args, model_config):
    """Raise ValueError for gate weights that do not fit the model, or more dense layers than it has."""
    shape = model_shape(model_config)
    if server_args.rheoserve_gate_path is not None:
        from rheoserve_sgl.gate.checkpoint import read_gate

        read_gate(server_args.rheoserve_gate_path, shape)
        if server_args.tp_size > shape.kv_heads:
            raise ValueError(
                f"--tp-size is {server_args.tp_size}; legal with a learned gate: 1 to {shape.kv_heads}, the model's KV "
                "heads, because a gate's query is made of all query heads of a KV head"
            )
        if server_args.rheoserve_gate_rope == "last" and server_args.enable_mixed_chunk:
            raise ValueError(
                "--rheoserve-gate-rope is 'last'; legal with --enable-mixed-chunk: first, because decoded tokens then "
                "come with a prefill"
            )
    dense = server_args.rheoserve_dense_layers
    if dense is not None and dense > shape.layers:
        raise ValueError(f"--rheoserve-dense-layers is {dense}; legal: 0 to {shape.layers}, the model's layers")


def model_shape(model_config):
    """What gates depend on, of SGLang's ModelConfig."""
    from rheoserve_sgl.gate.checkpoint import ModelShape

    return ModelShape(
        layers=model_config.num_hidden_layers,
        heads=model_config.num_attention_heads,
        kv_heads=model_config.get_total_num_kv_heads(),
        head_dim=model_config.head_dim,
    )


def refuse_layers(model, ids: range):
    """Raise ValueError for an attention layer with a feature that the kernels lack, or a layer without attention.

    Args:
        model: the loaded nn.Module; its RadixAttention layers are looked at.
        ids: of the layers that have KV in the pool
    """
    from sglang.srt.layers.radix_attention import AttentionType

    layers = attention_layers(model)
    for path, layer in layers.items():
        features = {
            "a sliding window": (layer.sliding_window_size or -1) > 0,
            "logit soft-capping": (layer.logit_cap or 0.0) > 0.0,
            "cross-attention": layer.is_cross_attention,
            "bidirectional attention": layer.attn_type != AttentionType.DECODER,
            "a temperature by length": getattr(layer, "xai_temperature_len", -1) > 0,
        }
        for feature, present in features.items():
            if present:
                raise ValueError(
                    f"{path} has {feature}, which --attention-backend rheoserve cannot serve; "
                    "use another --attention-backend for this model"
                )
    # A step asks for the layers' attention one after another, by number.
    found = [layer.layer_id for layer in layers.values()]
    if found != list(ids):
        lacking = [index for index in ids if found.count(index) != 1] or sorted(set(found) - set(ids))
        raise ValueError(
            f"{type(model).__name__} (--model-path) has not one attention layer in each of its layers {ids.start} to "
            f"{ids.stop - 1}, as --attention-backend rheoserve needs it: layers {str(lacking)[:100]}; "
            "use another --attention-backend for this model"
        )


def refuse_dtype(server_args, dtype):
    """Raise ValueError for a dtype of KV, a torch.dtype, that SGLang took from the checkpoint's quantisation."""
    if dtype not in DTYPES:
        raise ValueError(
            f"--kv-cache-dtype is {server_args.kv_cache_dtype!r}, which the checkpoint's quantisation makes {dtype}; "
            "legal with --attention-backend rheoserve: bfloat16 or float16"
        )


def attention_layers(model) -> dict:
    """The RadixAttention layers of a loaded model, by path, in the order of their layer ids."""
    from sglang.srt.layers.radix_attention import RadixAttention

    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, RadixAttention)}
    return dict(sorted(found.items(), key=lambda item: item[1].layer_id))


def _has_window(config) -> bool:
    """Whether a Hugging Face config turns its sliding window on (Qwen2 ships one that is off)."""
    window = getattr(config, "sliding_window", None)
    return bool(window) and getattr(config, "use_sliding_window", True)
