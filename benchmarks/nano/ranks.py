"""The processes of one training run, a GPU each.

Each makes its own share of a step's sequences; gradients are averaged, so that all have the same weights.
"""

import os
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist


class Ranks:
    """This process's number and how many there are, as RANK and WORLD_SIZE tell (`launch`, torchrun): without them 0
    of 1."""

    def __init__(self):
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def average(self, parameters):
        """Make each parameter's gradient the mean of all ranks'; one without a gradient counts as 0."""
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

    def close(self):
        if self.count > 1:
            dist.destroy_process_group()


def launch(module: str, arguments: list[str], count: int):
    """Run `python -m module` with these arguments in so many processes, ranks 0, 1, 2 and so on of one machine.

    Raises:
        RuntimeError: one of them failed; the others are ended.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks = [
        subprocess.Popen([sys.executable, "-m", module, *arguments], env=where | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(count))
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.2)
        failed = [number for number, rank in enumerate(ranks) if rank.poll()]
        if failed:
            raise RuntimeError(f"rank {failed[0]} of {count} ended with {ranks[failed[0]].returncode}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
