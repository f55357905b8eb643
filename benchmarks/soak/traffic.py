"""What clients do to a server: requests of many kinds, some of them rude."""

import random
import re
import threading
from dataclasses import dataclass, field

import requests

SECONDS = 600
VOCABULARY = 256
SHORT, MIDDLE, LONG = 64, 1500, 6000  # tokens of prompts, at most
DIGITS = r"[0-9]{3,6}"
BAD = {
    "no prompt": {},
    "a negative number of tokens": {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": -1}},
    "no such mode": {
        "input_ids": [1, 2],
        "sampling_params": {"custom_params": {"rheoserve": {"mode": "sideways"}}},
    },
    "a temperature below zero": {"input_ids": [1, 2], "sampling_params": {"temperature": -1.0}},
    "a token that is none": {"input_ids": [1, 10**9], "sampling_params": {"max_new_tokens": 1}},
    "a token below zero": {"input_ids": [-1, 2], "sampling_params": {"max_new_tokens": 1}},
    "a prompt that is none": {"input_ids": "abc"},
    "an empty prompt": {"input_ids": [], "sampling_params": {"max_new_tokens": 1}},
    "a token of more than 64 bits": {"input_ids": [1, 10**30], "sampling_params": {"max_new_tokens": 1}},
    "a token that is no whole number": {"input_ids": [1.5, 2], "sampling_params": {"max_new_tokens": 1}},
    "more new tokens than the context has": {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 10**9}},
    "a share beyond one": {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 1, "top_p": 7}},
    "options that are none": {"input_ids": [1, 2], "sampling_params": {"custom_params": {"rheoserve": 7}}},
    "a pattern that is none": {"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4, "regex": "(("}},
    "a prompt beyond the context": {"input_ids": [1] * 100_000, "sampling_params": {"max_new_tokens": 1}},
}


@dataclass(frozen=True)
class Kept:
    """A greedy answer, to be compared with a dense one."""

    kind: str
    prompt: list[int]
    answer: list[int]


@dataclass
class Traffic:
    """Asks one server from several threads, until it is told to stop.

    done: requests by kind; failures: (kind, what went wrong); kept: a sample of the answers
    """

    url: str
    seed: int
    most_kept: int = 40
    done: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def __post_init__(self):
        self._lock, self._stop, self._answers = threading.Lock(), threading.Event(), 0
        draw = random.Random(self.seed)
        self._prefixes = [self._tokens(draw, 640) for _ in range(4)]
        self._kinds = {
            self.plain: 6,
            self.conversation: 3,
            self.shared_prefix: 4,
            self.long: 1,
            self.own_budget: 2,
            self.structured: 2,
            self.leave_the_stream: 3,
            self.abort: 3,
            self.malformed: 1,
            self.flush: 1,
        }

    def run(self, workers: int, seconds: float):
        """Ask for so long; returns when the last answer has come."""
        threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in range(workers)]
        for thread in threads:
            thread.start()
        self._stop.wait(seconds)
        self._stop.set()
        for thread in threads:
            thread.join(SECONDS)
            if thread.is_alive():
                self.failures.append(("end", f"a client had no answer {SECONDS} s after the traffic ended"))

    def _work(self, worker: int):
        draw = random.Random(f"{self.seed}-{worker}")
        while not self._stop.is_set():
            ask = draw.choices(list(self._kinds), list(self._kinds.values()))[0]
            kind, failure = ask.__name__, None
            try:
                ask(draw)
            except (AssertionError, requests.RequestException, KeyError, ValueError) as error:
                failure = f"{type(error).__name__}: {str(error)[:500]}"
            with self._lock:
                self.done[kind] = self.done.get(kind, 0) + 1
                if failure:
                    self.failures.append((kind, failure))

    def plain(self, draw):
        self._greedy("plain", self._tokens(draw, draw.randint(1, draw.choice((SHORT, MIDDLE)))), draw.randint(1, 40))

    def long(self, draw):
        self._greedy("long", self._tokens(draw, draw.randint(MIDDLE, LONG)), 8)

    def shared_prefix(self, draw):
        tail = self._tokens(draw, draw.choice((1, 63, 64, 65, 200)))
        self._greedy("shared_prefix", draw.choice(self._prefixes) + tail, draw.randint(1, 30))

    def conversation(self, draw):
        """Three turns, each on top of all that was said."""
        said = self._tokens(draw, draw.randint(10, MIDDLE // 2))
        for _ in range(3):
            said = said + self._greedy("conversation", said, draw.randint(5, 30))
            said = said + self._tokens(draw, draw.randint(1, 100))

    def own_budget(self, draw):
        options = draw.choice(({"token_budget": 1024}, {"mode": "full"}, {"mode": "window"}))
        sampling = {"custom_params": {"rheoserve": options}}
        assert len(self._generate(self._tokens(draw, draw.randint(1, MIDDLE)), 10, sampling)) == 10

    def structured(self, draw):
        body = {
            "text": f"a number such as {draw.randint(100, 999)}: ",
            "sampling_params": {"temperature": 0.8, "max_new_tokens": 12, "regex": DIGITS},
        }
        text = self._post("/generate", body).json()["text"]
        assert re.fullmatch(DIGITS, text), f"{text!r} does not match {DIGITS}"

    def leave_the_stream(self, draw):
        """A client that is gone after some tokens."""
        body = self._body(self._tokens(draw, draw.randint(1, MIDDLE)), 200) | {"stream": True}
        with self._post("/generate", body, stream=True) as reply:
            for number, _ in enumerate(reply.iter_lines()):
                if number >= draw.randint(0, 12):
                    break

    def abort(self, draw):
        """Aborted while queued, prefilling or running; the answer is cut short, or whole if it was quicker."""
        rid = f"soak-{draw.getrandbits(64):x}"
        later = threading.Timer(draw.random() * 2, self._abort, (rid,))
        later.start()
        body = self._body(self._tokens(draw, draw.randint(1, MIDDLE)), 200) | {"rid": rid}
        try:
            requests.post(self.url + "/generate", json=body, timeout=SECONDS)
        finally:
            later.join()

    def _abort(self, rid: str):
        """In a thread of its own, where nobody would see what it raises."""
        try:
            self._post("/abort_request", {"rid": rid})
        except (AssertionError, requests.RequestException) as error:
            with self._lock:
                self.failures.append(("abort", f"{type(error).__name__}: {str(error)[:500]}"))

    def malformed(self, draw):
        name = draw.choice(list(BAD))
        reply = requests.post(self.url + "/generate", json=BAD[name], timeout=SECONDS)
        assert reply.status_code in (400, 422), f"{name}: {reply.status_code} {reply.text[:200]}"

    def flush(self, draw):
        """SGLang refuses while requests run."""
        status = requests.post(self.url + "/flush_cache", timeout=SECONDS).status_code
        assert status in (200, 400), f"flush_cache: {status}"

    def _greedy(self, kind: str, prompt: list[int], new_tokens: int) -> list[int]:
        answer = self._generate(prompt, new_tokens, {})
        assert len(answer) == new_tokens, f"{len(answer)} tokens of {new_tokens}"
        with self._lock:  # each answer has the same chance to be kept
            self._answers += 1
            place = len(self.kept) if len(self.kept) < self.most_kept else random.randrange(self._answers)
            if place < self.most_kept:
                self.kept[place : place + 1] = [Kept(kind, prompt, answer)]
        return answer

    def _generate(self, prompt: list[int], new_tokens: int, sampling: dict) -> list[int]:
        body = self._body(prompt, new_tokens)
        body["sampling_params"] |= sampling
        return self._post("/generate", body).json()["output_ids"]

    @staticmethod
    def _body(prompt: list[int], new_tokens: int) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        return {"input_ids": prompt, "sampling_params": sampling}

    def _post(self, path: str, body: dict, **kwargs) -> requests.Response:
        reply = requests.post(self.url + path, json=body, timeout=SECONDS, **kwargs)
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text[:300]}"
        return reply

    @staticmethod
    def _tokens(draw, count: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(count)]
