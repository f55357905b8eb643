"""What is hidden in a text and asked again: names with values, aliases of names, and the ways to ask."""

import random
from dataclasses import dataclass

PREFIXES = ("key", "token", "limit", "code", "port", "seed", "index", "size")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Fact:
    """One line of a text. `target` is another fact's name (an alias), or None; `value` is what the name stands for."""

    name: str
    value: str
    target: str | None = None
    magic: bool = False  # said in words, as in RULER's needles

    @property
    def line(self) -> str:
        if self.magic:
            return f"# One of the special magic numbers for {self.name} is: {self.value}.\n"
        return f"{self.name} = {self.target or self.value}\n"


@dataclass(frozen=True)
class Asked:
    """A question, the lines that lead to its answer, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: str


def make_facts(count: int, draw: random.Random) -> list[Fact]:
    """Facts in the order of the text; about one in six is an alias of an earlier one."""
    facts: list[Fact] = []
    used = set()
    while len(facts) < count:
        name = f"{draw.choice(PREFIXES)}_{''.join(draw.choices(LETTERS, k=5))}"
        if name in used:
            continue
        used.add(name)
        named = [fact for fact in facts if not fact.magic]
        if named and draw.random() < 0.17:
            target = draw.choice(named)
            facts.append(Fact(name, target.value, target.name))
        elif draw.random() < 0.25:
            word = "".join(draw.choices(LETTERS, k=draw.randint(4, 8)))
            facts.append(Fact(word, make_value(draw), magic=True))
        else:
            facts.append(Fact(name, make_value(draw)))
    return facts


def make_value(draw: random.Random) -> str:
    digits = draw.choice((4, 5, 5, 5, 5, 6, 7))
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def chain(fact: Fact, by_name: dict[str, Fact]) -> tuple[str, ...]:
    """The lines from a name to its value."""
    lines = [fact.line.strip()]
    while fact.target is not None:
        fact = by_name[fact.target]
        lines.append(fact.line.strip())
    return tuple(lines)


def ask(facts: list[Fact], draw: random.Random) -> Asked:
    """A question about some of the facts."""
    by_name = {fact.name: fact for fact in facts}
    kind = draw.random()
    if kind < 0.35 and len(facts) >= 4:
        some = draw.sample(facts, draw.choice((2, 3, 4, 4)))
        names = ", ".join(fact.name for fact in some[:-1]) + f" and {some[-1].name}"
        steps = tuple(line for fact in some for line in chain(fact, by_name))
        return Asked(f"What are the values of {names}?", steps, ", ".join(fact.value for fact in some))
    aliases = [fact for fact in facts if fact.target is not None]
    fact = draw.choice(aliases if aliases and kind < 0.55 else facts)
    if fact.magic:
        question = f"What is the special magic number for {fact.name} mentioned in the provided text?"
        return Asked(question, (fact.line.strip(),), fact.value)
    if kind > 0.95:
        question = f"Which name was first given the value {fact.value}?"
        first = by_name[chain(fact, by_name)[-1].split(" = ")[0]]
        return Asked(question, (first.line.strip(),), first.name)
    question = draw.choice(
        (
            f"What is the value of {fact.name}?",
            f"What is {fact.name}?",
            f"Tell me the value of {fact.name}.",
            f"{fact.name} = ?",
        )
    )
    return Asked(question, chain(fact, by_name), fact.value)


def split_step(step: str) -> tuple[str, str, str]:
    """A fact's line: what comes before the value, the value with the space before it, what comes after."""
    before, equals, value = step.partition(" =")
    if equals:
        return before + equals, value, ""
    before, _, value = step.rpartition(": ")
    return before + ":", " " + value.removesuffix("."), "."


def recall_line(fact: Fact, draw: random.Random) -> tuple[str, str, str]:
    """A line of code that needs a fact: what comes before the value, the value, what comes after."""
    if fact.magic:
        return f"# The special magic number for {fact.name} is ", fact.value, ".\n"
    return draw.choice(
        (
            (f"assert {fact.name} == ", fact.value, "\n"),
            (f"# Q: {fact.name}? A: ", fact.value, "\n"),
            (f"    return check({fact.name}, ", fact.value, ")\n"),
            (f"print({fact.name})  # ", fact.value, "\n"),
        )
    )
