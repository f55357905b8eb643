"""The hook table against the installed SGLang, and against patches/README.md."""

import inspect
import pkgutil
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

from rheoserve_sgl import SGLANG_VERSION
from rheoserve_sgl.hooks import HOOKS, Hook, misfit

README = Path(__file__).parents[1] / "patches" / "README.md"
FIELDS = ("Target", "Why", "How", "Upstream", "Goes when")


def test_sglang_is_the_release_this_is_made_for():
    assert version("sglang") == SGLANG_VERSION
    assert f"sglang=={SGLANG_VERSION}" in (README.parents[1] / "pyproject.toml").read_text()
    assert f"SGLang {SGLANG_VERSION}" in README.read_text()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_target_and_handler_exist_and_fit(hook):
    assert misfit(hook) == ""


def test_what_does_not_fit_is_named():
    leaving = "rheoserve_sgl.runtime.lifecycle.request_left"
    release = "sglang.srt.mem_cache.common.release_kv_cache"
    assert misfit(Hook(release, "before", leaving)) == ""
    assert "no_such_place" in misfit(Hook("sglang.srt.no_such_place.f", "before", leaving))
    assert "no_such_handler" in misfit(Hook(release, "before", "rheoserve_sgl.runtime.lifecycle.no_such_handler"))
    assert "missing a required argument" in misfit(Hook("os.getcwd", "before", leaving))
    args = "sglang.srt.server_args.ServerArgs"
    assert "is no subclass of it" in misfit(Hook(args, "replace", "rheoserve_sgl.hooks.Hook"))


def test_every_hook_has_an_entry_in_patches_and_every_entry_a_hook():
    text = README.read_text()
    entries = re.split(r"^### ", text, flags=re.M)[1:]
    documented = set()
    for entry in entries:
        for field in FIELDS:
            assert f"- **{field}**:" in entry, f"{entry.splitlines()[0]} lacks {field}"
        documented.add(re.search(r"- \*\*Target\*\*: `([^`]+)`", entry).group(1))
    registrations = {
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "sglang.srt.server_args.add_attention_backend_choices",
        "sglang.srt.platforms",
    }
    tapped = {"sglang.srt.layers.rotary_embedding.base.RotaryEmbedding"}
    assert documented == {hook.target for hook in HOOKS} | registrations | tapped


def test_what_the_tap_replaces_takes_its_arguments():
    rotary = pkgutil.resolve_name("sglang.srt.layers.rotary_embedding.base.RotaryEmbedding")
    for method in (rotary.forward_native, rotary.forward_cuda):
        assert list(inspect.signature(method).parameters)[1:4] == ["positions", "query", "key"]
    assert hasattr(rotary, "_compute_cos_sin_cache")


def test_entry_points_are_installed():
    plugins = {e.name: e.value for e in entry_points(group="sglang.srt.plugins")}
    platforms = {e.name: e.value for e in entry_points(group="sglang.srt.platforms")}
    assert plugins["rheoserve"] == "rheoserve_sgl.plugin:register"
    assert platforms["rheoserve_cpu"] == "rheoserve_sgl.runtime.platform_cpu:activate"


def test_a_hook_that_was_not_applied_is_named():
    from sglang.srt.plugins.hook_registry import HookRegistry

    from rheoserve_sgl.hooks import require_hooks

    before = set(HookRegistry._patched)
    try:
        HookRegistry._patched.update(hook.target for hook in HOOKS)
        require_hooks()
        HookRegistry._patched.discard(HOOKS[3].target)
        with pytest.raises(RuntimeError, match=re.escape(HOOKS[3].target)):
            require_hooks()
    finally:
        HookRegistry._patched.clear()
        HookRegistry._patched.update(before)


def test_a_process_that_was_spawned_may_launch_servers(tmp_path):
    """As training frameworks do: what checks flags and requests is in place there, too."""
    (tmp_path / "launcher.py").write_text(
        "import multiprocessing\n"
        "def child():\n"
        "    from sglang.srt.entrypoints.engine import Engine\n"
        "    from sglang.srt.plugins import load_plugins\n"
        "    load_plugins()\n"
        "    from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "    checked = [t.split('.')[-1] for t in HookRegistry._patched if 'TokenizerManager' in t]\n"
        "    print(Engine.server_args_class.__name__, checked)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start(), process.join()\n"
    )
    run = subprocess.run([sys.executable, tmp_path / "launcher.py"], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "RheoServerArgs ['_validate_one_request']", run.stderr[-2000:]


def test_main_process_gets_no_model_hooks():
    """The launching process must not import the model stack for us."""
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "from sglang.srt.server_args import ServerArgs, ATTENTION_BACKEND_CHOICES as choices\n"
        "ours = sorted(t for t in HookRegistry._patched if not t.endswith('add_cli_args'))\n"
        "print([t for t in ours if 'smg' not in t], ServerArgs.__name__, choices.count('rheoserve'))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    names = (
        "managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "sampling.sampling_params.SamplingParams.verify",
        "server_args.ServerArgs",
        "utils.auth.decide_request_auth",
    )
    ours = ["sglang.srt." + name for name in (*names, "utils.common.set_uvicorn_logging_configs")]
    assert out.splitlines()[-1] == f"{ours} RheoServerArgs 1"
