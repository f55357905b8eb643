"""The C++ code under sanitizers: random work on every kernel variant, several callers of one pool."""

import os
import subprocess
from pathlib import Path

import pytest

SECONDS = "10"
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_random_work_is_clean(sanitizers, tmp_path):
    configure = [
        "cmake",
        "-S",
        ROOT / "csrc",
        "-B",
        tmp_path,
        f"-DRHEO_SANITIZE={sanitizers}",
        "-DCMAKE_BUILD_TYPE=None",
    ]
    for command in (configure, ["cmake", "--build", tmp_path, "--parallel", str(os.cpu_count())]):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    for seed in ("1", "2"):
        run = subprocess.run([tmp_path / "stress", SECONDS, seed], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-5000:]
        rounds, _, word = run.stdout.partition(" ")
        assert word.strip() == "rounds" and int(rounds) > 0
