"""Against dense attention: greedy tokens of a real server equal torch_native's and transformers'."""

import pytest
from serving import Server, check_transformers, random_prompts, rheo_server, together

pytestmark = pytest.mark.server

LENGTHS = (1, 63, 64, 65, 127, 128, 129, 700, 6000)
NEW_TOKENS = 20
FEW_FRAMES = ["--rheoserve-device-tokens", "512"]


@pytest.fixture(scope="module")
def expected(dense):
    """Dense answers: one prompt of each length, and a batch of eight."""
    singles = [dense.tokens([prompt], NEW_TOKENS)[0] for prompt in random_prompts(1, LENGTHS)]
    return singles, dense.tokens(random_prompts(2, LENGTHS[:8]), NEW_TOKENS)


def check_equal(server, expected):
    singles, batch = expected
    for prompt, answer in zip(random_prompts(1, LENGTHS), singles, strict=True):
        assert server.tokens([prompt], NEW_TOKENS)[0] == answer, f"prompt of {len(prompt)} tokens"
    assert server.tokens(random_prompts(2, LENGTHS[:8]), NEW_TOKENS) == batch
    counts = server.rheo()
    assert counts["host_blocks"] > 0 < counts["device_blocks"]  # both tiers were at work
    assert counts["exchanges"] > 0 == counts["exchanges_failed"]
    after = server.settle()
    assert after["frames_used"] == after["host_pages_used"] == 0


def test_full_equals_torch_native(full, expected):
    check_equal(full, expected)


def test_balanced_that_covers_the_context_equals_torch_native(expected, checkpoints, tmp_path):
    """With both gates' other options, and blocks exchanged at random at every step."""
    args = [
        "--rheoserve-token-budget",
        "16384",
        "--rheoserve-selector",
        "mean",
        "--rheoserve-device-attention",
        "selected",
    ]
    with rheo_server(
        checkpoints.path(), [*FEW_FRAMES, *args], tmp_path, {"RHEOSERVE_TEST_RANDOM_EXCHANGE": "7"}
    ) as server:
        check_equal(server, expected)


RETRIEVAL = ["--rheoserve-mode", "retrieval", "--rheoserve-threshold", "1e-30", "--rheoserve-window-tokens", "64"]
RETRIEVAL += ["--chunked-prefill-size", "256", "--enable-mixed-chunk"]
WINDOW = ["--rheoserve-mode", "window", "--rheoserve-window-tokens", "64"]


@pytest.fixture(scope="module")
def sparse(checkpoints, tmp_path_factory):
    """One that retrieves and one with a window, begun at once: most of a start is one thread's."""
    model, folder = checkpoints.path(), tmp_path_factory.mktemp
    both = [rheo_server(model, [*FEW_FRAMES, *args], folder("sparse")) for args in (RETRIEVAL, WINDOW)]
    with together(*both) as servers:
        yield servers


def test_retrieval_that_covers_the_context_equals_torch_native(expected, sparse):
    """A threshold that everything passes; small chunks, and decode steps mixed into prefill batches."""
    check_equal(sparse[0], expected)


def test_window_mode_differs(expected, sparse):
    """The comparison can fail: leaving blocks out changes the tokens."""
    answers = [sparse[1].tokens([prompt], NEW_TOKENS)[0] for prompt in random_prompts(1, LENGTHS)]
    assert sparse[1].rheo()["host_attention_share"] < 0.5
    same = [answer == expected[0][i] for i, answer in enumerate(answers)]
    assert all(same[:5])  # sink, window and newest page are all there is
    assert not any(same[7:])


def test_full_equals_transformers(full, checkpoints):
    check_transformers(full, checkpoints.path())


def test_odd_shapes_equal_transformers(checkpoints, tmp_path):
    """Head dim 80, groups of 5, float16 weights loaded as float32."""
    path = checkpoints.path("--head-dim", "80", "--heads", "10", "--dtype", "float16")
    with rheo_server(path, [*FEW_FRAMES, "--rheoserve-mode", "full"], tmp_path) as server:
        check_transformers(server, path)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_logits_in_16_bits_agree_within_rounding(dtype, dense, checkpoints, tmp_path):
    """Log probabilities in 16 bits, ours and torch_native's, next to fp32's.

    A prompt's own log probabilities come from prefill, the generated token's from decode over both tiers.
    """
    # Log probabilities of ids that decode produced: ask for them again with the answer as prompt.
    prompts = random_prompts(4, (65, 300, 2100))
    exact = dense.generate(prompts, 8, return_logprob=True, logprob_start_len=0)
    short = ["--dtype", dtype, "--page-size", "64", "--max-total-tokens", "16384"]
    native = Server(checkpoints.path(), ["--attention-backend", "torch_native", *short], tmp_path / "native")
    rheo = rheo_server(checkpoints.path(), [*FEW_FRAMES, "--rheoserve-mode", "full", *short[:2]], tmp_path)
    with together(native, rheo):
        theirs = native.generate(prompts, 8, return_logprob=True, logprob_start_len=0)
        ours = rheo.generate(prompts, 8, return_logprob=True, logprob_start_len=0)
        # The step after a shared prefix: decode's log probability against prefill's of the same token.
        tokens = [prompt + answer["output_ids"] for prompt, answer in zip(prompts, ours, strict=True)]
        again = rheo.generate(tokens, 1, return_logprob=True, logprob_start_len=0)
    mine, reference = mean_error(ours, exact), mean_error(theirs, exact)
    assert mine <= 1.25 * reference + 1e-3, f"mean |log p - fp32's|: ours {mine:.5f}, torch_native's {reference:.5f}"
    for answer, replay in zip(ours, again, strict=True):
        decoded = [step[0] for step in answer["meta_info"]["output_token_logprobs"]]
        prefilled = [step[0] for step in replay["meta_info"]["input_token_logprobs"][-len(decoded) :]]
        assert max(abs(a - b) for a, b in zip(decoded, prefilled, strict=True)) < 0.2


def mean_error(answers, exact):
    """Mean absolute difference of the prompts' log probabilities."""
    differences = []
    for answer, truth in zip(answers, exact, strict=True):
        mine, right = (a["meta_info"]["input_token_logprobs"][1:] for a in (answer, truth))
        differences += [abs(a[0] - b[0]) for a, b in zip(mine, right, strict=True)]
    return sum(differences) / len(differences)
