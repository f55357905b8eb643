"""What tensor-parallel ranks have to have in common, so that they decide alike, and what they share."""

import os

import torch
from sglang.srt.distributed import get_world_group
from torch.distributed import ReduceOp

from rheoserve_sgl.ops.processors import own_part


def smallest(values: list[float]) -> list[float]:
    """The smallest over all ranks, of each value."""
    world = get_world_group()
    return values if world.world_size == 1 else reduce(values, ReduceOp.MIN, world.cpu_group)


def own_processors() -> list[int]:
    """This rank's part of the processors that it may use. All ranks ask at once."""
    world = get_world_group()
    return own_part(world.all_gather_object(sorted(os.sched_getaffinity(0))), world.rank_in_group)


def largest(values: list[float], group) -> list[float]:
    """The largest over the ranks of a CPU group of torch.distributed, of each value."""
    return reduce(values, ReduceOp.MAX, group)


def reduce(values: list[float], how: ReduceOp, group) -> list[float]:
    """Exact for integers below 2^53."""
    shared = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(shared, how, group=group)
    return shared.tolist()
