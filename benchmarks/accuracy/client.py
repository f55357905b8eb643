"""Asking a live server, turn by turn, with options for RheoServe."""

import requests

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

    def right(self, sample, options: dict | None) -> tuple[int, int]:
        """Turns answered right, and turns; each answer becomes part of the next prompt."""
        messages, right = [], 0
        for turn in sample.turns:
            messages.append({"role": "user", "content": turn.text})
            answer = self.answer(messages, options)
            messages.append({"role": "assistant", "content": answer})
            right += contains(answer, turn.expected)
        return right, len(sample.turns)

    def answer(self, messages: list[dict], options: dict | None) -> str:
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        sampling = {"temperature": 0, "max_new_tokens": self.new_tokens}
        if options:
            sampling["custom_params"] = {"rheoserve": options}
        reply = requests.post(
            self.url + "/generate",
            json={"input_ids": self.tokenizer.encode(prompt, add_special_tokens=False), "sampling_params": sampling},
            timeout=SECONDS,
        )
        reply.raise_for_status()
        return reply.json()["text"]


def contains(answer: str, expected: tuple[str, ...]) -> bool:
    """Whether the values are in the answer proper, after any reasoning, in their order."""
    final, at = answer.rpartition("</think>")[2], 0
    for value in expected:
        at = final.find(value, at)
        if at < 0:
            return False
        at += len(value)
    return True
