"""Several processes train one model: they agree on what they decide by, their gradients are each other's mean, and a
whole run of two learns and writes its log once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing as mp
from nano_corpus import write_corpus
from serving import free_port

from benchmarks.nano.ranks import Ranks, launch

ROOT = Path(__file__).parents[1]


def average_of(rank: int, port: int, out: Path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    ranks = Ranks("cpu")
    some, other = (torch.nn.Parameter(torch.zeros(size)) for size in ((3, 2), (4,)))
    some.grad = torch.full_like(some, rank + 1.0)
    if rank:
        other.grad = torch.arange(4.0)
    ranks.average([some, other])
    torch.save({"some": some.grad, "other": other.grad, "agreed": ranks.agree(rank + 0.1)}, out / f"{rank}.pt")
    ranks.close()


def test_gradients_are_the_mean_and_decisions_the_first_ranks(tmp_path):
    mp.spawn(average_of, (free_port(), tmp_path), nprocs=2)
    for rank in range(2):
        told = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(told["some"], torch.full((3, 2), 1.5))
        assert torch.equal(told["other"], torch.arange(4.0) / 2)  # the first rank had none
        assert told["agreed"] == 0.1


def test_one_process_needs_no_other(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks, parameter = Ranks("cpu"), torch.nn.Parameter(torch.zeros(2))
    ranks.average([parameter])
    assert parameter.grad is None and ranks.agree(0.3) == 0.3 and (ranks.rank, ranks.count) == (0, 1)


def test_two_ranks_learn_one_model(tmp_path):
    write_corpus(tmp_path)
    command = [sys.executable, "-m", "benchmarks.nano.train", "--gpus", "2", "--corpus", str(tmp_path), "--tokenizer"]
    command += [str(tmp_path), "--out", str(tmp_path / "run"), "--steps", "40", "--tokens", "1024", "--context", "256"]
    command += ["--workers", "1", "--device", "cpu", "--lr", "0.01", "--gates", "0.1", "--hidden", "64", "--inner"]
    command += ["128", "--layers", "2", "--heads", "4", "--kv-heads", "1", "--head-dim", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    reports = [line for line in told if "loss" in line]
    assert [line["step"] for line in reports] == [20, 40]
    assert reports[-1]["tokens"] == 40 * 1024  # of both
    assert reports[-1]["loss"]["256"] < reports[0]["loss"]["256"]


def differs(rank: int, port: int, out: Path):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks("cpu")
    ranks.check([torch.ones(3)])
    try:
        ranks.check([torch.full((3,), 1.0 + rank)])
    except RuntimeError as error:
        (out / str(rank)).write_text(str(error))
    ranks.close()


def test_ranks_of_different_weights_are_told(tmp_path):
    mp.spawn(differs, (free_port(), tmp_path), nprocs=2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["rank 1 of 2 has other weights than the first one"]


def test_a_rank_that_fails_ends_the_others(tmp_path, monkeypatch):
    lines = ["import os, pathlib, subprocess, sys, time", "if os.environ['RANK'] == '0':"]
    lines += [f"    beside = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])"]
    lines += [f"    pathlib.Path({str(tmp_path / 'pids')!r}).write_text(f'{{os.getpid()}} {{beside.pid}}')"]
    lines += ["    time.sleep(600)", "time.sleep(3)", "sys.exit(3)"]
    (tmp_path / "uneven.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="of 2 ranks: rank 1 ended with 3"):
        launch("uneven", [], 2)
    left = [pid for pid in map(int, (tmp_path / "pids").read_text().split()) if psutil.pid_exists(pid)]
    assert all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in left)  # their parent is gone
