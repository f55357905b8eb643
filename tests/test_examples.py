"""The examples in docs/examples run as they are, against the bundled model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import rheo_server

import rheoserve_sgl

pytestmark = pytest.mark.server
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
BUNDLED = Path(rheoserve_sgl.__file__).parent / "nano" / "model"


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    args = ["--dtype", "bfloat16", "--rheoserve-device-tokens", "4096", "--rheoserve-token-budget", "2048"]
    args += ["--rheoserve-gate-path", str(BUNDLED / "gate"), "--context-length", "32768"]
    with rheo_server(BUNDLED, args, tmp_path_factory.mktemp("bundled")) as server:
        yield server


def run(name: str, *args: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["openai_client.py", "frontend_program.py"])
def test_an_example_asks_a_server_and_hears_values(bundled, name):
    lines = [line for line in run(name, bundled.url).splitlines() if ", and it is " in line]
    assert len(lines) == 2
    right = [line.rpartition(" ")[2] in line.partition(", and it is")[0] for line in lines]
    assert any(right), lines


def test_the_reasoning_chat_tells_what_was_attended_to(bundled):
    out = run("reasoning_chat.py", bundled.url)
    assert "<think>" in out and re.search(r"\d+% of the selected blocks were resident, the CPU attended to \d+%", out)


def test_the_offline_engine_answers():
    lines = [line for line in run("offline_engine.py").splitlines() if ", and it is " in line]
    assert len(lines) == 3
    assert any(line.rpartition(" ")[2] in line.partition(", and it is")[0] for line in lines), lines


def test_every_example_is_run_here():
    told = Path(__file__).read_text()
    assert all(f'"{example.name}"' in told for example in EXAMPLES.glob("*.py"))
