"""Start-up: what is refused, in words, and what the installed plugin does when it is not asked for."""

import subprocess
import sys

import pytest
from serving import launch_command

from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.refusals import refuse_dtype, refuse_layers

# Each needs no weights, so all are tried in one process; the last tests start real servers.
REFUSED = {
    "--page-size 32": "--page-size is 32.*pages have 64 tokens",
    "--enable-hierarchical-cache": "--enable-hierarchical-cache is True",
    "--enable-hisparse": "--enable-hisparse is True",
    "--kv-cache-dtype fp8_e5m2": "--kv-cache-dtype is 'fp8_e5m2'.*auto",
    "--tp-size 2 --dp-size 2 --enable-dp-attention": "--enable-dp-attention is True.*--tp-size",
    "--pp-size 2": "--pp-size is 2.*--tp-size",
    "--dp-size 2": "--dp-size is 2.*router",
    "--nnodes 2": "--nnodes is 2.*several machines",
    "--tokenizer-worker-num 2": "--tokenizer-worker-num is 2.*checked",
    "--speculative-algorithm NGRAM": "--speculative-algorithm is 'NGRAM'",
    "--prefill-attention-backend torch_native": "--prefill-attention-backend is 'torch_native'",
    "--disaggregation-mode prefill": "--disaggregation-mode is 'prefill'",
    "--attn-cp-size 2 --tp-size 2": "--attn-cp-size is 2.*--tp-size",
    "--enable-memory-saver": "--enable-memory-saver is True",
    '--cuda-graph-config {"prefill":{"backend":"breakable"}}': "--cuda-graph-config.* prefill is 'breakable'.*disabled",
    '--cuda-graph-config {"decode":{"backend":"breakable"}}': "--cuda-graph-config.* decode is 'breakable'",
    "--attention-backend torch_native --rheoserve-mode full": (
        "--rheoserve-mode is 'full', but --attention-backend is 'torch_native'; legal: rheoserve"
    ),
    "--tp-size 0": "--tp-size is 0; legal: at least 1",
    "--cuda-graph-backend-decode breakable": "--cuda-graph-backend-decode is 'breakable'.*full",
    "--rheoserve-token-budget 100": "--rheoserve-token-budget is 100; legal: a multiple of 64",
    "--rheoserve-threshold 2": "--rheoserve-threshold is 2.0",
    "--rheoserve-selector seer": "--rheoserve-selector is 'seer'; legal: seer with --rheoserve-gate-path",
    "--rheoserve-gate-path /nowhere": "--rheoserve-gate-path is '/nowhere', which has no config.json",
    "--rheoserve-host-threads 5000": r"--rheoserve-host-threads is 5000; legal: 1 to \d+, what affinity",
    "--tp-size 2 --rheoserve-host-threads 5000": "--rheoserve-host-threads is 5000.*each of 2 ranks",
    "--rheoserve-dense-layers 9": "--rheoserve-dense-layers is 9; legal: 0 to 4",
    "--tp-size 2 --dwdp-size 2": "--dwdp-size is 2.*--tp-size",
    "--rheoserve-tpot-slo-ms 16 --min-free-slots-delay 4": "--min-free-slots-delay is 4; legal with --rheoserve-tpot",
}
TRY_ALL = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
for flags in sys.argv[2:]:
    try:
        prepare_server_args(["--model-path", sys.argv[1], "--attention-backend", "rheoserve", *flags.split()])
        print("ANSWER none")
    except (ValueError, RuntimeError) as error:
        print("ANSWER", str(error).replace(chr(10), " "))
