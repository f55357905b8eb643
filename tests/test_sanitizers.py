"""The C++ code under sanitizers: random work on every kernel variant, several callers of one pool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = "6"
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_random_work_is_clean(sanitizers, tmp_path):
    options = [f"-DRHEO_SANITIZE={sanitizers}", "-DCMAKE_BUILD_TYPE=None"]
    configure = ["-S", ROOT / "csrc", "-B", tmp_path, *options]
    for arguments in (configure, ["--build", tmp_path, "--parallel", str(os.cpu_count())]):
        command = [sys.executable, "-m", "cmake", *arguments]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    for seed in ("1", "2"):
        run = subprocess.run([tmp_path / "stress", SECONDS, seed], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-5000:]
        rounds, _, word = run.stdout.partition(" ")
        assert word.strip() == "rounds" and int(rounds) > 0
