"""How the bundled model is made: answers that are right, training that goes on, an export that is the same model."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from nano_corpus import write_corpus
from serving import rheo_server

from benchmarks.nano import corpus, export, facts, samples, sequences, train
from benchmarks.nano.gates import WINDOW
from benchmarks.nano.haystack import Haystack
from benchmarks.nano.model import Nano, Size
from rheoserve_sgl.gate.checkpoint import read_gate
from rheoserve_sgl.gate.sequences import load_sequences
from rheoserve_sgl.nano import ask

BUNDLED = Path(ask.__file__).with_name("model")

SMALL = {"hidden": 64, "inner": 128, "layers": 2, "heads": 4, "kv-heads": 1, "head-dim": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus and a tokenizer, in files."""
    path = tmp_path_factory.mktemp("nano")
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def words(made):
    return train.Tokenizer.from_file(str(made / "tokenizer.json"))


def test_lines_are_tokenised_on_their_own(made, words):
    text = (made / "train.txt").read_text()
    haystack = Haystack.encode(text, words)
    first = text.split("\0")[0]
    assert words.decode(haystack.tokens[: haystack.lines[100]].tolist(), skip_special_tokens=False) == first
    lines = [words.encode(line).ids for line in first.splitlines(keepends=True)]
    assert [t for line in lines for t in line] == haystack.tokens[: haystack.lines[100]].tolist()


def test_answers_follow_from_the_facts():
    draw = random.Random(1)
    for _ in range(300):
        known = facts.make_facts(draw.randint(1, 30), draw)
        values = {fact.name: fact.value for fact in known}
        defined = [re.match(r"(\w+) = (\w+)$", fact.line) for fact in known if not fact.magic]
        for match in filter(None, defined):  # a program of these lines gives each name its value
            name, right = match.groups()
            assert values[name] == values.get(right, right)
        asked = facts.ask(known, draw)
        named = [name for name in re.findall(r"\w+", asked.question) if name in values]
        if "first given" in asked.question:
            assert values[asked.answer] in asked.question
        else:
            assert asked.answer == ", ".join(values[name] for name in named)
        assert all(step in {fact.line.strip() for fact in known} for step in asked.steps)


@pytest.mark.parametrize("length", [300, 1024, 4000])
def test_samples_have_their_length_and_hold_what_they_ask(made, words, length):
    haystack = Haystack.encode((made / "train.txt").read_text(), words)
    answers = 0
    for seed in range(20):
        ids, weights = samples.make_sample(haystack, words, length, seed)
        assert len(ids) == len(weights) == length
        again, _ = samples.make_sample(haystack, words, length, seed)
        assert (ids == again).all()
        edges = [i for i in range(1, length) if weights[i] == samples.RECALL != weights[i - 1]]
        answers += len(edges)
        for first in edges:
            value = re.match(r"\s?(\w+)", words.decode(ids[first:].tolist()))
            assert value is None or value.group(1) in words.decode(ids[:first].tolist())
    assert answers >= 20


