"""The same without a server: SGLang's offline engine with RheoServe's flags as arguments.

python docs/examples/offline_engine.py [PATH of a checkpoint]
"""

import sys
from pathlib import Path

import sglang as sgl

import rheoserve_sgl
from rheoserve_sgl.nano.ask import hide

BUNDLED = Path(rheoserve_sgl.__file__).parent / "nano" / "model"


def main():
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else BUNDLED
    gate = path / "gate"
    engine = sgl.Engine(
        model_path=str(path),
        attention_backend="rheoserve",
        rheoserve_device_tokens=4096,
        rheoserve_host_ratio=32.0,
        rheoserve_gate_path=str(gate) if gate.is_dir() else None,
    )
    text, facts = hide(12_000, seed=4)
    prompts = [f"<|im_start|>user\n{text}\nWhat is {name}?<|im_end|>\n<|im_start|>assistant\n" for name in facts]
    answers = engine.generate(prompts, {"temperature": 0, "max_new_tokens": 64})
    for (name, value), answer in zip(facts.items(), answers, strict=True):
        print(f"{name}: {answer['text'].strip()!r}, and it is {value}")
    engine.shutdown()


if __name__ == "__main__":  # the engine's processes are spawned, and import this file
    main()
