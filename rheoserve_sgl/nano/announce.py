"""Wait until a server answers, then say what to try: `python -m rheoserve_sgl.nano.announce URL PID`.

Ends in silence when process PID, the server, is gone before.
"""

import os
import sys
import time
import urllib.error
import urllib.request

TEXT = """
RheoServe is ready. Try, in another terminal:

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"model": "default",
    "messages": [{{"role": "user", "content": "key_abcde = 48213\\nWhat is the value of key_abcde?"}}]}}'

or hide values in a long text and ask for them:

  {python} -m rheoserve_sgl.nano.ask --url {url} --tokens 12000

and see the tiers at work (frames, host pages, resident fraction, host-attention share, exchanges):

  curl -s {url}/server_info | {python} -c \\
    'import json, sys; print(json.dumps(json.load(sys.stdin)["internal_states"][0]["rheoserve"], indent=1))'
"""


def main(url: str, pid: int):
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                print(TEXT.format(url=url, python=sys.executable), flush=True)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
