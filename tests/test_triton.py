"""The Triton kernels: under Triton's interpreter on any machine, compiled for several GPUs, run on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = [
    *("gpu_kernels.py", "gpu_lists.py", "gpu_moves.py", "gpu_prefill.py", "gpu_step.py", "gpu_synthetic.py"),
    "gpu_tokens.py",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("interpreted", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_triton_kernels(interpreted, file):
    """In a process of their own: whether Triton interprets is settled for good when it is imported."""
    env = dict(os.environ, TRITON_INTERPRET=str(int(interpreted)))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", Path(__file__).with_name(file)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


KERNELS = {
    *("_append", "_snapshot", "_tell", "_disturb", "_score", "_plan", "_list", "_attend_split", "_merge"),
    *("_queries", "_tap", "_gather", "_pair", "_claim", "_fold", "_pool", "_append_pages", "_first"),
}


def test_kernels_compile_for_ampere_ada_and_hopper():
    capabilities = ["80", "89", "90"]
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_kernels.py"), *capabilities]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == capabilities
    for line in lines:
        assert set(line.partition("compiled: ")[2].split()) >= KERNELS
