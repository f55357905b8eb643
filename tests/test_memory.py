"""Sizes of the tiers, and refusals with the numbers."""

import math

import pytest
import torch

from rheoserve_sgl.config import RheoConfig
from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.runtime.memory import GB, cgroup_room, free_host_bytes, key_bytes, size_tiers

TOKEN = 10_000  # bytes


def sizes(free=100 * GB, profiled=None, top=None, keys=0.0, staged=0, context=0, **settings):
    return size_tiers(
        RheoConfig(**settings),
        token_bytes=TOKEN,
        free_bytes=free,
        profiled_tokens=profiled,
        max_total_tokens=top,
        key_bytes=keys,
        staging_bytes=staged,
        context=context,
    )


def test_cpu_defaults_are_a_modest_share():
    got = sizes()
    assert got.device_tokens == 5 * GB // TOKEN // 64 * 64
    assert got.host_tokens == pytest.approx(4 * got.device_tokens, abs=256)
    assert "5% of free memory" in got.reason


def test_gpu_default_is_what_profiling_yields():
    got = sizes(profiled=100_000)
    assert got.device_tokens == 100_000 // 64 * 64
    assert got.host_tokens == 400_000 // 64 * 64


def test_default_host_store_is_capped_and_says_so():
    got = sizes(free=10 * GB, profiled=1_000_000)
    assert got.host_tokens == int(10 * GB / TOKEN * 0.7) // 64 * 64
    assert "capped at 70%" in got.reason


def test_ratio_size_and_max_total_tokens():
    assert sizes(profiled=64_000, host_ratio=10.0).host_tokens == 640_000
    assert sizes(profiled=64_000, host_size=3.2).host_tokens == 320_000
    assert sizes(profiled=64_000, top=128_000).host_tokens == 128_000
    assert sizes(device_tokens=128_000, top=6_400).device_tokens == 6_400


def test_a_host_store_that_memory_cannot_hold_is_refused_with_the_numbers():
    with pytest.raises(
        ValueError,
        match=r"--rheoserve-host-size asks for a host store of 200.00 GB .* 100.00 GB of host memory are free",
    ):
        sizes(host_size=200.0, device_tokens=64)
    with pytest.raises(ValueError, match="--rheoserve-host-ratio asks"):
        sizes(host_ratio=1e6)


def test_gate_keys_of_the_host_store_take_their_part_of_the_device():
    """Of 100,000 tokens that fit, the keys of 4,000,000 at a hundredth of a token each leave 60,000."""
    got = sizes(profiled=100_000, host_size=40.0, keys=TOKEN / 100)
    assert got.host_tokens == 4_000_000 and got.device_tokens == 60_000 // 64 * 64
    assert "gate keys and prefixes that are attended to leave room for 59968" in got.reason
    assert sizes(profiled=100_000, host_size=40.0, keys=TOKEN / 100, device_tokens=6400).device_tokens == 6400
    with pytest.raises(ValueError, match="--rheoserve-device-tokens is 64000, but only 60000 tokens fit beside the we"):
        sizes(profiled=100_000, host_size=40.0, keys=TOKEN / 100, device_tokens=64_000)
    with pytest.raises(ValueError, match="no room for KV on the device: 30000 tokens fit .* keys of 4000000 tokens"):
        sizes(profiled=30_000, host_size=40.0, keys=TOKEN / 100)


def test_on_a_cpu_gate_keys_take_their_part_of_the_host_memory():
    """Of 100 GB, 5 for frames, half of the rest is for keys as large as what is stored."""
    assert sizes(host_size=47.0, keys=TOKEN).device_tokens == sizes(host_size=47.0).device_tokens
    with pytest.raises(
        ValueError, match="5.00 GB of it go to frames, 50% of the rest to gate keys; legal: at most 47.50"
    ):
        sizes(host_size=48.0, keys=TOKEN)


def test_prefixes_that_a_prefill_attends_to_take_their_part_of_the_device():
    """Of 100,000 tokens that fit, one of 30,000 at a twentieth of a token each leaves 98,500; none is longer than the
    host store."""
    staged = {"profiled": 100_000, "staged": TOKEN // 20}
    assert sizes(**staged, context=30_000).device_tokens == 98_500 // 64 * 64
    assert sizes(**staged, context=10**7, host_size=1.92).device_tokens == 90_400 // 64 * 64
    with pytest.raises(ValueError, match="only 98500 tokens fit beside .* two layers of a prefix of 30000 tokens"):
        sizes(**staged, context=30_000, device_tokens=99_008)
    assert sizes(**staged, context=30_000, device_tokens=98_432).device_tokens == 98_432


@pytest.mark.parametrize("selector", ["quest", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_gates_keys_are_larger_than_what_is_reserved(selector, dtype):
    gate = make_gate(selector)
    of_block = gate.key_dim(128) * gate.key_dtype(dtype, "cuda").itemsize
    assert of_block * 36 * 8 / 64 <= key_bytes(36, 8, 128, dtype.itemsize)


def test_device_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="--rheoserve-device-tokens is 6400, but only 640 tokens fit"):
        sizes(profiled=640, device_tokens=6400)


def test_no_room_at_all():
    with pytest.raises(ValueError, match="no room for KV"):
        sizes(free=100_000)


def test_a_containers_file_cache_counts_as_free(tmp_path):
    own = tmp_path / "own"
    assert cgroup_room(tmp_path, own) == math.inf
    files = {"memory.max": "1000000\n", "memory.current": "900000\n", "memory.stat": "anon 1\ninactive_file 300000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cgroup_room(tmp_path, own) == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_room(tmp_path, own) == math.inf


def test_the_least_room_of_all_groups_around_a_process_counts(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n3:memory:/c\n")
    inner, old = tmp_path / "a" / "b", tmp_path / "memory" / "c"
    for folder, names in (
        (inner, ("memory.max", "memory.current")),
        (old, ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ):
        folder.mkdir(parents=True)
        for name, text in zip(names, ("1000\n", "900\n"), strict=True):
            (folder / name).write_text(text)
    (inner / "memory.stat").write_text("inactive_file 0\n")
    assert cgroup_room(tmp_path, own) == 100
    (old / "memory.stat").write_text("total_inactive_file 0\n")
    (inner / "memory.max").write_text("max\n")
    assert cgroup_room(tmp_path, own) == 100
    (old / "memory.usage_in_bytes").write_text("300\n")
    assert cgroup_room(tmp_path, own) == 700


def test_free_host_bytes_is_plausible():
    assert 2**20 < free_host_bytes() < 2**50
