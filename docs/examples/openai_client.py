"""Ask a running server (`make serve`) through OpenAI's client; one answer attends to everything, one to a budget.

python docs/examples/openai_client.py [http://127.0.0.1:30000]
"""

import sys

import openai

from rheoserve_sgl.nano.ask import hide

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = openai.OpenAI(base_url=url + "/v1", api_key="none")
text, facts = hide(12_000, seed=1)  # some pages of source code with names and values hidden in it
name, value = next(iter(facts.items()))

for options in ({"mode": "full"}, {"token_budget": 2048}):
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"{text}\nWhat is the value of {name}?"}],
        temperature=0,
        max_tokens=64,
        extra_body={"custom_params": {"rheoserve": options}},
    )
    print(f"{options}: {answer.choices[0].message.content.strip()!r}, and it is {value}")
