"""A real server's interfaces: native, OpenAI, streaming, sgl.function, /server_info."""

import json
import re

import pytest
from serving import random_prompts

from rheoserve_sgl.ops.workers import cpu_variant

pytestmark = pytest.mark.server


def test_generate_streams_the_same_text(full):
    body = {"text": "two tiers", "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    whole = full.post("/generate", body).json()
    chunks = [
        json.loads(line[6:])
        for line in full.post("/generate", body | {"stream": True}, stream=True).iter_lines()
        if line.startswith(b"data: {")
    ]
    assert len(chunks) > 1
    assert chunks[-1]["text"] == whole["text"]
    assert chunks[-1]["output_ids"] == whole["output_ids"]


def test_openai_client(full):
    from openai import OpenAI

    client = OpenAI(base_url=full.url + "/v1", api_key="none")
    model = client.models.list().data[0].id
    settings = {"model": model, "temperature": 0, "max_tokens": 10}
    messages = [{"role": "user", "content": "What is in the host store?"}]
    chat = client.chat.completions.create(messages=messages, **settings)
    assert chat.usage.completion_tokens == 10 or chat.choices[0].finish_reason == "stop"
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(messages=messages, stream=True, **settings)
        if chunk.choices
    ]
    assert "".join(parts) == chat.choices[0].message.content
    completion = client.completions.create(prompt="a block is", **settings)
    streamed = client.completions.create(prompt="a block is", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == completion.choices[0].text


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ({"regex": r"[0-9]{3,6}"}, lambda text: re.fullmatch(r"[0-9]{3,6}", text)),
        ({"ebnf": 'root ::= "yes, " ("please" | "thanks")'}, lambda text: text in ("yes, please", "yes, thanks")),
    ],
)
def test_structured_output_beside_a_free_request(full, rule, matches):
    free = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    sampling = [free, {"temperature": 0.7, "max_new_tokens": 60} | rule]
    answers = full.post("/generate", {"text": ["a", "a number: "], "sampling_params": sampling}).json()
    alone = full.post("/generate", {"text": "a", "sampling_params": free}).json()
    assert matches(answers[1]["text"]), answers[1]["text"]
    assert answers[0]["output_ids"] == alone["output_ids"]


def test_openai_requests_carry_options(full):
    import openai

    client = openai.OpenAI(base_url=full.url + "/v1", api_key="none", max_retries=0)

    def ask(options):
        return client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
            extra_body={"custom_params": {"rheoserve": options}},
        )

    assert ask({"mode": "full"}).usage.completion_tokens > 0
    with pytest.raises(openai.BadRequestError, match="the server does not select by a token budget"):
        ask({"mode": "window"})


def test_an_answer_tells_what_was_attended_to_when_asked(full):
    prompts = random_prompts(77, [700, 1500, 100])
    full.flush()
    before = full.rheo()
    sampling = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    asked = [{"rheoserve": {"report": True}}, {"rheoserve": {"report": True}}, {}]
    every = [sampling | {"custom_params": options} for options in asked]
    answers = full.post("/generate", {"input_ids": prompts, "sampling_params": every}).json()
    reports = [answer["meta_info"]["finish_reason"].get("rheoserve") for answer in answers]
    assert reports[2] is None
    for length, report in zip((700, 1500), reports, strict=False):
        # Steps attend to all blocks of 4 layers and 2 KV heads; one is begun before the answer's end is known.
        pages = sum((length + step + 63) // 64 for step in range(1, 21))
        assert report["selected_blocks"] == 8 * pages == report["device_blocks"] + report["host_blocks"]
        assert 0 < report["host_share"] < 1
        assert report["hit_rate"] == pytest.approx(1 - report["host_blocks"] / report["selected_blocks"])
        assert report["waited_seconds"] >= 0 and report["pauses"] == 0
    after = full.rheo()
    blocks = after["host_blocks"] - before["host_blocks"]
    assert reports[0]["host_blocks"] + reports[1]["host_blocks"] <= blocks


def test_multi_turn_frontend_program(full):
    import sglang as sgl

    @sgl.function
    def interview(s):
        s += sgl.user("x" * 300)
        s += sgl.assistant(sgl.gen("first", max_tokens=8, temperature=0))
        s += sgl.user("And then?")
        s += sgl.assistant(sgl.gen("second", max_tokens=8, temperature=0))

    sgl.set_default_backend(sgl.RuntimeEndpoint(full.url))
    full.flush()
    state = interview.run()
    cold = (state["first"], state["second"])
    assert cold[1]
    state = interview.run()
    assert (state["first"], state["second"]) == cold


def test_server_info_shows_settings_and_live_counts(full):
    full.settle()
    info = full.info()
    assert info["rheoserve_mode"] == "full"
    assert info["page_size"] == 64
    before = full.rheo()
    assert before["settings"]["mode"] == "full"
    assert before["settings"]["device_tokens"] == 512
    assert before["cpu_variant"] == cpu_variant()
    assert before["frames_free"] == 4 * 2 * 512 // 64  # layers x KV heads x frames each
    [answer] = full.generate(random_prompts(9, [1000]), 40)
    assert answer["meta_info"]["completion_tokens"] == 40
    after = full.rheo()
    assert after["decode_steps"] >= before["decode_steps"] + 39
    assert after["exchanges"] > before["exchanges"]
    assert after["exchanged_bytes"] > before["exchanged_bytes"]
    token = 4 * 2 * 2 * 64 * 4  # bytes: layers x KV heads x K and V x head dim x float32
    assert 1039 <= (after["stored_bytes"] - before["stored_bytes"]) / token <= 1041  # the prompt, and what followed
    assert 0 < after["host_attention_share"] < 1
    assert after["frames_used"] + after["frames_free"] == before["frames_free"]
    assert after["host_pages_used"] == 1000 // 64 + (1039 // 64 - 1000 // 64)  # the radix tree's full pages


def test_asking_for_a_needle_tells_a_wrong_answer(full, capsys):
    """The checkpoint is random, and its answers are wrong."""
    from rheoserve_sgl.nano import ask

    text, facts = ask.hide(20_000, 3)
    assert 20_000 <= len(text) < 21_000 and all(f"\n{name} = {value}\n" in text for name, value in facts.items())
    assert ask.main(["--url", full.url, "--tokens", "1500"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("What is the value of key_") == shown.count("wrong: ") == 2
