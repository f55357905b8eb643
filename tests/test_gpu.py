"""On a CUDA device: the torch ops against the CPU kernels, and real servers against dense attention.

One command: `make test-gpu`.
"""

import re
import sys
from pathlib import Path

import pytest
import requests
import torch
from pools import make_pool
from serving import Server, random_prompts, rheo_server
from test_canary import SAYS
from test_plan import listed
from test_score import table

from rheoserve_sgl.cache.host_store import HostStore
from rheoserve_sgl.coordinator.exchange import SWAP_BYTES, equal_shares
from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.ops import prefill
from rheoserve_sgl.ops.attention import attend_cpu, attend_tiers
from rheoserve_sgl.ops.gpu.tables import Tables
from rheoserve_sgl.ops.plan import Rule, Select, plan
from rheoserve_sgl.ops.score import score
from rheoserve_sgl.runtime.batch import Batch
from rheoserve_sgl.runtime.telemetry import PREFIX

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_a_decode_step_equals_the_cpu(dtype, group):
    """Score, plan, attention in both tiers and merge; frames on the device, host store pinned."""
    torch.manual_seed(group)
    dim, kv_heads, all_pages = 64, 2, 50
    host = HostStore(1, all_pages, kv_heads, dim, dtype, pin=True)
    host.layers[0].copy_(torch.randn(host.layers[0].shape))
    frames = torch.zeros(all_pages * kv_heads + 1, 2, 64, dim, dtype=dtype)
    frame_of = torch.randperm(all_pages * kv_heads).view(all_pages, kv_heads).to(torch.int32)
    frames[frame_of.flatten().long()] = host.blocks(0)
    frame_of[torch.rand(frame_of.shape) < 0.5] = -1
    pages, n_pages = table(group, 3, 30, all_pages)
    tail_len = torch.tensor([64, 1, 33], dtype=torch.int32)
    gate = make_gate("quest")
    quick = torch.randn(all_pages, kv_heads, gate.key_dim(dim))
    q = torch.randn(3, kv_heads, group, dim).to(dtype).float()
    rule = Rule(Select.BUDGET, 1, 2, budget_pages=8)

    def step(device):
        move = [t.to(device) for t in (q, quick, pages, n_pages, tail_len, frame_of, frames)]
        queries, keys, ids, n, tail, table_, store = move
        scores = score(gate.query(queries), keys, ids, n, 0.125)
        steps = plan(rule, scores, ids, n, tail, table_)
        return steps, attend_tiers(queries, store, host.blocks(0), steps, 0.125, 4).cpu()

    (mine, out), (theirs, expected) = step("cuda"), step("cpu")
    for visit, other in ((mine.device, theirs.device), (mine.host, theirs.host)):
        assert torch.equal(visit.count.cpu(), other.count)
        for b in range(3):
            for h in range(kv_heads):
                assert listed(visit, b, h) == listed(other, b, h)
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("run", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        ("flash 2", torch.bfloat16),
        ("flash 3", torch.bfloat16),
        ("flash 3", torch.float16),
    ],
)
@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (65, 0), (63, 64), (200, 1000), (1, 777)])
def test_prefill_attention_equals_float64(run, dtype, tokens, before, monkeypatch):
    torch.manual_seed(tokens)
    if run == "flash 3" and prefill.flash_attention_3() is None:
        pytest.skip("this GPU has no FlashAttention-3")
    if run == "flash 2":
        monkeypatch.setattr(prefill, "flash_attention_3", lambda: None)
    heads, kv_heads, dim = 8, 2, 64
    q = torch.randn(tokens, heads, dim, device="cuda").to(dtype)
    kv = torch.randn(2, kv_heads, before + tokens, dim, device="cuda").to(dtype)
    k, v = (t[:, before:].transpose(0, 1).contiguous() for t in kv)
    prefix = kv[:, :, :before].contiguous() if before else None
    if run == "torch":
        out = prefill.prefill_attention(q, k, v, prefix, 0.125)
    else:
        out = prefill.prefill_flash(q, k, v, None if prefix is None else prefix.transpose(1, 2), 0.125)
    keys, values = (t.double().repeat_interleave(heads // kv_heads, 0) for t in kv)
    logits = torch.einsum("thd,hsd->hts", q.double(), keys) * 0.125
    future = (
        torch.arange(before + tokens, device="cuda") > torch.arange(before, before + tokens, device="cuda")[:, None]
    )
    expected = torch.einsum("hts,hsd->thd", torch.softmax(logits.masked_fill(future, -torch.inf), -1), values)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_host_kernel_reads_pinned_memory():
    blocks = torch.randn(8, 2, 64, 64).pin_memory()
    from test_attention import check, make_visit, oracle

    visit = make_visit(1, 2, (5,), 8, 0)
    q = torch.randn(1, 2, 4, 64)
    check(attend_cpu(q, ((blocks, visit),), 0.125, 4), oracle(q, blocks, visit, 0.125))


def test_an_exchange_does_not_wait_for_the_gpu():
    pool, _ = make_pool(64 * 100, 64 * 20, "cuda", dtype=torch.float16, exchange_interval=4, window_tokens=64)
    slots, lens = torch.arange(3, device="cuda"), torch.tensor([640, 1000, 1900], device="cuda")
    table = (torch.randperm(99, device="cuda")[: 3 * 30].view(3, -1, 1) + 1) * 64 + torch.arange(64, device="cuda")
    batch = Batch.build(table.flatten(1).int(), slots, lens, 1900, 1, 1)
    gone = batch.pages[0]
    torch.cuda.synchronize()
    for step in range(20):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")  # after first uses
        try:
            if step == 10:
                pool.coordinator.page_freed(gone)
            pool.coordinator.begin_decode(lambda: batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step % 3 == 0:
            torch.cuda.synchronize()
    counts = pool.coordinator.stats(0)
    assert counts["exchanges"] >= 3 and counts["exchanges_failed"] == 0
    shares = equal_shares(batch.n_pages, pool.frame_count // pool.head_num)
    assert pool.residency.used == int(shares.sum()) * pool.head_num * pool.layer_num


def test_swaps_move_what_steps_have_time_for():
    """Steps of no work wait for the copies of the one before, until these are small; with time they grow again."""
    pool, _ = make_pool(64 * 8000, 64 * 4000, "cuda", dtype=torch.float16, exchange_interval=1000, window_tokens=64)
    lane, requests, each = pool.coordinator.lane, 20, 400
    pages = (torch.randperm(requests * each, device="cuda") + 1).view(requests, -1)
    table = (pages[:, :, None] * 64 + torch.arange(64, device="cuda")).flatten(1).int()
    lens = torch.full((requests,), each * 64, device="cuda")
    batch = Batch.build(table, torch.arange(requests, device="cuda"), lens, each * 64, 1, 1)
    tables = Tables.make(requests, each, "cuda")
    tables.pages.copy_(batch.pages)
    tables.n_pages.fill_(each)

    def steps(count: int, cycles: int) -> float:
        """Seconds that each waited."""
        before = lane.late_seconds
        for _ in range(count):
            pool.coordinator.begin_decode(lambda: batch)
            pool.importance.uniform_(1, 2).mul_(pool.coordinator.weight)
            pool.coordinator.swap(tables)
            torch.cuda._sleep(cycles)
            if cycles > 10**6:  # a server's CPU is a step or two ahead
                torch.cuda.synchronize()
        torch.cuda.synchronize()
        pool.coordinator.begin_decode(lambda: batch)
        pool.coordinator.swap(tables)
        torch.cuda.synchronize()
        return (lane.late_seconds - before) / count

    def hurried(count: int) -> float:
        """The same of steps without work, the CPU so far ahead that the GPU does not wait for it."""
        torch.cuda._sleep(10**9)
        return steps(count, 1000)

    steps(1, 1000)  # the first shares out the frames, and compiles
    large = hurried(20)
    # (Those were on their way before one of them was seen to be late: they count once.)
    assert large > 0.0005 and lane.swap_bytes < SWAP_BYTES, (large, lane.swap_bytes)
    for _ in range(8):
        hurried(2)
    assert lane.swap_bytes < SWAP_BYTES // 8, lane.swap_bytes
    small = hurried(20)
    assert small < large / 2, (small, large)
    # One of each list is more than the least that may move, so these end unseen, and grow all the same.
    assert steps(60, 3 * 10**7) < 1e-4 and lane.swap_bytes == SWAP_BYTES
    assert pool.coordinator.counts["exchanges_failed"] == 0


LENGTHS = (1, 64, 129, 1000, 6000, 12000)
# SGLang's CUDA kernels take no fp32; its default's sampling kernels are compiled when first used, for minutes.
HALF = ["--dtype", "float16", "--sampling-backend", "pytorch"]
# What two orders of summation in fp16 may differ by in a log probability after a few sharp layers.
ROUNDING = 0.1


def answers(server) -> list[dict]:
    """Greedy answers with the two best log probabilities of each step: singly, then as a batch."""
    singles = [server.generate([p], 24, return_logprob=True, top_logprobs_num=2)[0] for p in random_prompts(1, LENGTHS)]
    return singles + server.generate(random_prompts(2, LENGTHS), 24, return_logprob=True, top_logprobs_num=2)


@pytest.fixture(scope="module")
def reference(checkpoints, tmp_path_factory):
    args = ["--attention-backend", "triton", "--page-size", "64", "--max-total-tokens", "65536", *HALF]
    with Server(checkpoints.path(), args, tmp_path_factory.mktemp("reference") / "log") as server:
        return answers(server)


@pytest.mark.parametrize(
    ("args", "env"),
    [
        (["--rheoserve-mode", "full"], {}),
        (["--rheoserve-mode", "full", "--disable-cuda-graph"], {}),
        (["--rheoserve-token-budget", "16384"], {"RHEOSERVE_TEST_RANDOM_EXCHANGE": "7"}),
        (["--rheoserve-token-budget", "16384", "--rheoserve-selector", "mean", "--disable-cuda-graph"], {}),
        (["--rheoserve-token-budget", "16384", "--rheoserve-admission", "off"], {}),
        (["--rheoserve-token-budget", "640", "--rheoserve-dense-layers", "4"], {}),
    ],
    ids=["full", "full-no-graphs", "random-exchange", "mean-no-graphs", "all-at-once", "all-layers-dense"],
)
def test_answers_equal_triton_within_rounding(args, env, reference, checkpoints, tmp_path):
    """Tokens are equal up to a step where the two best are within rounding; log probabilities up to there."""
    args = ["--rheoserve-device-tokens", "1024", "--enable-metrics", *HALF, *args]
    with rheo_server(checkpoints.path(), args, tmp_path, env) as server:
        whole = [same_up_to_rounding(mine, theirs) for mine, theirs in zip(answers(server), reference, strict=True)]
        assert sum(whole) >= len(whole) / 2, f"{sum(whole)} of {len(whole)} answers are equal to the end"
        counts = server.rheo()
        assert counts["host_blocks"] > 0 < counts["device_blocks"]
        metrics = server.metrics()
        for name in ("host_attention_seconds", "exposed_wait_seconds"):
            assert 0 < metrics[f"{PREFIX}{name}_total"] < 600, name
        after = server.settle()
        assert after["frames_used"] == after["host_pages_used"] == 0


LONG = 65000
FAR = [
    "--context-length",
    str(LONG + 600),
    "--json-model-override-args",
    f'{{"max_position_embeddings": {LONG + 600}}}',
]


def crowd_and_long(server) -> list[dict]:
    """48 requests at once, and one of a long prompt."""
    options = {"return_logprob": True, "top_logprobs_num": 2}
    crowd = server.generate(random_prompts(3, [1 + 37 * at for at in range(48)]), 16, **options)
    return crowd + server.generate(random_prompts(4, [LONG]), 16, **options)


def test_48_requests_and_64k_tokens_equal_triton_within_rounding(checkpoints, tmp_path):
    args = ["--attention-backend", "triton", "--page-size", "64", "--max-total-tokens", "262144", *HALF, *FAR]
    with Server(checkpoints.path(), args, tmp_path / "reference") as server:
        expected = crowd_and_long(server)
    # All is selected, and a sixth of it resident: the rest is the CPU's.
    args = ["--rheoserve-token-budget", "65600", "--rheoserve-device-tokens", "12288", "--rheoserve-host-size", "1"]
    args += ["--rheoserve-admission", "off"]
    with rheo_server(checkpoints.path(), [*args, *HALF, *FAR], tmp_path) as server:
        whole = [
            same_up_to_rounding(mine, theirs) for mine, theirs in zip(crowd_and_long(server), expected, strict=True)
        ]
        assert sum(whole) >= len(whole) / 2, f"{sum(whole)} of {len(whole)} answers are equal to the end"
        assert server.rheo()["host_blocks"] > 0
        assert server.settle()["frames_used"] == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mode", [["--rheoserve-mode", "full"], ["--rheoserve-token-budget", "16384"]])
def test_two_tensor_parallel_ranks_equal_triton_within_rounding(mode, reference, checkpoints, tmp_path):
    args = [*mode, "--tp", "2", "--rheoserve-device-tokens", "1024", *HALF]
    with rheo_server(checkpoints.path(), args, tmp_path) as server:
        whole = [same_up_to_rounding(mine, theirs) for mine, theirs in zip(answers(server), reference, strict=True)]
        assert sum(whole) >= len(whole) / 2, f"{sum(whole)} of {len(whole)} answers are equal to the end"
        assert server.rheo()["host_blocks"] > 0
        assert server.settle()["frames_used"] == 0


@pytest.mark.parametrize("mixed", [[], ["--enable-mixed-chunk"]], ids=["apart", "mixed"])
def test_a_prefill_does_not_wait_for_the_gpu(mixed, checkpoints, tmp_path):
    """Prompts of one and of several chunks, with cached prefixes, and beside requests that decode."""
    args = ["--attention-backend", "rheoserve", "--rheoserve-host-size", "0.4", "--rheoserve-device-tokens", "2048"]
    args += ["--chunked-prefill-size", "1024", *HALF, *mixed]
    program = [sys.executable, str(Path(__file__).with_name("no_waiting_server.py"))]
    with Server(checkpoints.path(), args, tmp_path / "log", program=program) as server:
        for seed in range(3):
            first = random_prompts(90 + seed, [700, 3000, 1500, 65])
            server.tokens(first, 30)
            assert len(server.tokens([prompt + prompt[:300] for prompt in first], 30)) == 4
        assert server.settle()["host_pages_used"] == 0


def test_a_long_prompt_takes_no_more_device_memory_than_two_layers_of_it(checkpoints, tmp_path):
    """Beside frames and what a batch of that size takes anyway; sixteen layers of it would be eight times as much."""
    args = ["--attention-backend", "rheoserve", "--rheoserve-host-size", "2", "--rheoserve-device-tokens", "2048"]
    args += ["--chunked-prefill-size", "4096", *HALF, *FAR]
    program = [sys.executable, str(Path(__file__).with_name("prefill_memory_server.py"))]
    model = checkpoints.path("--layers", "16")
    with Server(model, args, tmp_path / "log", program=program) as server:
        server.tokens(random_prompts(95, [4096]), 1)  # one batch without a prefix
        server.tokens(random_prompts(96, [LONG]), 1)
        server.tokens(random_prompts(97, [64]), 1)  # tells of the last one
        assert server.settle()["host_pages_used"] == 0
    lines = re.findall(r"prefill memory: (\d+) (\d+)", (tmp_path / "log").read_text())
    chunks = -(-LONG // 4096)
    assert len(lines) >= 1 + chunks + 1  # SGLang's own first request may come before
    peaks, now = zip(*(map(int, line) for line in lines[-(chunks + 2) :]), strict=True)
    alone, whole = peaks[1] - now[0], max(peaks[2:]) - now[1]  # a batch's peak is told by the next one
    layer = (LONG // 64 + 1) * 64 * 2 * 2 * 64 * 2  # bytes: K and V of two heads of 64 in fp16
    # The two rooms are of the longest prefix there may be, and the prompt's tables are small.
    assert layer < whole <= alone + 2.1 * layer + (16 << 20), (alone, whole, layer)


def test_a_cpu_that_does_not_answer_ends_the_server(checkpoints, tmp_path):
    """With no time to answer at all, the first request with blocks in the host store only is the last."""
    args = ["--rheoserve-mode", "full", "--rheoserve-device-tokens", "512", *HALF]
    env = {"RHEOSERVE_TEST_ANSWER_SECONDS": "0"}
    with rheo_server(checkpoints.path(), args, tmp_path, env) as server:
        server.generate(random_prompts(1, [100]), 4)
        with pytest.raises((requests.RequestException, AssertionError)):
            server.generate(random_prompts(2, [3000]), 4)
        assert server.process.wait(60) != 0
    assert "CPU attention did not answer in 0 s: layer " in (tmp_path / "log").read_text()


@pytest.mark.parametrize("where", ["host", "frame"])
def test_a_fault_in_what_decode_steps_wrote_ends_the_server(where, checkpoints, tmp_path):
    """The newest page is changed; all but the first token's page were written from CUDA graphs."""
    args = ["--rheoserve-canary", "raise", "--rheoserve-device-tokens", "4096", *HALF]
    with rheo_server(checkpoints.path(), args, tmp_path, {"RHEOSERVE_TEST_FAULT": where}) as server:
        server.tokens(random_prompts(71, [1]), 1400)  # looked at only when it has ended
        assert server.process.wait(60) != 0
    log = (tmp_path / "log").read_text()
    assert "RheoServe canary: page " in log and SAYS[where] in log


def same_up_to_rounding(mine, theirs) -> bool:
    """Whether all tokens are equal; fails where they differ by more than rounding."""
    mine, theirs = mine["meta_info"], theirs["meta_info"]
    for step, (ours, right) in enumerate(
        zip(mine["output_token_logprobs"], theirs["output_token_logprobs"], strict=True)
    ):
        if ours[1] != right[1]:
            best, second = (entry[0] for entry in theirs["output_top_logprobs"][step])
            assert best - second < ROUNDING, f"step {step}: the best two are {best - second:.3f} apart"
            return False
        assert abs(ours[0] - right[0]) < ROUNDING, f"step {step}: {ours[0]:.4f}, reference {right[0]:.4f}"
    return True
