"""Asking a live server, turn by turn, with options for RheoServe."""

import re

import requests

from rheoserve_sgl import PAGE_TOKENS

SECONDS = 1800


class Client:
    """A chat model behind `/generate`; prompts are made here, so that their length is known.

    Args:
        url: of the server
        tokenizer: of its model, with a chat template
        new_tokens: at most, for an answer
    """

    def __init__(self, url: str, tokenizer, new_tokens: int = 96):
        self.url, self.tokenizer, self.new_tokens = url, tokenizer, new_tokens

    def answers(self, sample, options: dict | None) -> list[str]:
        """To each turn; each becomes part of the next prompt."""
        messages = []
        for turn in sample.turns:
            messages.append({"role": "user", "content": turn.text})
            messages.append({"role": "assistant", "content": self.answer(messages, options)})
        return [message["content"] for message in messages[1::2]]

    def answer(self, messages: list[dict], options: dict | None) -> str:
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Markers of reasoning may be special tokens, and the answer is what comes after them.
        sampling = {"temperature": 0, "max_new_tokens": self.new_tokens, "skip_special_tokens": False}
        if options:
            sampling["custom_params"] = {"rheoserve": options}
        tokens = self.tokenizer.encode(prompt, add_special_tokens=False)
        reply = generate(self.url, {"input_ids": tokens, "sampling_params": sampling})
        return reply["text"].removesuffix(self.tokenizer.eos_token or "")

    def least_budget(self) -> int:
        """Tokens that the server always selects."""
        info = requests.get(self.url + "/server_info", timeout=SECONDS).json()
        settings = info["internal_states"][0]["rheoserve"]["settings"]
        return settings["sink_tokens"] + settings["window_tokens"] + PAGE_TOKENS


def generate(url: str, body: dict) -> dict:
    """What the server's `/generate` answers. Raises RuntimeError, with its reason, if it refuses."""
    reply = requests.post(url + "/generate", json=body, timeout=SECONDS)
    if reply.status_code != 200:
        raise RuntimeError(f"{url} answers {reply.status_code}: {reply.text}")
    return reply.json()


def contains(answer: str, expected: tuple[str, ...]) -> bool:
    """Whether the values are in the answer proper, after any reasoning, in their order."""
    final, at = answer.rpartition("</think>")[2], 0
    for value in expected:
        found = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)").search(final, at)
        if found is None:
            return False
        at = found.end()
    return True
