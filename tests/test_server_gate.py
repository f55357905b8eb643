"""A learned gate in a real server, against transformers with the same selection written anew."""

import json
import shutil

import pytest
import torch
from serving import random_prompts, rheo_server
from sparse_reference import GatedModel

from rheoserve_sgl.gate.checkpoint import GateConfig, ModelShape, read_gate, write_gate

LAYERS, HEADS, KV_HEADS, DIM = 4, 8, 2, 64  # of rheoserve_sgl.nano.make by default
SHAPE = ModelShape(LAYERS, HEADS, KV_HEADS, DIM)
# Frames for less than a prompt, prefilled in chunks; only what is selected is attended to, wherever it is.
SELECTED = ["--rheoserve-device-attention", "selected", "--rheoserve-window-tokens", "64"]
SELECTED += ["--rheoserve-device-tokens", "512", "--chunked-prefill-size", "512"]


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """A folder with random weights: any weights select something."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gate")
    config = GateConfig(64, DIM, use_qk_norm=True)
    layers = [{name: torch.randn(shape) / 8 for name, shape in config.shapes(SHAPE).items()} for _ in range(LAYERS)]
    for tensors in layers:
        tensors["q_norm"] = 2 + torch.rand(DIM)  # sharp, so that rounding decides no selection
        tensors["k_norm"] = 2 + torch.rand(DIM)
    write_gate(path, config, layers, "made")
    return path


@pytest.mark.server
@pytest.mark.parametrize("mode", [pytest.param("retrieval", marks=pytest.mark.slow), "balanced"])
def test_a_server_selects_what_the_gate_says(mode, gate, checkpoints, tmp_path):
    """`selected`: in `balanced`, too, only what the gate picks is attended, wherever it is."""
    args = ["--rheoserve-mode", mode, "--rheoserve-gate-path", str(gate), "--rheoserve-token-budget", "384", *SELECTED]
    model = checkpoints.path()
    reference = GatedModel(model, read_gate(gate, SHAPE)[1], budget=6, sink=1, window=1)
    with rheo_server(model, args, tmp_path) as server:
        assert server.rheo()["settings"]["selector"] == "seer"
        for prompt in random_prompts(8, (700, 1000)):
            first = server.tokens([prompt], 70)[0]  # past two page boundaries, so that pages complete while decoding
            assert reference.greedy(prompt, first) == first
            assert reference.left_out > 70 * LAYERS * KV_HEADS
            second = prompt + first + prompt[:30]  # its prefix comes from the radix tree, gate keys included
            answer = server.generate([second], 8)[0]
            cached = answer["meta_info"]["cached_tokens"]
            assert cached > len(prompt)
            # What the tree held of the first answer was computed sparsely, the rest of this prompt is dense.
            assert reference.greedy(second, answer["output_ids"], range(len(prompt), cached)) == answer["output_ids"]
        prompt = random_prompts(9, (1000,))[0]
        for options, blocks in (({"mode": "full"}, 99), ({"mode": "window"}, 3), ({"token_budget": 512}, 8)):
            answer = ask(server, prompt, options).json()["output_ids"]
            reference.budget = blocks
            assert reference.greedy(prompt, answer) == answer, options
        reference.budget = 6  # the server's own again
        answer = server.tokens([prompt], 20)[0]
        assert reference.greedy(prompt, answer) == answer
        for options, words in (
            (
                {"token_budget": 100},
                "custom_params.rheoserve.token_budget is 100; legal: a multiple of 64, at least 192",
            ),
            ({"mode": "fast"}, "custom_params.rheoserve.mode is 'fast'; legal: full, window"),
            ({"budget": 64}, "custom_params.rheoserve.budget is 64; legal: token_budget, mode"),
        ):
            reply = ask(server, prompt, options)
            assert reply.status_code == 400 and words in reply.text, reply.text


@pytest.mark.gpu
def test_a_server_on_a_gpu_selects_what_the_gate_says(gate, checkpoints, tmp_path):
    """In fp16, where rounding decides a selection now and then, and with it a token: some 15 of the answers' 280
    differ, on a CPU, too. One layer's gate in place of another's changes a hundred and more."""
    args = ["--rheoserve-mode", "retrieval", "--rheoserve-gate-path", str(gate), "--rheoserve-token-budget", "384"]
    args += [*SELECTED, "--dtype", "float16"]
    model, prompts = checkpoints.path(), random_prompts(8, (700, 1000))
    with rheo_server(model, args, tmp_path) as server:
        answers = server.tokens(prompts, 140)  # past two page boundaries, and a page's length on
    layers = read_gate(gate, SHAPE)[1]
    same = []
    for gates in (layers, layers[::-1]):
        reference = GatedModel(model, gates, budget=6, sink=1, window=1)
        told = [reference.greedy(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        same.append((torch.tensor(told) == torch.tensor(answers)).float().mean().item())
    assert same[0] > 0.88 > 0.6 > same[1], same


@pytest.mark.server
def test_two_ranks_a_dense_layer_and_keys_rotated_at_the_last_token(gate, checkpoints, tmp_path):
    """Each rank has the gate of its own KV heads; the first layer is dense because the gate was made so."""
    shutil.copytree(gate, tmp_path / "gate")
    stored = json.loads((gate / "config.json").read_text())
    (tmp_path / "gate" / "config.json").write_text(json.dumps(stored | {"seerattn_start_layer": 1}))
    args = ["--rheoserve-mode", "retrieval", "--rheoserve-gate-path", str(tmp_path / "gate"), "--tp-size", "2"]
    args += ["--rheoserve-token-budget", "384", "--rheoserve-gate-rope", "last", *SELECTED]
    model, [prompt] = checkpoints.path(), random_prompts(18, [700])
    layers = read_gate(gate, SHAPE)[1]
    made = {"budget": 6, "sink": 1, "window": 1, "start": 1}
    with rheo_server(model, args, tmp_path, {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        assert server.rheo()["settings"]["dense_layers"] == 1
        answer = server.tokens([prompt], 140)[0]  # past two page boundaries, and a page's length on
    reference = GatedModel(model, layers, **made, rotate_last=True)
    assert reference.greedy(prompt, answer) == answer
    assert reference.left_out > 140 * (LAYERS - 1) * KV_HEADS
    assert GatedModel(model, layers, **made).greedy(prompt, answer) != answer  # else this could not tell


@pytest.mark.server
def test_a_threshold_and_a_request_that_is_retracted(gate, checkpoints, tmp_path):
    """What was decoded before is computed anew as a prompt, densely, in other pages, and its gate keys with it."""
    args = ["--rheoserve-mode", "retrieval", "--rheoserve-gate-path", str(gate), "--rheoserve-threshold", "0.05"]
    args += SELECTED
    model, [prompt] = checkpoints.path(), random_prompts(19, [700])
    with rheo_server(model, args, tmp_path) as server:
        answer, told, retractions = retracted(server, prompt, 210, 75)  # past a page boundary before it, and after
    assert retractions == 1
    reference = GatedModel(model, read_gate(gate, SHAPE)[1], budget=0, sink=1, window=1, threshold=0.05)
    assert reference.greedy(prompt, answer[:told]) == answer[:told]
    assert told * LAYERS * KV_HEADS < reference.left_out < told * 9 * LAYERS * KV_HEADS  # of 9 to choose from

    def follows(tokens: int) -> bool:
        """Whether what follows so many tokens is what follows them as part of a prompt."""
        return reference.greedy(prompt + answer[:tokens], answer[tokens:]) == answer[tokens:]

    last = next(tokens for tokens in range(told, 150) if follows(tokens))  # before the retraction
    assert reference.greedy(prompt, answer[:last]) == answer[:last]
    assert not follows(0)  # else this could not tell


def retracted(server, prompt: list[int], tokens: int, after: int) -> tuple[list[int], int, int]:
    """The answer of a request that was retracted after it had told so many tokens: with how many, and how often."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    told = 0
    for line in server.post("/generate", body, stream=True).iter_lines():
        if line.startswith(b"data: {"):
            reply = json.loads(line[6:])
            if not told and len(reply["output_ids"]) >= after:
                told = len(reply["output_ids"])
                assert server.post("/pause_generation", {"mode": "retract"}).status_code == 200
                assert server.post("/continue_generation", {}).status_code == 200
    return reply["output_ids"], told, reply["meta_info"]["num_retractions"]


def ask(server, prompt, options):
    sampling = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True, "custom_params": {"rheoserve": options}}
    return server.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
