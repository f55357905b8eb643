"""How much memory there is, and how the tiers are sized by it."""

import math
from dataclasses import dataclass
from pathlib import Path

import psutil

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.config import DEFAULT_HOST_RATIO, RheoConfig
from rheoserve_sgl.ops.cgroups import OWN, ROOT, own_groups

GB = 10**9
HOST_SHARE = 0.7  # of the free host memory, at most, for a host store sized by default
CPU_DEVICE_SHARE = 0.05  # of the free memory, for frames where there is no GPU
# Of a cgroup, by its version: its limit and its use, and the line of memory.stat that tells what it can give back.
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
TABLES = 8  # bytes of residency and importance on the device for each block


@dataclass(frozen=True)
class Sizes:
    """Capacities in tokens, and how they came about in words for the log."""

    device_tokens: int
    host_tokens: int
    reason: str


def key_bytes(layers: int, heads: int, head_dim: int, itemsize: int, on_gpu: bool = True) -> float:
    """What the device holds for each token of the host store, whether it is resident or not: its part of a block's gate
    key, by the largest of the gates' (Quest's, float32 on a CPU), and of the tables."""
    return layers * heads / PAGE_TOKENS * (2 * head_dim * (itemsize if on_gpu else 4) + TABLES)


def stored_share(token_bytes: int, key_bytes: float) -> float:
    """Of a CPU's memory, the share that stored tokens may take: their gate keys lie beside them."""
    return token_bytes / (token_bytes + key_bytes)


def staging_bytes(heads: int, head_dim: int, itemsize: int) -> int:
    """What the device holds for each token of a prefix that a prefill attends to: keys and values of two layers, if of
    16 bits (see RheoAttnBackend._lanes)."""
    return 2 * 2 * heads * head_dim * itemsize if itemsize == 2 else 0


def free_host_bytes() -> int:
    """Memory that can be allocated: what the system has available, cut by the limits of its cgroups."""
    return max(min(psutil.virtual_memory().available, cgroup_room()), 0)


def cgroup_room(root: Path = ROOT, own: Path = OWN) -> float:
    """Bytes that its cgroups leave this process, file pages that they can give back counted; infinite where there is no
    limit; Args as in `own_groups`."""
    return min(_room(folder, *FILES[version]) for folder, version in own_groups("memory", root, own))


def _room(group: Path, limit: str, usage: str, idle: str) -> float:
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return math.inf
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - int((group / usage).read_text()) + int(stat.get(idle, 0))
    except (OSError, ValueError):
        return math.inf


def size_tiers(
    config: RheoConfig,
    *,
    token_bytes: int,
    free_bytes: int,
    profiled_tokens: int | None,
    max_total_tokens: int | None = None,
    key_bytes: float = 0.0,
    staging_bytes: int = 0,
    context: int = 0,
) -> Sizes:
    """Decide the capacities of both tiers for one rank.

    Args:
        token_bytes: KV bytes of a token over all layers of this rank
        free_bytes: free host memory that this rank may count on
        profiled_tokens: what fits on the device by SGLang's profiling; None where frames are in host memory
        max_total_tokens: `--max-total-tokens`, an upper bound on the host store
        key_bytes: on the device (a CPU's is the host) for each token of the host store; see the function of that name
        staging_bytes: on the device for each token of the longest prefix; see the function of that name
        context: tokens of the longest request

    Raises:
        ValueError: a host store, or frames, that memory cannot hold, with the numbers
    """
    on_cpu = profiled_tokens is None
    if config.device_tokens is not None:
        device, why = config.device_tokens, "--rheoserve-device-tokens"
    elif on_cpu:
        device, why = (
            int(free_bytes * CPU_DEVICE_SHARE / token_bytes),
            f"{CPU_DEVICE_SHARE:.0%} of free memory",
        )
    else:
        device, why = profiled_tokens, "memory profiling"
    if not on_cpu and device > profiled_tokens:
        raise ValueError(
            f"--rheoserve-device-tokens is {device}, but only {profiled_tokens} tokens fit beside the weights; "
            "lower it, or raise --mem-fraction-static"
        )
    reason = f"device {device} tokens ({why}), "
    beside = device * token_bytes if on_cpu else 0
    stored = stored_share(token_bytes, key_bytes) if on_cpu else 1.0
    most = int((free_bytes - beside) * stored / token_bytes)
    if config.host_size is not None:
        host = int(config.host_size * GB / token_bytes)
        reason += f"host {host} tokens (--rheoserve-host-size {config.host_size})"
    else:
        ratio = DEFAULT_HOST_RATIO if config.host_ratio is None else config.host_ratio
        host = int(device * ratio)
        reason += f"host {host} tokens ({ratio:g} times the device's)"
        cap = int(most * HOST_SHARE)
        if config.host_ratio is None and host > cap:
            host = cap
            reason += f", capped at {HOST_SHARE:.0%} of {free_bytes / GB:.1f} GB free host memory: {host} tokens"
    if max_total_tokens is not None and host > max_total_tokens:
        host = max_total_tokens
        reason += f", cut by --max-total-tokens to {host}"
    host, device = host // PAGE_TOKENS * PAGE_TOKENS, device // PAGE_TOKENS * PAGE_TOKENS
    if host > most:
        name = "--rheoserve-host-size" if config.host_size is not None else "--rheoserve-host-ratio"
        raise ValueError(
            f"{name} asks for a host store of {host * token_bytes / GB:.2f} GB ({host} tokens of {token_bytes} "
            f"bytes), but {free_bytes / GB:.2f} GB of host memory are free and {beside / GB:.2f} GB of it go to "
            f"frames{f', {1 - stored:.0%} of the rest to gate keys' if stored < 1 else ''}; legal: at most "
            f"{max(most, 0) * token_bytes / GB:.2f} GB"
        )
    others = host * key_bytes + min(host, context) * staging_bytes
    if not on_cpu and device > (room := profiled_tokens - math.ceil(others / token_bytes)):
        if config.device_tokens is not None:
            raise ValueError(
                f"--rheoserve-device-tokens is {device}, but only {max(room, 0)} tokens fit beside the weights, the "
                f"gate's keys of {host} tokens in host memory, and two layers of a prefix of {min(host, context)} "
                "tokens; lower it, --rheoserve-host-size or --context-length, or raise --mem-fraction-static"
            )
        device = max(room, 0) // PAGE_TOKENS * PAGE_TOKENS
        reason += f"; gate keys and prefixes that are attended to leave room for {device} on the device"
        if device < PAGE_TOKENS:
            raise ValueError(
                f"no room for KV on the device: {profiled_tokens} tokens fit beside the weights, and "
                f"{others / GB:.2f} GB go to the gate's keys of {host} tokens in host memory and to two layers of a "
                f"prefix of {min(host, context)} tokens; lower --rheoserve-host-size or --context-length, or raise "
                "--mem-fraction-static"
            )
    if host < PAGE_TOKENS or device < PAGE_TOKENS:
        raise ValueError(
            f"no room for KV: the host store would hold {host} tokens and the device {device}; "
            f"free memory, or raise --rheoserve-host-size or --rheoserve-device-tokens (at least {PAGE_TOKENS})"
        )
    if device > host:
        device = host
        reason += f"; the device needs no more than the host store's {host}"
    return Sizes(device, host, reason)
