"""What only another processor can run is at least compiled, by a cross compiler that pip installs (zig's clang)."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
X86 = ("x86_64-linux-gnu", "RHEO_X86")
ARM = ("aarch64-linux-gnu", "RHEO_ARM64")
BUILDS = [
    (*ARM, "isa/neon.cpp", "generic"),
    (*ARM, "isa/neon_bf16.cpp", "generic+bf16"),
    (*ARM, "cpu_features.cpp", "generic"),
    (*ARM, "thread_pool.cpp", "generic"),
    (*X86, "isa/avx2.cpp", "x86_64+avx2+fma+f16c"),
    (*X86, "isa/avx512.cpp", "x86_64+avx512f+avx2+fma+f16c"),
    (*X86, "isa/avx512_bf16.cpp", "x86_64+avx512f+avx512bw+avx512vl+avx512bf16+avx2+fma+f16c"),
    (*X86, "isa/amx.cpp", "x86_64+avx512f+avx512bw+avx512vl+avx512bf16+amx_tile+amx_bf16+avx2+fma+f16c"),
    (*X86, "cpu_features.cpp", "x86_64"),
]


@pytest.mark.parametrize(("target", "define", "source", "cpu"), BUILDS)
def test_it_compiles(target, define, source, cpu, tmp_path):
    if target.startswith(platform.machine()):
        pytest.skip("in the extension that is built here, and run by test_attention where the processor can")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, f"-mcpu={cpu}", "-std=c++20", "-O1", "-Wall"]
    command += [f"-D{define}", "-Werror=return-type", "-c", str(CSRC / source), "-o", str(tmp_path / "out.o")]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr[-5000:]