def run(made, out, **options):
    options = {"tokens": 1024, "context": 256, "workers": 1, "device": "cpu", "lr": 0.01} | options
    command = ["--corpus", str(made), "--tokenizer", str(made), "--out", str(out)]
    words = [(f"--{name}", str(value)) for name, value in (SMALL | options).items()]
    train.main(command + [word for pair in words for word in pair if word])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_goes_on_and_exports_the_same_model(made, words, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = [line["loss"]["256"] for line in run(made, tmp_path, steps=60) if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert run(made, tmp_path, steps=64)[-1]["step"] == 64
    paths = ["--run", str(tmp_path), "--tokenizer", str(made), str(tmp_path / "s")]
    sequences.main([*paths, "--length", "128", "--count", "3"])
    assert load_sequences(tmp_path / "s.npy", None, 128).shape == (3, 128)
    with pytest.raises(ValueError, match="of another model"):
        run(made, tmp_path, steps=65, hidden=32)
    export.main(["--run", str(tmp_path), "--tokenizer", str(made), "--out", str(tmp_path / "model")])
    more = run(made, tmp_path / "more", steps=20, start=tmp_path / "model", lr=0.001)
    assert [line["loss"]["256"] for line in more if "loss" in line][0] < 0.8 * losses[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    size = torch.load(tmp_path / "state.pt", weights_only=True)["size"]
    ours = Nano(Size(**size))
    ours.load_state_dict({name.removeprefix("model."): t.float() for name, t in ours_weights(tmp_path).items()})
    tokens = torch.randint(5, size["vocabulary"], (1, 200))
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
        got = ours(tokens) @ ours.embed_tokens.weight.T
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    chat = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = chat.apply_chat_template([{"role": "user", "content": "a = ?"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na = ?<|im_end|>\n<|im_start|>assistant\n"


def test_gates_learn_beside_the_model_and_are_the_distillers(made, tmp_path):
    """The divergence falls, the run goes on with them, and the distiller finds less loss than fresh gates for what was
    written."""
    from transformers import AutoModelForCausalLM

    from rheoserve_sgl.gate.distiller import Distiller, shape_of

    options = {"gates": 0.5, "context": 512, "tokens": 2048}
    run(made, tmp_path, steps=60, **options)
    assert run(made, tmp_path, steps=61, **options)[-1]["step"] == 61
    export.main(["--run", str(tmp_path), "--tokenizer", str(made), "--out", str(tmp_path / "model")])
    # (Of a model that learns fast the attention moves, too: in what was just trained it hardly does.)
    start = shutil.copytree(tmp_path / "model", tmp_path / "start", ignore=shutil.ignore_patterns("gate"))
    more = run(made, tmp_path / "more", steps=60, start=start, lr=0.002, **options)
    apart = [line["gates"] for line in more if "gates" in line]
    assert apart[-1] < 0.9 * apart[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config, layers = read_gate(tmp_path / "model" / "gate", shape_of(model))
    haystack = Haystack.encode(
        (made / "train.txt").read_text(), train.Tokenizer.from_file(str(made / "tokenizer.json"))
    )
    ids, _ = samples.make_sample(haystack, train.Tokenizer.from_file(str(made / "tokenizer.json")), 512, 5)
    distiller = Distiller(model, config, queries=200, late=0.0, seed=0, window=WINDOW)
    fresh = distiller.loss(torch.from_numpy(ids.astype("int64")), None)
    distiller.layers = layers
    assert distiller.loss(torch.from_numpy(ids.astype("int64")), None) < 0.9 * fresh


def test_gates_may_learn_alone_at_the_end(made, tmp_path):
    """Then the model's weights are those of a run without gates; with a weight from the beginning they are not."""
    for name, options in {"none": {}, "alone": {"gates": 0.5, "gates-until": 0}, "beside": {"gates": 0.5}}.items():
        lines = run(made, tmp_path / name, steps=20, context=512, tokens=2048, **options)
        assert any("gates" in line for line in lines) == ("gates" in options)
    none, alone, beside = (ours_weights(tmp_path / name) for name in ("none", "alone", "beside"))
    assert all(torch.equal(none[key], alone[key]) for key in none)
    assert not all(torch.equal(none[key], beside[key]) for key in none)


def test_a_model_learns_to_get_by_with_what_its_gate_picks(made, tmp_path, monkeypatch):
    """The loss falls, and the weights are others than those of a run in which nothing is left out."""
    options = {"gates": 0.5, "context": 1024, "tokens": 2048, "selected": ""}
    lines = run(made, tmp_path / "some", steps=40, **options)
    losses = [line["loss"]["1024"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    run(made, tmp_path / "few", steps=5, **options)
    monkeypatch.setattr(train.Selected, "__call__", lambda self, *inputs: inputs[-1])
    run(made, tmp_path / "all", steps=5, **options)
    few, everything = (ours_weights(tmp_path / name) for name in ("few", "all"))
    assert not all(torch.equal(few[key], everything[key]) for key in few)


def ours_weights(path):
    return torch.load(path / "weights.pt", weights_only=True)


@pytest.mark.server
def test_the_bundled_model_finds_values_in_a_long_text(tmp_path, capsys):
    """In the default mode with its own gate and few frames: most is attended to by the CPU, or not at all."""
    args = ["--dtype", "bfloat16", "--rheoserve-device-tokens", "1024", "--rheoserve-token-budget", "2048"]
    args += ["--rheoserve-gate-path", str(BUNDLED / "gate")]
    with rheo_server(BUNDLED, args, tmp_path) as server:
        assert server.rheo()["settings"]["selector"] == "seer"
        assert ask.main(["--url", server.url, "--tokens", "3000"]) == 0, capsys.readouterr().out
        assert server.rheo()["host_blocks"] > 0


def test_the_bundled_model_is_small_and_says_where_it_comes_from():
    size = sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file())
    assert size <= 32_000_000
    licences = [package["licence"] for package in json.loads((BUNDLED / "sources.json").read_text())]
    assert licences and all(corpus.PERMISSIVE.search(text) and not corpus.OTHER.search(text) for text in licences)
    assert "sources.json" in (BUNDLED / "README.md").read_text()
