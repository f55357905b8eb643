"""Distillation of gates: the target against a plain loop, the loss going down, runs that are taken up again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rheoserve_sgl.gate import distill
from rheoserve_sgl.gate.checkpoint import ModelShape, read_gate
from rheoserve_sgl.gate.distiller import Seen
from rheoserve_sgl.gate.sequences import load_sequences
from rheoserve_sgl.gate.target import block_targets, earlier_blocks, far_blocks, gate_loss
from rheoserve_sgl.nano.make import CONTEXT, VOCABULARY, make_tokenizer


def test_targets_are_the_block_maxima_of_the_attention():
    torch.manual_seed(0)
    tokens, block, kv_heads, group, dim = 96, 16, 2, 3, 8
    q, k = torch.randn(4, kv_heads, group, dim), torch.randn(tokens, kv_heads, dim)
    positions = torch.tensor([3, 17, 40, 95])
    got, total = block_targets(q, k, positions, dim**-0.5, block, earlier_blocks(positions, 6, block))
    far, _ = block_targets(q, k, positions, dim**-0.5, block, far_blocks(positions, 6, block, 2 * block))
    for n, position in enumerate(positions.tolist()):
        for head in range(kv_heads):
            logits = (q[n, head].double() @ k[: position + 1, head].double().T) * dim**-0.5
            p = torch.softmax(logits, -1).amax(0)
            earlier = [p[at * block : (at + 1) * block].max().item() for at in range(position // block)]
            expected = np.array(earlier) / (sum(earlier) or 1)
            np.testing.assert_allclose(got[n, head, : len(earlier)], expected, rtol=1e-4)
            assert not got[n, head, len(earlier) :].any()
            assert total[n, head].item() == pytest.approx(min(sum(earlier), 1), rel=1e-4)
            beyond = np.array(earlier)[1 : max(position // block - 2, 1)]
            np.testing.assert_allclose(far[n, head, 1 : 1 + len(beyond)], beyond / (sum(beyond) or 1), rtol=1e-4)
            assert not far[n, head, 0].any() and not far[n, head, 1 + len(beyond) :].any()


def test_the_loss_is_zero_for_a_gate_that_says_the_target():
    targets = torch.softmax(torch.randn(3, 2, 5), -1)
    targets[:, :, 4] = 0
    targets /= targets.sum(-1, keepdim=True)
    seen = earlier_blocks(torch.full((3,), 4 * 64 + 1), 5, 64)
    keys = torch.eye(5)[:, None].expand(-1, 2, -1)
    queries = targets.clamp(min=1e-30).log() * 5**0.5
    assert gate_loss(queries, keys, targets, seen).item() == pytest.approx(0, abs=1e-5)
    wrong = torch.cat((queries[:2], torch.zeros(1, 2, 5)))
    assert gate_loss(wrong, keys, targets, seen).item() > 0.03
    weights = torch.tensor([1.0, 1.0, 0.0])[:, None].expand(-1, 2)
    assert gate_loss(wrong, keys, targets, seen, weights).item() == pytest.approx(0, abs=1e-5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = np.random.default_rng(0)
    path.write_bytes(bytes(generator.integers(32, 127, 6000).tolist()))
    return path


def arguments(checkpoints, text, out, **changes):
    options = {"context": 512, "batch": 2, "steps": 30, "queries": 64, "lr": 0.01, "save-every": 10} | changes
    command = ["--model", str(checkpoints.path()), "--data", str(text), "--out", str(out), "--device", "cpu"]
    return command + [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_other_models_have_their_gates_distilled(config, text, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    AutoModelForCausalLM.from_config(config(**shape)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = ["--context", "256", "--batch", "1", "--steps", "2", "--queries", "16", "--device", "cpu"]
    distill.main(["--model", str(tmp_path / "model"), "--data", str(text), "--out", str(tmp_path / "gate"), *options])
    assert len(json.loads((tmp_path / "gate" / "loss_curve.json").read_text())) == 2
    _, layers = read_gate(tmp_path / "gate", ModelShape(2, 4, 2, 32))
    assert len(layers) == 2 and all(tensor.isfinite().all() for layer in layers for tensor in layer.values())


def test_the_loss_goes_down_and_the_gates_fit_the_model(checkpoints, text, tmp_path):
    distill.main(arguments(checkpoints, text, tmp_path))
    curve = json.loads((tmp_path / "loss_curve.json").read_text())
    assert len(curve) == 30
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    config, layers = read_gate(tmp_path, ModelShape(layers=4, heads=8, kv_heads=2, head_dim=64))
    assert config.use_qk_norm and len(layers) == 4


def test_an_interrupted_run_ends_like_an_uninterrupted_one(checkpoints, text, tmp_path, monkeypatch):
    distill.main(arguments(checkpoints, text, tmp_path / "whole", steps=6, **{"save-every": 3}))
    loss, calls = distill.Distiller.loss, []

    def fail_late(self, *args):
        calls.append(1)
        if len(calls) > 2 * 4:
            raise KeyboardInterrupt
        return loss(self, *args)

    broken = arguments(checkpoints, text, tmp_path / "broken", steps=6, **{"save-every": 3})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distill.Distiller, "loss", fail_late)
        distill.main(broken)
    with pytest.raises(ValueError, match="--lr is 0.5, but .* was started with 0.01"):
        distill.main([*broken, "--lr", "0.5"])
    distill.main(broken)
    for name in ("loss_curve.json", "attn_gate_weights.pth"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_what_is_kept_of_a_sequence_is_what_is_seen_anew(checkpoints, text, tmp_path):
    for name, extra in (("anew", []), ("kept", ["--keep"])):
        command = arguments(checkpoints, text, tmp_path / name, steps=5, **{"window-tokens": 128})
        distill.main(command + extra)  # all in the first pass over the sequences
    curves = [json.loads((tmp_path / name / "loss_curve.json").read_text()) for name in ("anew", "kept")]
    assert curves[0] == curves[1]
    distill.main([*arguments(checkpoints, text, tmp_path / "long", steps=20), "--keep"])
    curve = json.loads((tmp_path / "long" / "loss_curve.json").read_text())
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


def test_queries_that_attend_far_are_drawn_more_often():
    """And heads that do not, of a query that was drawn for another, hardly count."""
    far = torch.rand(400, 2).pow(8)
    positions, targets = torch.arange(400), torch.rand(400, 2, 3)
    whole = Seen(positions, torch.zeros(400, 2, 1, 4), torch.zeros(3, 2, 4), targets, targets[:, 0] > 0.5, far)
    parts = [
        replace(whole, **{n: getattr(whole, n)[at] for n in ("positions", "q", "targets", "mask", "weights")})
        for at in (slice(0, 150), slice(150, 400))
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = [Seen.draw(parts, 40, generator) for _ in range(50)]
    for seen in drawn:
        assert len(set(seen.positions.tolist())) == 40
        assert torch.equal(seen.targets, targets[seen.positions]) and torch.equal(seen.mask, whole.mask[seen.positions])
        torch.testing.assert_close(seen.weights.sum(1), torch.ones(40), rtol=1e-3, atol=1e-3)
        assert torch.equal(seen.weights.argmax(1), far[seen.positions].argmax(1))
    mean = torch.stack([far[seen.positions].sum(1).mean() for seen in drawn]).mean()
    assert mean > 2 * far.sum(1).mean()


def test_candidates_need_a_window_and_lower_the_loss(checkpoints, text, tmp_path, capsys):
    extra = {"window-tokens": 128, "candidates": 128}
    distill.main([*arguments(checkpoints, text, tmp_path, **extra), "--keep"])
    curve = json.loads((tmp_path / "loss_curve.json").read_text())
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    for wrong in ({"candidates": 128}, {"candidates": 32, "window-tokens": 128}):
        with pytest.raises(SystemExit):
            distill.parse(arguments(checkpoints, text, tmp_path, **wrong))
        assert "legal: with --window-tokens, at least --queries, 64" in capsys.readouterr().err


class Bytes:
    """As much of a tokenizer as sequences need."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text.encode())}


