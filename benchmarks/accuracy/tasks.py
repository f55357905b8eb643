"""Tasks with one right answer each: facts hidden in source text, asked at its end, in one turn or several.

After RULER (Hsieh et al., 2024): a single needle, one of several keys, several keys in one question (its multi-query),
variable tracking; and recall over the turns of a chat. The model's own tokenizer cuts texts to the wanted context.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from benchmarks.nano.facts import Fact, make_value

ROOM = 300  # tokens for the questions and the template
MOST_TURNS = 3
DISTRACTORS = 24  # other facts in the text


@dataclass(frozen=True)
class Turn:
    """What is said, and the values that the answer must contain, in this order."""

    text: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    turns: tuple[Turn, ...]


def needle(text: Callable, draw: random.Random, others: int = DISTRACTORS) -> Sample:
    """One key, anywhere, beside others."""
    facts = _facts(1, draw)
    question = f"\nWhat is the value of {facts[0].name}?"
    return Sample((Turn(_hide(text, facts, draw, others) + question, (facts[0].value,)),))


def single(text: Callable, draw: random.Random) -> Sample:
    """One key, and no other in the text."""
    return needle(text, draw, others=0)


def four_keys(text: Callable, draw: random.Random) -> Sample:
    """One key of four."""
    return needle(text, draw, others=3)


def four_needles(text: Callable, draw: random.Random) -> Sample:
    """Four keys in one question."""
    facts = _facts(4, draw)
    names = ", ".join(fact.name for fact in facts[:3]) + f" and {facts[3].name}"
    question = f"\nWhat are the values of {names}?"
    return Sample((Turn(_hide(text, facts, draw) + question, tuple(fact.value for fact in facts)),))


def chain(text: Callable, draw: random.Random) -> Sample:
    """A name that stands for another one."""
    first, second = _facts(2, draw)
    alias = Fact(second.name, first.value, first.name)
    question = f"\nWhat is the value of {alias.name}?"
    return Sample((Turn(_hide(text, [first, alias], draw) + question, (first.value,)),))


def turns(text: Callable, draw: random.Random) -> Sample:
    """Three questions about one text; the third goes back to the first."""
    facts = _facts(2, draw)
    asked = [f"What is the value of {fact.name}?" for fact in (*facts, facts[0])]
    first = Turn(_hide(text, facts, draw) + "\n" + asked[0], (facts[0].value,))
    return Sample((first, Turn(asked[1], (facts[1].value,)), Turn(asked[2], (facts[0].value,))))


TASKS = {task.__name__: task for task in (needle, four_needles, chain, turns, single, four_keys)}


class Texts:
    """Stretches of source text of a wanted length.

    Args:
        tokenizer: of the model
        corpus: documents joined by NUL characters
        new_tokens: of an answer
    """

    def __init__(self, tokenizer, corpus: str, new_tokens: int):
        self.tokenizer = tokenizer
        self.room = ROOM + 20 * DISTRACTORS + MOST_TURNS * new_tokens
        self.lines = corpus.replace("\0", "\n").splitlines(keepends=True)
        # The same samples are asked with every budget, and cutting texts to length takes time.
        self.sample, self.tokens = cache(self.sample), cache(self.tokens)

    def sample(self, task: str, context: int, seed: int) -> Sample:
        """One sample whose prompt has at most `context` tokens, answers included."""
        draw = random.Random(f"{task} {context} {seed}")
        return TASKS[task](lambda: self._stretch(context - self.room, draw), draw)

    def tokens(self, count: int, seed: int) -> list[int]:
        """So many tokens of text, with nothing hidden in it."""
        text = "".join(self._stretch(2 * count, random.Random(f"text {seed}")))
        return self.tokenizer.encode(text, add_special_tokens=False)[:count]

    def _stretch(self, tokens: int, draw: random.Random) -> list[str]:
        picked, total, at = [], 0, draw.randrange(len(self.lines))
        while True:
            line = self.lines[at % len(self.lines)]
            total += len(self.tokenizer.encode(line, add_special_tokens=False))
            if total > tokens:
                return picked
            picked.append(line)
            at += 1


def _facts(count: int, draw: random.Random) -> list[Fact]:
    names: dict[str, None] = {}  # in the order of their drawing, where a set's would be another in every process
    while len(names) < count:
        names["key_" + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5))] = None
    return [Fact(name, make_value(draw)) for name in names]


def _hide(text: Callable, facts: list[Fact], draw: random.Random, others: int = DISTRACTORS) -> str:
    """The text with the facts in it, in their order, outside the last tenth; and so many others, anywhere."""
    lines = text()
    places = sorted(draw.randrange(max(len(lines) * 9 // 10, 1)) for _ in facts)
    inserted = list(zip(places, facts, strict=True))
    inserted += [(draw.randrange(len(lines) + 1), fact) for fact in _facts(others, draw)]
    for place, fact in sorted(inserted, key=lambda pair: pair[0], reverse=True):
        lines.insert(place, fact.line)
    return "".join(lines)
