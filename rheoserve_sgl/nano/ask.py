"""Ask a running server for values hidden in a long text: `python -m rheoserve_sgl.nano.ask [--url URL] [--tokens N]`.

The text is source code of Python's standard library. Two questions are asked in one chat, so that the second finds its
prompt cached. Ends with 1 if an answer is wrong.
"""

import argparse
import json
import random
import sysconfig
import time
import urllib.request
from pathlib import Path

PROBE = 6000  # characters, to learn how many make a token
SECONDS = 1800


def hide(characters: int, seed: int) -> tuple[str, dict[str, str]]:
    """About so many characters of source code with three facts in it, and the facts."""
    draw = random.Random(seed)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    draw.shuffle(files)
    lines: list[str] = []
    length = 0
    for file in files:
        for line in file.read_text(errors="ignore").splitlines(keepends=True):
            lines.append(line)
            length += len(line)
            if length > characters:
                break
        if length > characters:
            break
    names = ["key_" + "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(3)]
    facts = {name: str(draw.randrange(10_000, 100_000)) for name in names}
    for name, value in facts.items():
        lines.insert(draw.randrange(len(lines) * 8 // 10 + 1), f"{name} = {value}\n")
    return "".join(lines), facts


def chat(url: str, messages: list[dict], tokens: int) -> tuple[str, dict, float]:
    """The answer, the usage and the seconds it took."""
    body = {"model": "default", "messages": messages, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        document = json.load(reply)
    return document["choices"][0]["message"]["content"], document["usage"], time.perf_counter() - began


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--tokens", type=int, default=12_000, help="of the text, about")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sample, _ = hide(PROBE, args.seed)
    _, usage, _ = chat(args.url, [{"role": "user", "content": sample[:PROBE]}], 1)
    text, facts = hide(args.tokens * PROBE // usage["prompt_tokens"], args.seed)
    messages, wrong = [], 0
    for turn, name in enumerate(list(facts)[:2]):
        question = f"What is the value of {name}?"
        messages.append({"role": "user", "content": text + "\n" + question if turn == 0 else question})
        answer, usage, seconds = chat(args.url, messages, 96)
        messages.append({"role": "assistant", "content": answer})
        right = facts[name] in answer.rpartition("</think>")[2]
        wrong += not right
        print(f"{question}  [{usage['prompt_tokens']} tokens]")
        print(f"  {answer.strip()!r}\n  {'right' if right else 'wrong: ' + facts[name]}, {seconds:.1f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
