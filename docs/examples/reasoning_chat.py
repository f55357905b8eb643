"""A chat with reasoning, streamed; afterwards, what the answer's steps attended to.

python docs/examples/reasoning_chat.py [http://127.0.0.1:30000]
"""

import json
import sys

import requests

from rheoserve_sgl.nano.ask import hide

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
text, facts = hide(12_000, seed=3)
names = " and ".join(list(facts)[:2])
prompt = f"<|im_start|>user\n{text}\nWhat are the values of {names}?<|im_end|>\n<|im_start|>assistant\n"
sampling = {"temperature": 0, "max_new_tokens": 96, "skip_special_tokens": False}
sampling["custom_params"] = {"rheoserve": {"report": True}}

body = {"text": prompt, "sampling_params": sampling, "stream": True}
shown, last = 0, None
with requests.post(url + "/generate", json=body, stream=True, timeout=600) as reply:
    for line in reply.iter_lines():
        if line.startswith(b"data: {"):
            last = json.loads(line.removeprefix(b"data: "))
            print(last["text"][shown:], end="", flush=True)
            shown = len(last["text"])
report = last["meta_info"]["finish_reason"]["rheoserve"]
print(f"\nexpected: {facts}")
resident, by_cpu = report["hit_rate"], report["host_share"]
print(f"{resident:.0%} of the selected blocks were resident, the CPU attended to {by_cpu:.0%} of all")
