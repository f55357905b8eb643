"""Helpers for tests: checkpoints and real SGLang server processes."""

import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import requests

START_SECONDS = 240
ANSWER_SECONDS = 300
VOCABULARY = 256  # byte tokens; the special ones stay out of random prompts


class Checkpoints:
    """Checkpoints in Hugging Face format, made by rheoserve_sgl.nano.make."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, *options: str) -> Path:
        """The checkpoint made with these command-line options."""
        path = self.folder / ("nano" + "_".join(options).replace("--", ""))
        if not path.exists():
            command = [sys.executable, "-m", "rheoserve_sgl.nano.make", str(path), *options]
            subprocess.run(command, check=True, capture_output=True)
        return path


LAUNCH = [sys.executable, "-m", "sglang.launch_server"]


def launch_command(model: Path, args: list[str], port: int, program: list[str] | None = None) -> list[str]:
    command = [*(program or LAUNCH), "--model-path", str(model), "--port", str(port)]
    # An idle scheduler polls; several servers would fight for two cores.
    command += ["--sleep-on-idle", "--random-seed", "1", "--skip-server-warmup"]
    # SGLang's own choice of a port for its ranks may be taken by an outgoing connection before it listens.
    own = {
        "--dtype": "float16" if on_gpu() else "float32",
        "--context-length": "16384",
        "--nccl-port": str(free_port()),
    }
    for name, value in own.items():
        if name not in args:
            command += [name, value]
    return command + args


def on_gpu() -> bool:
    """Whether servers run on a GPU: where there is one, unless conftest hid it."""
    import torch

    return torch.cuda.is_available()


def check_same(answers: list[list[int]], expected: list[list[int]]):
    """Of greedy answers. On a GPU, where 16-bit kernels round by who else is in the batch, of their lengths only."""
    if on_gpu():
        answers, expected = ([len(answer) for answer in both] for both in (answers, expected))
    assert answers == expected


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections: a server takes
    half a minute to come to it."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


class Server:
    """A real server process, ready to answer; killed with its children on exit."""

    def __init__(
        self, model: Path, args: list[str], log: Path, env: dict | None = None, program: list[str] | None = None
    ):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.model = model
        with log.open("w") as out:
            self.process = subprocess.Popen(
                launch_command(model, args, self.port, program),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | (env or {}),
            )

    def __enter__(self):
        try:
            return self.ready()
        except BaseException:
            self.stop()
            raise

    def ready(self) -> "Server":
        """Waits until it answers. Raises RuntimeError with the log's end if it exits, or takes too long."""
        deadline = time.time() + START_SECONDS
        while time.time() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited with {self.process.returncode}:\n{self.tail()}")
            try:
                if requests.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the server was not ready in {START_SECONDS} s:\n{self.tail()}")

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Kills it: going down in good order takes SGLang ten seconds, and has a test of its own."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in family:
                if child.is_running():
                    child.kill()
            psutil.wait_procs(family, timeout=20)
        self.process.wait()

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def post(self, path: str, body: dict, **kwargs) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=ANSWER_SECONDS, **kwargs)

    def generate(self, prompts: list[list[int]], new_tokens: int, **extra) -> list[dict]:
        """Greedy answers to a batch of token prompts."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        reply = self.post("/generate", {"input_ids": prompts, "sampling_params": sampling, **extra})
        assert reply.status_code == 200, f"{reply.text}\n{self.tail()}"
        return reply.json()

    def tokens(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        return [answer["output_ids"] for answer in self.generate(prompts, new_tokens)]

    def info(self) -> dict:
        return requests.get(self.url + "/server_info", timeout=60).json()

    def rheo(self) -> dict:
        """RheoServe's part of /server_info."""
        return self.info()["internal_states"][0]["rheoserve"]

    def metrics(self) -> dict[str, float]:
        """Samples by name, summed over labels."""
        samples = {}
        for line in requests.get(self.url + "/metrics", timeout=60).text.splitlines():
            if found := re.fullmatch(r"([a-zA-Z_:]+)(?:\{.*\})? (\S+)", line):
                samples[found[1]] = samples.get(found[1], 0.0) + float(found[2])
        return samples

    def flush(self):
        """flush_cache, which SGLang refuses (400) until the last request has left."""
        for _ in range(40):
            if requests.post(self.url + "/flush_cache", timeout=60).status_code == 200:
                return
            time.sleep(0.25)
        raise AssertionError(f"flush_cache was refused:\n{self.tail()}")

    def settle(self) -> dict:
        """RheoServe's counts once nothing runs and nothing is cached."""
        self.flush()
        return self.rheo()


class Watch:
    """Reads a RheoServe server's transactions, again and again, while something runs."""

    def __init__(self, server: Server, seconds: float = 0.05):
        self.server, self.seconds = server, seconds
        self.seen, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._stop.wait(self.seconds):
            self.seen.append(self.server.rheo()["transactions"])

    def __enter__(self) -> list[dict]:
        self._thread.start()
        return self.seen

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def random_prompts(seed: int, lengths) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


@contextmanager
def together(*servers: Server):
    """Servers that were begun one right after another, when all are ready."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        yield [server.ready() for server in servers]


def rheo_server(model: Path, args: list[str], folder: Path, env: dict | None = None) -> Server:
    """A server with RheoServe selected, its host store of modest size."""
    flags = ["--attention-backend", "rheoserve", "--rheoserve-host-size", "0.4"]
    if on_gpu():
        flags += ["--sampling-backend", "pytorch"]  # the default's kernels are compiled when first used, for minutes
    return Server(model, [*flags, *args], folder / "log", env)


def check_transformers(server: Server, path: Path, new_tokens: int = 20):
    """Greedy tokens equal those of Hugging Face's own generate on the same checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # the server is told to ignore it, too
    for prompt in random_prompts(3, (5, 64, 1500)):
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
        answer = out[0, len(prompt) :].tolist()
        assert len(answer) == new_tokens
        assert server.tokens([prompt], new_tokens)[0] == answer
