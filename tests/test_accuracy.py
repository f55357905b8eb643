"""The accuracy harness: tasks of the right length with answers that follow, and a run against a real server."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from serving import random_prompts
from test_startup import TRY_ALL, answers, python

import rheoserve_sgl
from benchmarks.accuracy.__main__ import parse, systems
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
        assert sample != texts.sample(task, context, seed + 100)
        text = "".join(turn.text for turn in sample.turns)
        assert context / 3 < len(texts.tokenizer.encode(text)) < context - len(sample.turns) * 16
        values = dict(re.findall(r"^(key_\w+) = (\w+)$", text, flags=re.M))
        exactly = {"single": 1, "four_keys": 4}.get(task)
        assert len(values) == exactly if exactly else len(values) > 20
        for turn in sample.turns:
            asked = re.findall(r"key_\w+", turn.text.splitlines()[-1])
            found = [values[name] for name in asked]
            assert tuple(values.get(value, value) for value in found) == turn.expected


SAMPLES = """
import hashlib
from benchmarks.accuracy.tasks import TASKS, Texts
class Words:
    def encode(self, text, add_special_tokens):
        return text.split()
texts = Texts(Words(), "one two three\\n" * 2000, 8)
print(hashlib.sha256(repr([texts.sample(task, 2048, 1) for task in TASKS]).encode()).hexdigest())
"""


def test_a_seed_makes_the_same_samples_in_every_process():
    def digest(hash_seed: str) -> str:
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        folder = Path(__file__).parents[1]
        return subprocess.run(
            [sys.executable, "-c", SAMPLES], env=env, cwd=folder, check=True, capture_output=True, text=True
        ).stdout

    assert len(digest("1")) == 65 and digest("1") == digest("2")


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


def test_the_servers_of_a_run_are_legal_and_cover_every_mode():
    model = Path(rheoserve_sgl.__file__).parent / "nano" / "model"
    command = ["--model", str(model), "--gate", str(model / "gate"), "--text", "none", "--contexts", "4096", "32768"]
    made = list(systems(parse([*command, "--budgets", "0.0625", "0.25", "--selectors", "seer", "quest", "oracle"])))
    assert answers(python(TRY_ALL, str(model), *(" ".join(flags) for flags, *_ in made))) == ["none"] * len(made)
    asked = Counter((name, context) for _, contexts, rows, _ in made for name, *_ in rows for context in contexts)
    rows = {"dense": 1, "window": 1, **dict.fromkeys(("retrieval seer", "retrieval quest", "retrieval oracle"), 2)}
    assert asked == {(name, at): n for name, n in (rows | {"balanced seer": 2}).items() for at in (4096, 32768)}
    for flags, contexts, *_ in made[3:]:  # balanced: frames for an eighth of the context
        assert int(flags[flags.index("--rheoserve-device-tokens") + 1]) * 8 == contexts[0]


@pytest.mark.server
def test_a_run_against_a_server(full, checkpoints, tmp_path, capsys):
    from benchmarks.accuracy.__main__ import main

    (tmp_path / "text").write_text(CORPUS)
    command = ["--model", str(checkpoints.path()), "--url", full.url, "--text", str(tmp_path / "text")]
    command += ["--wrong", str(tmp_path / "wrong"), "--budgets"]
    main([*command, "--contexts", "2048", "--samples", "1", "--new-tokens", "8", "--loss-tokens", "32"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = document["rows"]
    assert row["system"] == "dense" and all(0 <= row[task] <= 1 for task in TASKS)  # random weights know nothing
    assert row["loss"] > 1
    wrong = [json.loads(line) for line in (tmp_path / "wrong").read_text().splitlines()]
    turns = {task: 3 if task == "turns" else 1 for task in TASKS}
    assert Counter(one["task"] for one in wrong) == Counter(
        {task: round(turns[task] * (1 - row[task])) for task in TASKS}
    )
    assert all(one["system"] == "dense" and one["expected"] and not one["right"] for one in wrong)


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


def test_the_heat_map_shows_transformers_attention(checkpoints, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.accuracy import heatmap

    path = checkpoints.path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    (tokens,) = random_prompts(6, (300,))
    mass = heatmap.block_mass(model, tokens, 7)
    with torch.no_grad():
        attention = model(torch.tensor([tokens]), output_attentions=True).attentions
    expected = torch.stack([layer[0, :, -7:].mean(1) for layer in attention])  # [layers, heads, tokens]
    for block in range(5):
        part = expected[..., block * 64 : block * 64 + 64].sum(-1)
        torch.testing.assert_close(mass[..., block], part, rtol=1e-4, atol=1e-5)
    (tmp_path / "text").write_text(CORPUS)
    heatmap.main(["--model", str(path), "--text", str(tmp_path / "text"), "--out", str(tmp_path / "map.svg"),
                  "--context", "2048", "--samples", "2"])  # fmt: skip
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    shares = torch.tensor([document[name] for name in ("sink", "retrieval", "window")])
    torch.testing.assert_close(shares.sum(0), torch.ones_like(shares[0]), rtol=1e-3, atol=1e-3)
    layers, heads = shares.shape[1:]
    assert (tmp_path / "map.svg").read_text().count("<rect") == 1 + layers * heads * (1 + 64 + 8)


def test_the_drawing_has_a_curve_for_each_system_and_a_panel_for_each_measure():
    from xml.etree import ElementTree

    from benchmarks.accuracy.draw import draw

    rows = [{"system": "dense", "context": 4096, "budget": None, "needle": 1.0, "loss": 1.5}]
    rows += [{"system": name, "context": 4096, "budget": budget, "needle": 0.5, "loss": 1.6}
             for name in ("retrieval quest", "retrieval mean") for budget in (384, 512, 1024)]  # fmt: skip
    document = {"options": {"model": "a/nano"}, "rows": rows}
    text = draw(document)
    ElementTree.fromstring(text)
    assert text.count("<circle") == 2 * 2 * 3
    assert text.count('stroke-dasharray="5 4"') == 2
    with pytest.raises(ValueError, match="--context is 5; legal: 4096"):
        draw(document, 5)
