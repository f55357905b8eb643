"""The processes of one training run, a GPU each: `torchrun --nproc-per-node N -m benchmarks.nano.train ...`.

Each makes its own share of a step's sequences; gradients are averaged, so that all have the same weights.
"""

import os

import torch
import torch.distributed as dist


class Ranks:
    """This process's number and how many there are: 0 of 1 without torchrun, which tells by RANK and WORLD_SIZE."""

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
