"""A program of SGLang's frontend language: several turns over one long text, whose KV cache is shared by all of them.

python docs/examples/frontend_program.py [http://127.0.0.1:30000]
"""

import sys

import sglang as sgl

from rheoserve_sgl.nano.ask import hide

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
text, facts = hide(12_000, seed=2)


@sgl.function
def interview(s, names):
    for number, name in enumerate(names):
        s += sgl.user(("" if number else text + "\n") + f"What is the value of {name}?")
        s += sgl.assistant(sgl.gen(name, max_tokens=64, temperature=0))


sgl.set_default_backend(sgl.RuntimeEndpoint(url, chat_template_name="chatml"))
state = interview.run(names=list(facts)[:2])
for name, value in list(facts.items())[:2]:
    print(f"{name}: {state[name].strip()!r}, and it is {value}")
