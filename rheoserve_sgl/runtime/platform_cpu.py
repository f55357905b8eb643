"""A CPU platform for SGLang, for machines that have no accelerator.

SGLang 0.5.17 serves on x86 CPUs with AMX through another build of its kernel package. As a platform out of
its tree, plain torch operators are used instead, and any x86 or Arm processor will do.
"""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from rheoserve_sgl import BACKEND_NAME, environ


def activate() -> str | None:
    """SGLang's entry point: the platform's class name, or None to stay out of the way.

    That is where there is an accelerator, and where SGLANG_USE_CPU_ENGINE asks for SGLang's own.
    """
    accelerators = (torch.cuda.is_available(), torch.xpu.is_available(), torch.backends.mps.is_available())
    if any(accelerators) or environ.wants_sglang_cpu_engine():
        return None
    return f"{__name__}.PlainCpuPlatform"


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU whose operators are torch's own."""

    _enum = PlatformEnum.OOT

    def get_device(self, local_rank: int = 0) -> str:
        return "cpu"  # a string: SGLang splits it at ":"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_graph_runner_cls(self) -> type:
        from sglang.srt.model_executor.cpu_graph_runner import CPUGraphRunner

        return CPUGraphRunner

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        from rheoserve_sgl.cache.allocator import PlainPagedAllocator

        return PlainPagedAllocator

    def is_pin_memory_available(self, device=None) -> bool:
        return False


def support_triton(original, backend: str) -> bool:
    """AROUND `support_triton`: no Triton for our backend where there is no GPU to run it."""
    if backend == BACKEND_NAME and not torch.cuda.is_available():
        return False
    return original(backend)


def plain_groups(*args, **kwargs):
    """BEFORE `init_model_parallel_group`: on our platform, groups without NCCL and custom all-reduce."""
    from sglang.srt.platforms import current_platform

    if isinstance(current_platform, PlainCpuPlatform):
        kwargs |= {"use_pynccl": False, "use_custom_allreduce": False}
    return args, kwargs


def plain_bitmask(original, vocab_size: int, batch_size: int) -> torch.Tensor:
    """AROUND xgrammar's `_allocate_token_bitmask`, which pins: there is no driver to do it."""
    if torch.cuda.is_available():
        return original(vocab_size, batch_size)
    import xgrammar

    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)


def apply_bitmask(original, grammar, logits: torch.Tensor, vocab_mask: torch.Tensor):
    """AROUND `XGrammarGrammar.apply_vocab_mask`, which refuses a CPU: xgrammar has an operator for it."""
    if logits.device.type != "cpu":
        return original(grammar, logits, vocab_mask)
    import xgrammar

    return xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
