"""The processes of one training run, a GPU each.

Each makes its own share of a step's sequences; gradients are averaged, so that all have the same weights.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from serving import free_port


class Ranks:
    """This process's number and how many there are, as RANK and WORLD_SIZE tell (`launch`, torchrun): without them 0
    of 1.

    Args:
        device: "cuda", of which each takes one, or "cpu"
    """

    def __init__(self, device: str):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def average(self, parameters):
        """Make each parameter's gradient the mean of all ranks'; one without a gradient counts as 0.

        Each rank's loss is a mean over its own tokens, so that one with few that count has as much weight as another.
        """
        if self.count == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        whole = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(whole)
        whole /= self.count
        for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))

    def agree(self, value: float) -> float:
        """The first rank's value, for all: what they decide by it is the same."""
        if self.count == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(told, 0)
        return float(told)

    def check(self, parameters):
        """Raises:
        RuntimeError: this rank's parameters are not the first one's.
        """
        own = float(sum(parameter.detach().double().sum() for parameter in parameters))
        if abs(own - self.agree(own)) > 1e-6 * abs(own):
            raise RuntimeError(f"rank {self.rank} of {self.count} has other weights than the first one")

    def close(self):
        if self.count > 1:
            dist.destroy_process_group()


def launch(module: str, arguments: list[str], count: int):
    """Run `python -m module` with these arguments in so many processes, ranks 0, 1, 2 and so on of one machine.

    Raises:
        RuntimeError: one of them failed; the others are ended, and the processes that they started.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the ranks end, too
    where = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=where | {"RANK": rank, "LOCAL_RANK": rank},
            start_new_session=True,
        )
        for rank in map(str, range(count))
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.2)
        failed = [f"rank {number} ended with {rank.returncode}" for number, rank in enumerate(ranks) if rank.poll()]
        if failed:
            raise RuntimeError(f"of {count} ranks: " + ", ".join(failed))
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
        signal.signal(signal.SIGTERM, before)
