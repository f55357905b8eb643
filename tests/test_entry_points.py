"""The other ways into SGLang: `sglang serve` and the offline engine, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving import random_prompts

pytestmark = pytest.mark.server

ENGINE = """
import sys
import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], attention_backend="rheoserve", rheoserve_mode="full", rheoserve_device_tokens=512,
        rheoserve_host_size=0.4, dtype="float32", context_length=16384,
    )
    prompt = [int(token) for token in sys.argv[2].split(",")]
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    print("ANSWER", engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"])
    print("STATE", engine.get_server_info()["internal_states"][0]["rheoserve"]["settings"]["mode"])
    engine.shutdown()
"""


@pytest.mark.slow
def test_engine_gives_the_servers_answer(full, checkpoints, tmp_path):
    [prompt] = random_prompts(40, [700])
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    command = [sys.executable, str(script), str(checkpoints.path()), ",".join(map(str, prompt))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert f"ANSWER {full.tokens([prompt], 12)[0]}" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
    assert "STATE full" in run.stdout


def test_sglang_serve_takes_the_flags(checkpoints):
    """Up to the refusal of one: the rest of the way is the same as launch_server's."""
    command = [Path(sys.executable).with_name("sglang"), "serve", "--model-path", str(checkpoints.path())]
    command += ["--attention-backend", "rheoserve", "--rheoserve-token-budget", "100"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode != 0
    assert "--rheoserve-token-budget is 100; legal: a multiple of 64" in run.stderr
