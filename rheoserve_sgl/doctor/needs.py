"""What memory a load needs in both tiers, and the flags for it: `python -m rheoserve_sgl plan`."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.runtime.memory import (
    CPU_DEVICE_SHARE,
    GB,
    free_host_bytes,
    key_bytes,
    staging_bytes,
    stored_share,
)

DEVICE_SHARE = 0.85  # of the GPU's free memory for weights and frames; SGLang measures it when it starts
MARGIN = 1.02  # for pages that are not full, and those of the step to come


@dataclass(frozen=True)
class Load:
    """So many requests of so many tokens, prompt and answer together."""

    context: int
    concurrency: int

    @property
    def tokens(self) -> int:
        pages = math.ceil(self.context / PAGE_TOKENS)
        return math.ceil(self.concurrency * pages * MARGIN) * PAGE_TOKENS


@dataclass(frozen=True)
class Needs:
    """Bytes of one rank.

    token_bytes: K and V of a token over all layers
    key_bytes: of the gate's keys and the tables on the device (a CPU's is the host), for each token of the host store
    weights: of the model
    staging_bytes: of two layers that a prefill attends to, for each token of the longest prefix
    longest: tokens that the model was made for
    heads: its head dim, KV heads, query heads to each, and the dtype of K and V
    """

    token_bytes: int
    key_bytes: float
    weights: int
    staging_bytes: int = 0
    longest: int = 1 << 31
    heads: tuple[int, int, int, torch.dtype] = (128, 8, 4, torch.bfloat16)

    def host(self, load: Load) -> int:
        return load.tokens * self.token_bytes

    def beside(self, load: Load) -> float:
        """What the device holds beside weights and frames."""
        return load.tokens * self.key_bytes + load.context * self.staging_bytes

    def frames(self, load: Load, device: int) -> int:
        """Tokens that the frames hold beside the weights, at most those of the load."""
        room = device * DEVICE_SHARE - self.weights - self.beside(load)
        return min(max(int(room / self.token_bytes), 0) // PAGE_TOKENS * PAGE_TOKENS, load.tokens)


def needs_of(model: Path, tp_size: int, on_gpu: bool) -> Needs:
    """What a local checkpoint needs, of each of `tp_size` ranks, with Quest's keys, the largest of the gates'.

    Raises:
        ValueError: a model that RheoServe does not serve, or not on so many ranks, or a folder without weights
    """
    from sglang.srt.configs.model_config import ModelConfig

    from rheoserve_sgl.refusals import refuse_model

    if not (model / "config.json").is_file():
        raise ValueError(f"--model is {str(model)!r}; legal: a folder with a config.json, a Hugging Face checkpoint")
    config = ModelConfig(str(model))
    refuse_model(config)
    query, key = config.num_attention_heads, config.get_total_num_kv_heads()
    if query % tp_size or max(key, tp_size) % min(key, tp_size):
        raise ValueError(
            f"--tp-size is {tp_size}; legal: divisors of the model's {query} heads that divide its {key} KV heads, or "
            "are multiples of them"
        )
    files = [file for ending in ("*.safetensors", "*.bin") for file in model.glob(ending)]
    if not files:
        raise ValueError(f"--model is {str(model)!r}, which has no weights; legal: *.safetensors or *.bin in it")
    heads, itemsize = config.get_num_kv_heads(tp_size), config.dtype.itemsize
    layers, dim = config.num_hidden_layers, config.head_dim
    return Needs(
        token_bytes=2 * layers * heads * dim * itemsize,
        key_bytes=key_bytes(layers, heads, dim, itemsize, on_gpu),
        weights=sum(file.stat().st_size for file in files) // tp_size,
        staging_bytes=staging_bytes(heads, dim, itemsize),
        longest=config.context_len,
        heads=(dim, heads, max(config.num_attention_heads // tp_size // heads, 1), config.dtype),
    )


def advise(load: Load, needs: Needs, host: int, device: int | None, command: list[str]) -> tuple[list[str], bool]:
    """(lines to print, whether it fits).

    Args:
        host: free bytes of host memory for this rank
        device: free bytes of the rank's GPU; None: it serves on the CPU
        command: the model's part of a launch command
    """
    wanted, room, each = needs.host(load), host, needs.host(Load(load.context, 1))
    if device is None:  # Weights, frames and the gate's keys are there as well.
        stored = stored_share(needs.token_bytes, needs.key_bytes)
        room = int((host - needs.weights) * (1 - CPU_DEVICE_SHARE) * stored)
    most = max(room // each, 0)
    lines = [
        f"KV of a token: {needs.token_bytes:,} bytes; weights: {needs.weights / GB:.2f} GB",
        f"host store: {wanted / GB:.2f} GB for {load.concurrency} x {load.context:,} tokens; {host / GB:.2f} GB free",
    ]
    fits = wanted <= room
    lines.append(f"{'' if fits else 'does not fit: '}host memory holds {most} such requests at once")
    if device is not None:
        beside, frames = needs.beside(load), needs.frames(load, device)
        share = frames / load.tokens
        lines.append(
            f"device: {device / GB:.2f} GB free; {needs.weights / GB:.2f} GB for weights, {beside / GB:.2f} GB for the "
            f"gate's keys and a prefill's prefix, and in what is left frames for about {frames:,} tokens, {share:.0%} "
            f"of all (all of them: {wanted / GB:.2f} GB)"
        )
        if frames < PAGE_TOKENS:
            lines.append("does not fit: no room for frames beside the weights")
            fits = False
        elif share >= 1:
            lines.append("all of it fits the device: SGLang's own attention backends are faster")
    if fits:
        flags = ["--attention-backend", "rheoserve", "--rheoserve-host-size", f"{wanted / GB + 0.005:.2f}"]
        flags += ["--context-length", str(load.context), "--max-running-requests", str(load.concurrency)]
        lines.append(shlex.join(["python", "-m", "sglang.launch_server", *command, *flags]))
    return lines, fits


def free_device_bytes() -> int | None:
    return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None


def free_bytes(tp_size: int) -> int:
    """Of host memory, for each rank."""
    return free_host_bytes() // tp_size
