"""The doctor and the planner as a person runs them, and what they say of things that are wrong."""

import json
import subprocess
import sys

import pytest
import torch

from rheoserve_sgl import __main__ as command
from rheoserve_sgl.doctor import machine, operators, software
from rheoserve_sgl.doctor.finding import STATES, Finding, as_table, find
from rheoserve_sgl.doctor.needs import Load, Needs, advise
from rheoserve_sgl.doctor.step import predict_step
from rheoserve_sgl.ops.extension import extension
from rheoserve_sgl.runtime.latency_model import Rates


def test_this_machine_is_fit_and_the_document_says_so():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "rheoserve_sgl", "doctor", "--json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(run.stdout.splitlines()[-1])
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert document["fit"] and all(finding["state"] in STATES for finding in findings.values())
    assert {"Python", "SGLang", "hooks", "processors", "host memory", "GPU", "score and plan"} <= findings.keys()
    assert {f"attention, {variant}" for variant in extension().cpu_variants()} <= findings.keys()
    assert "GB/s" in findings["host memory"]["found"]


def test_what_is_broken_is_bad_and_the_others_are_still_looked_at(monkeypatch):
    monkeypatch.setattr(software, "SGLANG_VERSION", "0.0.1")
    found = {finding.name: finding for finding in software.look_at_software()}
    assert found["SGLang"].state == "bad" and "pip install sglang==0.0.1" in found["SGLang"].advice
    assert found["hooks"].state == "ok" and found["beside it"].state == "ok"
    monkeypatch.setattr(software, "BESIDE", {"torch": "1.0", "triton": "3.6.0", "no-such-package": "2"})
    beside = software.others()
    assert beside.state == "note" and beside.advice == "tested with torch 1.0, no-such-package 2"
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 10**8)
    assert machine.memory().state == "bad"
    broken = find("x", lambda: 1 / 0)
    assert broken.state == "bad" and "ZeroDivisionError" in broken.found


def test_an_operator_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr(operators, "SECONDS", 0.05)
    assert operators.repeated("right", lambda: (0.0, 1e-4)).state == "ok"
    for error in (1e-3, float("nan")):
        assert operators.repeated("wrong", lambda error=error: (error, 1e-4)).state == "bad"
    right = operators.attend_cpu

    def wrong(q, tiers, *rest):
        out, lse = right(q, tiers, *rest)
        return out + 0.01, lse

    monkeypatch.setattr(operators, "attend_cpu", wrong)
    found = {finding.name: finding.state for finding in operators.look_at_operators()}
    assert found["attention, scalar"] == found["merge"] == "bad" and found["append"] == found["learned gate"] == "ok"


def test_the_exit_code_tells_whether_the_machine_is_fit(monkeypatch, capsys):
    monkeypatch.setattr(operators, "SECONDS", 0.01)
    monkeypatch.setattr(software, "PYTHONS", ((2, 7),))
    assert command.main(["doctor"]) == 0  # a note is no fault
    assert "note  Python" in capsys.readouterr().out
    monkeypatch.setattr(operators, "append_cpu", lambda host, *rest: host.add_(1.0))
    assert command.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "bad   append" in said and said.splitlines()[-1] == "not fit to serve: append"
    assert command.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["fit"] is False


def test_the_table_has_a_line_for_each_finding_and_its_advice():
    table = as_table([Finding("a", "1"), Finding("longer", "2", "note", "do this")])
    assert table.splitlines() == ["ok    a       1", "note  longer  2", "              -> do this"]


SMALL = Needs(token_bytes=1000, key_bytes=10.0, weights=10**6)


def test_a_load_that_fits_gets_its_flags():
    lines, fits = advise(Load(1000, 4), SMALL, 10**9, 10**7, ["--model-path", "a model"])
    assert fits
    assert lines[-1].startswith("python -m sglang.launch_server --model-path 'a model' --attention-backend rheoserve")
    assert "all of it fits the device" in "\n".join(lines)
    lines, fits = advise(Load(100_000, 4), SMALL, 10**9, 2 * 10**7, [])
    assert fits and "3% of all" in "\n".join(lines)


def test_a_step_is_predicted_from_what_it_reads():
    """12 x 64K of an 8B model, 24 GB of it resident, on an H100's rates: it took 19.5 ms."""
    needs = Needs(token_bytes=147456, key_bytes=147456 / 64 * (1 + 1 / 64), weights=16 * 10**9)
    device = int((16e9 + 24e9 + Load(65536, 12).tokens * needs.key_bytes) / 0.85)
    rates = Rates(device=2.9e12, host=75e9, beside=True)
    line = predict_step(Load(65536, 12), needs, rates, device)
    assert 15 < float(line.split("about ")[1].split(" ms")[0]) < 25
    alone = predict_step(Load(4096, 1), needs, Rates(75e9, 75e9, beside=False), None)
    assert float(alone.split("about ")[1].split(" ms")[0]) > 16e9 / 75e9 * 1000


def test_a_load_that_does_not_fit_says_what_would():
    lines, fits = advise(Load(100_000, 4), SMALL, 3 * 10**8, 10**7, [])
    assert not fits and "host memory holds 2 such requests" in "\n".join(lines)
    lines, fits = advise(Load(100_000, 1), SMALL, 10**9, 10**6, [])
    assert not fits and "no room for frames" in "\n".join(lines)
    # On a CPU weights, frames and the gate's keys are there, too.
    lines, fits = advise(Load(100_000, 4), SMALL, 4 * 10**8, None, [])
    assert not fits and "host memory holds 3 such requests" in "\n".join(lines)


def test_plan_reads_a_checkpoint_and_names_what_is_wrong(checkpoints, tmp_path, capsys):
    model = ["plan", "--model", str(checkpoints.path()), "--context", "4096", "--concurrency", "3"]
    assert command.main([*model, "--host-gb", "4", "--device-gb", "1"]) == 0
    said = capsys.readouterr().out  # of fp32 weights, which SGLang serves as fp16 unless told otherwise
    assert f"KV of a token: {2 * 4 * 2 * 64 * 2:,} bytes" in said and "--max-running-requests 3" in said
    assert command.main([*model, "--host-gb", "4", "--device-gb", "0"]) == 0
    assert ("a decode step of all 3: about" in capsys.readouterr().out) == (not torch.cuda.is_available())
    assert command.main([*model, "--host-gb", "0.01", "--device-gb", "0"]) == 1
    assert "does not fit" in capsys.readouterr().out
    for wrong in (
        *(["--model", str(tmp_path)], ["--context", "0"], ["--context", "999999"]),
        *(["--tp-size", "3"], ["--host-gb", "nan"]),
    ):
        assert command.main([*model, *wrong]) == 2
        assert f"{wrong[0]} is" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_looked_at():
    found = {finding.name: finding for finding in machine.look_at_machine()}
    assert torch.cuda.get_device_name(0) in found["GPU"].found and "GB/s" in found["PCIe"].found
    found = {finding.name: finding for finding in operators.look_at_operators()}
    assert {finding.state for finding in found.values()} == {"ok"}, found
    assert sum(name.endswith(", GPU") for name in found) == 11
