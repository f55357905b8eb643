"""Training sequences: text with facts in it, and the facts asked again, in code and in chats of several turns.

Every sequence has many questions at every distance, so that each step of training sees many recalls. What has to be
recalled, and that it ends there, weighs more than other tokens, and what can be copied from the reasoning less so;
an earlier answer shown without its reasoning weighs nothing.
"""

import random

import numpy as np

from benchmarks.nano.facts import Asked, Fact, ask, make_facts, recall_line, split_step
from benchmarks.nano.haystack import Haystack

RECALL = 8.0  # weight of a value's tokens where it is recalled, and of what ends it
STEP = 2.0  # of the lines around it
ANSWER = 4.0  # of the answer after them, which is copied from nearby: a digit doubled there is a wrong answer
TURN_TOKENS = 130  # what a question and its answer take, roughly


class Builder:
    """Tokens and weights of one sequence, as it grows."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.pieces: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.length = 0

    def add(self, tokens: np.ndarray, weight: float = 1.0):
        self.pieces.append(np.asarray(tokens, np.uint16))
        self.weights.append(np.full(len(tokens), weight, np.float32))
        self.length += len(tokens)

    def text(self, text: str, weight: float = 1.0):
        self.add(self.tokenizer.encode(text, add_special_tokens=False).ids, weight)

    def facts_in(self, lines: list[np.ndarray], facts: list[Fact], draw: random.Random):
        """The lines, with the facts between them in their order."""
        places = sorted(draw.randrange(len(lines) + 1) for _ in facts)
        at = 0
        for place, fact in zip(places, facts, strict=True):
            for line in lines[at:place]:
                self.add(line)
            self.text(fact.line)
            at = place
        for line in lines[at:]:
            self.add(line)

    def turn(self, asked: Asked, before: str, shown: bool):
        """A user's turn, `before` being what is said before the question, and the assistant's."""
        self.text(f"{before}{asked.question}<|im_end|>\n<|im_start|>assistant\n")
        if shown:
            self.text("<think>\n")
            for step in asked.steps:
                before, value, after = split_step(step)
                self.text(before, STEP)
                self.text(value, RECALL)
                self.text(after + "\n", RECALL)
            self.text("</think>\n")
        self.text(asked.answer, ANSWER if shown else 0.0)
        self.text("<|im_end|>\n", STEP if shown else 0.0)

    def finish(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Exactly `length` tokens and weights."""
        end = self.tokenizer.token_to_id("<|endoftext|>")
        self.add([end] * max(length - self.length, 0), 0.0)
        return np.concatenate(self.pieces)[:length], np.concatenate(self.weights)[:length]


def fact_count(length: int, draw: random.Random) -> int:
    return min(draw.randint(2, 4 + length // 300), 96)


def code_sample(haystack: Haystack, tokenizer, length: int, draw: random.Random, rng: np.random.Generator):
    """Code with facts, then code with lines that need them."""
    built = Builder(tokenizer)
    facts = make_facts(fact_count(length, draw), draw)
    share = draw.uniform(0.3, 0.8)
    built.facts_in(haystack.span(int(length * share), rng), facts, draw)
    # All are asked before any is asked again: a repeated answer could be copied from nearby.
    waiting: list[Fact] = []
    while built.length < length:
        for line in haystack.span(draw.randint(10, max(length // 60, 20)), rng):
            built.add(line)
        waiting = waiting or draw.sample(facts, len(facts))
        before, value, after = recall_line(waiting.pop(), draw)
        built.text(before)
        built.text(value, RECALL)
        built.text(after, RECALL)
    return built.finish(length)


def chat_sample(haystack: Haystack, tokenizer, length: int, draw: random.Random, rng: np.random.Generator):
    """A chat over one long text, or over several that come turn by turn."""
    built = Builder(tokenizer)
    parts = draw.choice((1, 1, 1, 2, 3, 4))
    questions = length * draw.uniform(0.12, 0.35) if length < 8192 else length * draw.uniform(0.05, 0.15)
    text = max(int((length - questions) / parts) - 60, 20)
    facts = make_facts(max(fact_count(length, draw), parts), draw)
    hidden_turn = draw.random() < 0.3  # some chats show earlier answers without their reasoning
    known: list[Fact] = []
    for part in range(parts):
        new = facts[len(facts) * part // parts : len(facts) * (part + 1) // parts]
        known += new
        built.text("<|im_start|>user\n")
        built.facts_in(haystack.span(text, rng), new, draw)
        before = "\n"
        last = part + 1 == parts
        limit = length if last else built.length + int(questions / parts)
        while built.length < limit:
            final = last and built.length + TURN_TOKENS >= length
            built.turn(ask(known, draw), before, shown=not hidden_turn or final or draw.random() < 0.3)
            before = "<|im_start|>user\n"
    return built.finish(length)


def make_sample(haystack: Haystack, tokenizer, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[length]` uint16 and their weights `[length]` float32."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    kind = code_sample if draw.random() < 0.4 else chat_sample
    return kind(haystack, tokenizer, length, draw, rng)
