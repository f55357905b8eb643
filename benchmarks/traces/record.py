"""Record what a model selects: `python -m benchmarks.traces.record --model PATH --text FILE --out OUT.npz`.

A real server on this machine's CPU decodes the given text token by token (benchmarks/accuracy/forced.py), so that a
small model's trace is that of real text and not of what it would repeat; with `--generate` what the model itself says
(at temperature 1).
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from serving import Server

from benchmarks.accuracy.forced import forced_losses
from benchmarks.accuracy.tasks import Texts

PROGRAM = Path(__file__).with_name("recording_server.py")


def main(argv=None):
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=512, help="tokens decoded after it")
    parser.add_argument("--budget", type=int, default=1024, help="tokens selected per KV head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", action="store_true", help="decode the model's own tokens")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for the server")
    args = parser.parse_args(argv)
    texts = Texts(AutoTokenizer.from_pretrained(args.model), args.text.read_text(), 0)
    tokens = texts.tokens(args.context + args.steps, args.seed)
    flags = ["--attention-backend", "rheoserve", "--rheoserve-mode", "retrieval", "--dtype", "auto"]
    flags += ["--rheoserve-token-budget", str(args.budget), "--rheoserve-window-tokens", "256"]
    flags += ["--context-length", str(args.context + args.steps + 64), "--rheoserve-host-size", "1"]
    flags += ["--enable-custom-logit-processor", *args.flags]
    program = [sys.executable, str(PROGRAM), str(args.out.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        with Server(args.model, flags, Path(folder) / "log", program=program) as server:
            prompt, rest = tokens[: args.context], tokens[args.context :]
            if args.generate:
                said = {"temperature": 1.0, "max_new_tokens": len(rest), "ignore_eos": True}
                reply = server.post("/generate", {"input_ids": prompt, "sampling_params": said})
                assert reply.status_code == 200, reply.text
                what = "of the model's own tokens"
            else:
                losses = forced_losses(server.url, prompt, rest, None)
                what = f"loss {sum(losses) / len(losses):.4f}"
    print(f"{args.out}: {args.steps} steps after {args.context} tokens, {what}")


if __name__ == "__main__":
    main()
