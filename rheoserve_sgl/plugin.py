"""The door: SGLang calls `register` in the launching process and in every scheduler process."""

import logging
import multiprocessing
import pkgutil
from importlib.metadata import version

from rheoserve_sgl import BACKEND_NAME, SGLANG_VERSION
from rheoserve_sgl.hooks import hooks_for

logger = logging.getLogger(__name__)


def register():
    """Add the backend's name and its factory, and register the hooks of this process's role.

    Raises:
        RuntimeError: another SGLang than the one this release was made for. SGLang logs it and goes on
            without the backend, whose name its argument parser then refuses.
    """
    if version("sglang") != SGLANG_VERSION:
        raise RuntimeError(f"RheoServe is made for sglang=={SGLANG_VERSION}; found {version('sglang')}")
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    in_scheduler = multiprocessing.parent_process() is not None
    for hook in hooks_for(in_scheduler):
        HookRegistry.register(hook.target, pkgutil.resolve_name(hook.handler), HookType(hook.kind))
    if in_scheduler:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        register_attention_backend(BACKEND_NAME)(make_backend)


def make_backend(model_runner):
    """SGLang's factory for the attention backend."""
    from rheoserve_sgl.backend import RheoAttnBackend

    return RheoAttnBackend(model_runner)
