"""The accuracy harness: tasks of the right length with answers that follow, and a run against a real server."""

import json
import re

import pytest
from serving import random_prompts

from benchmarks.accuracy.client import contains
from benchmarks.accuracy.forced import forced_losses
from benchmarks.accuracy.tasks import TASKS, Texts

CORPUS = "".join(f"    value = compute({n}, mode='fast')  # line {n}\n" for n in range(5000))


@pytest.fixture(scope="module")
def texts(checkpoints):
    from transformers import AutoTokenizer

    return Texts(AutoTokenizer.from_pretrained(checkpoints.path()), CORPUS, 16)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("context", [2048, 8192])
def test_samples_fit_their_context_and_hold_their_answers(task, context, texts):
    for seed in range(5):
        sample = texts.sample(task, context, seed)
        assert sample == texts.sample(task, context, seed)
        assert sample != texts.sample(task, context, seed + 100)
        text = "".join(turn.text for turn in sample.turns)
        assert context / 3 < len(texts.tokenizer.encode(text)) < context - len(sample.turns) * 16
        values = dict(re.findall(r"^(key_\w+) = (\w+)$", text, flags=re.M))
        assert len(values) > 20
        for turn in sample.turns:
            asked = re.findall(r"key_\w+", turn.text.splitlines()[-1])
            found = [values[name] for name in asked]
            assert tuple(values.get(value, value) for value in found) == turn.expected


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("12, 34", True),
        ("34, 12", False),
        ("<think>12, 34</think>12", False),
        ("<think>34</think>12 and 34.", True),
        ("12", False),
        ("112, 34", False),
        ("12, 345", False),
        ("", False),
    ],
)
def test_an_answer_contains_the_values_in_order_after_its_reasoning(answer, right):
    assert contains(answer, ("12", "34")) is right


@pytest.mark.server
def test_a_run_against_a_server(full, checkpoints, tmp_path, capsys):
    from benchmarks.accuracy.__main__ import main

    (tmp_path / "text").write_text(CORPUS)
    command = ["--model", str(checkpoints.path()), "--url", full.url, "--text", str(tmp_path / "text"), "--budgets"]
    main([*command, "--contexts", "2048", "--samples", "1", "--new-tokens", "8", "--loss-tokens", "32"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = document["rows"]
    assert row["system"] == "dense" and all(0 <= row[task] <= 1 for task in TASKS)  # random weights know nothing
    assert row["loss"] > 1


@pytest.mark.server
def test_losses_of_forced_tokens_are_those_of_transformers(full, checkpoints):
    import torch
    from transformers import AutoModelForCausalLM

    prompt, forced = random_prompts(5, (700, 40))
    forced[3] = 0  # the token that else carries the figure
    got = torch.tensor(forced_losses(full.url, prompt, forced, None))
    model = AutoModelForCausalLM.from_pretrained(checkpoints.path(), dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + forced])).logits[0, len(prompt) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(forced), reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
