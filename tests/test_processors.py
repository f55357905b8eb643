"""How many threads a process may use, and that one head's blocks keep all of them busy."""

import math
import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from rheoserve_sgl.ops import processors
from rheoserve_sgl.ops.attention import attend_cpu
from rheoserve_sgl.ops.plan import Visit
from rheoserve_sgl.ops.processors import cpu_quota, own_part, pinned, usable_threads


def write(folder: Path, **files: str):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_quota_of_version_2_is_the_smallest_on_the_way_up(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    assert cpu_quota(tmp_path, own) == math.inf
    write(tmp_path / "a", cpu__max="150000 100000\n")
    write(tmp_path / "a" / "b", cpu__max="max 100000\n")
    assert cpu_quota(tmp_path, own) == 1.5
    write(tmp_path / "a" / "b", cpu__max="50000 100000\n")
    assert cpu_quota(tmp_path, own) == 0.5
    write(tmp_path, cpu__max="20000 100000\n")
    assert cpu_quota(tmp_path, own) == 0.2


def test_a_quota_of_version_1(tmp_path):
    own = tmp_path / "own"
    own.write_text("7:memory:/elsewhere\n4:cpu,cpuacct:/a\n")
    write(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(tmp_path / "cpu,cpuacct" / "a", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert cpu_quota(tmp_path, own) == 3.0


@pytest.mark.parametrize("text", ["", "nonsense", "max"])
def test_what_cannot_be_read_limits_nothing(text, tmp_path):
    write(tmp_path, cpu__max=text)
    assert cpu_quota(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1.9, 1), (math.inf, len(os.sched_getaffinity(0)))])
def test_threads_are_affinity_cut_by_the_quota(quota, expected, monkeypatch):
    monkeypatch.setattr(processors, "cpu_quota", lambda: quota)
    assert usable_threads() == expected


@pytest.mark.parametrize(
    ("masks", "parts"),
    [
        ([[0, 1, 2, 3]] * 2, [[0, 1], [2, 3]]),
        ([[0, 1, 2, 3]] * 3, [[0], [1], [2, 3]]),
        ([[0, 1], [2, 3]], [[0, 1], [2, 3]]),  # each bound to its NUMA node
        ([[0, 1, 4], [2, 3], [0, 1, 4], [2, 3]], [[0], [2], [1, 4], [3]]),
        ([[0, 1, 2, 3], [2, 3]], [[0, 1, 2], [3]]),  # one of them bound
        ([[5]], [[5]]),
    ],
)
def test_ranks_share_what_the_same_of_them_may_use(masks, parts):
    assert [own_part(masks, rank) for rank in range(len(masks))] == parts


def test_polling_threads_have_a_processor_each_or_none():
    assert pinned([0, 1, 2, 5], 3) == [1, 2, 5]
    assert pinned([0, 1], 3) == []


@pytest.mark.skipif(usable_threads() < 2, reason="needs two processors")
def test_one_head_of_one_request_keeps_all_threads_busy():
    """By the processor time of each thread."""
    count = 256
    blocks = torch.randn(count, 2, 64, 128)
    ids = torch.arange(count, dtype=torch.int32).view(1, 1, count)
    visit = Visit(ids, torch.full((1, 1), count, dtype=torch.int32), torch.full((1, 1), 64, dtype=torch.int32))
    q = torch.randn(1, 1, 8, 128)
    attend = lambda: attend_cpu(q, ((blocks, visit),), 0.1, 2)  # noqa: E731
    attend()
    process = psutil.Process()
    before = {thread.id: thread.user_time for thread in process.threads()}
    began = time.perf_counter()
    while time.perf_counter() - began < 2.0:
        attend()
    spent = sorted(thread.user_time - before.get(thread.id, 0.0) for thread in process.threads())[-2:]
    assert spent[0] > 0.1 * sum(spent), spent  # without a split the second has nothing; other work takes its turns