def test_sequences_are_documents_joined_and_cut(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("defg")
    assert load_sequences(tmp_path, Bytes(), 4).tolist() == [[97, 98, 99, 0], [100, 101, 102, 103]]
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"text": "abcd"}) + "\n" + json.dumps({"text": "ef"}))
    assert load_sequences(lines, Bytes(), 5).tolist() == [[97, 98, 99, 100, 0]]
    lines.write_text('{"text": "a\u2028b\x85c"}\n\n', encoding="utf-8")  # characters that also end lines, but not here
    assert load_sequences(lines, Bytes(), 3).tolist()[0] == list("a\u2028b".encode())[:3]
    np.save(tmp_path / "d.npy", np.arange(12, dtype=np.uint16).reshape(3, 4))
    assert load_sequences(tmp_path / "d.npy", Bytes(), 3).tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]


def test_data_that_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist; legal: a .npy array"):
        load_sequences(tmp_path / "none", Bytes(), 4)
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(ValueError, match="with 3 tokens; needed: 64"):
        load_sequences(tmp_path / "short.txt", Bytes(), 64)
    (tmp_path / "odd.jsonl").write_text('{"words": 1}')
    with pytest.raises(ValueError, match="line 1: neither `text` nor `messages`, but words"):
        load_sequences(tmp_path / "odd.jsonl", Bytes(), 4)
    for wrong, why in (('{"text": ', "Expecting value"), ("3", "legal: an object")):
        (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n\n' + wrong)
        with pytest.raises(ValueError, match=f"odd.jsonl, line 3: .*{why}"):
            load_sequences(tmp_path / "odd.jsonl", Bytes(), 4)