"""


def python(code: str, *args: str, **kwargs) -> str:
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=200, **kwargs)
    return run.stdout + run.stderr


def answers(output: str) -> list[str]:
    return [line.removeprefix("ANSWER ") for line in output.splitlines() if line.startswith("ANSWER ")]


def test_flags_that_cannot_work_are_refused_by_name(checkpoints):
    import re

    given = answers(python(TRY_ALL, str(checkpoints.path()), *REFUSED))
    assert len(given) == len(REFUSED)
    for (flags, pattern), message in zip(REFUSED.items(), given, strict=True):
        assert re.search(pattern, message), f"{flags}: {message}"


CONFIGS = {
    "MLA": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
        },
        "multi-head latent attention",
    ),
    "window": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096},
        "sliding-window",
    ),
    "dim": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 72}, "head_dim is 72"),
    "group": (
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_key_value_heads": 1,
        },
        "more than 16 query heads",
    ),
}


def test_models_that_cannot_work_are_refused_by_name(tmp_path, checkpoints):
    import json
    import shutil

    base = {
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
        "rms_norm_eps": 1e-6,
    }
    code = TRY_ALL.replace('"--model-path", sys.argv[1]', '"--model-path", flags').replace(", *flags.split()", "")
    for name, (config, _) in CONFIGS.items():
        shutil.copytree(checkpoints.path(), tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(base | config))
    given = answers(python(code, "-", *(str(tmp_path / name) for name in CONFIGS)))
    for (name, (_, reason)), message in zip(CONFIGS.items(), given, strict=True):
        assert reason in message and "--attention-backend" in message, f"{name}: {message}"


def test_a_model_of_short_convolutions_is_refused(tmp_path, checkpoints):
    """SGLang has to be told to do without its tree for these; then it is for us to say so."""
    import json
    import shutil

    config = {"architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    config |= {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    shutil.copytree(checkpoints.path(), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    [message] = answers(python(TRY_ALL, str(tmp_path / "model"), "--disable-radix-cache"))
    assert "Lfm2ForCausalLM" in message and "linear-attention layers" in message


def test_layers_with_features_the_kernels_lack_are_refused_by_path():
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

    model = torch.nn.Module()
    model.attn = RadixAttention(4, 64, 0.125, 2, layer_id=0, logit_cap=30.0)
    with pytest.raises(ValueError, match="attn has logit soft-capping"):
        refuse_layers(model, range(1))


@pytest.mark.parametrize(
    ("ids", "lacking"), [((), "0, 1, 2"), ((0, 2), "1"), ((0, 1, 1, 2), "1"), ((0, 1, 2, 3), "3"), ((0, 1, 2), None)]
)
def test_models_with_layers_without_attention_are_refused(ids, lacking):
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

    model = torch.nn.ModuleList(RadixAttention(4, 64, 0.125, 2, layer_id=index) for index in ids)
    if lacking is None:
        return refuse_layers(model, range(3))
    with pytest.raises(ValueError, match=rf"layers 0 to 2, as --attention-backend .* layers \[{lacking}\]"):
        refuse_layers(model, range(3))


def test_a_dtype_from_the_checkpoint_is_refused():
    from types import SimpleNamespace

    import torch

    refuse_dtype(None, torch.bfloat16)
    with pytest.raises(ValueError, match="--kv-cache-dtype is 'auto'.*float8_e4m3fn; legal .*bfloat16"):
        refuse_dtype(SimpleNamespace(kv_cache_dtype="auto"), torch.float8_e4m3fn)


def test_a_model_without_a_config_takes_the_flags():
    """SGLang resolves nothing of it, and neither do we."""
    code = TRY_ALL.replace("sys.argv[1]", "flags").replace("*flags.split()", '"--rheoserve-mode", "full"')
    assert answers(python(code, "-", "dummy", "none")) == ["none", "none"]


def test_without_the_backend_nothing_changes(checkpoints):
    """ServerArgs resolves to the same values with and without the plugin."""
    code = """
import sys, dataclasses
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(["--model-path", sys.argv[1], "--attention-backend", "torch_native", "--random-seed", "1"])
fields = dataclasses.asdict(args)
print("ANSWER", sorted((k, str(v)) for k, v in fields.items() if not k.startswith("rheoserve_")))
"""
    import os

    with_plugin = answers(python(code, str(checkpoints.path())))
    platform_only = os.environ | {"SGLANG_PLUGINS": "rheoserve_cpu"}
    assert with_plugin and with_plugin == answers(python(code, str(checkpoints.path()), env=platform_only))


def test_flags_in_help_and_yaml(checkpoints, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("attention-backend: rheoserve\nrheoserve-mode: retrieval\nrheoserve-token-budget: 2048\n")
    code = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args, ServerArgs
import argparse
parser = argparse.ArgumentParser(); ServerArgs.add_cli_args(parser)
text = parser.format_help()
args = prepare_server_args(["--config", sys.argv[2], "--model-path", sys.argv[1]])
print("ANSWER", args.rheoserve_mode, args.rheoserve_token_budget, args.page_size, text.count("RheoServe:"))
"""
    flags = len(RheoConfig.__dataclass_fields__)
    assert answers(python(code, str(checkpoints.path()), str(config))) == [f"retrieval 2048 64 {flags}"]


@pytest.mark.server
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rheoserve-host-size", "5000"], "asks for a host store of 5000.00 GB"),
        (["--rheoserve-mode", "fast"], "invalid choice: 'fast'"),
    ],
    ids=["host-size", "mode"],
)
def test_a_real_server_exits_with_the_message(flags, message, checkpoints):
    command = launch_command(checkpoints.path(), ["--attention-backend", "rheoserve", *flags], 31999)
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr


@pytest.mark.server
def test_a_missing_extension_ends_the_server(checkpoints, tmp_path):
    """As after a copy of the Python files without a build."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['rheoserve_sgl._C'] = None\n")
    import os

    command = launch_command(checkpoints.path(), ["--attention-backend", "rheoserve"], 31998)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert run.returncode != 0
    assert "the compiled extension, cannot be loaded" in run.stdout + run.stderr


@pytest.mark.server
def test_a_lost_hook_ends_the_server(checkpoints, tmp_path):
    """SGLang logs a hook that fails to apply and goes on; RheoServe does not."""
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing, sys\n"
        "if multiprocessing.parent_process() is not None or 'spawn' in ' '.join(sys.orig_argv):\n"
        "    import rheoserve_sgl.hooks as hooks\n"
        "    hooks.hooks_for = lambda in_scheduler: [h for h in hooks.HOOKS if 'release_kv_cache' not in h.target]\n"
    )
    import os

    command = launch_command(checkpoints.path(), ["--attention-backend", "rheoserve"], 31997)
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert run.returncode != 0
    assert "hooks into SGLang are not in place: sglang.srt.mem_cache.common.release_kv_cache" in run.stdout + run.stderr
