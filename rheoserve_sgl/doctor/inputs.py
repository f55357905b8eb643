"""Random inputs of operators, and how far two results are apart."""

import torch

from rheoserve_sgl.gate.attn_gate import K_PARTS, GateWeights
from rheoserve_sgl.ops.plan import Visit

KV_HEADS, GROUP, DIM, BLOCKS = 2, 4, 128, 64
FRAMES = BLOCKS * KV_HEADS // 2


def lists(batch: int, width: int) -> Visit:
    """Random blocks, some lists empty, last blocks not full."""
    blocks = torch.rand(batch, KV_HEADS, BLOCKS).argsort(-1)[..., :width].int().contiguous()
    shape = (batch, KV_HEADS)
    counts = torch.randint(0, width + 1, shape, dtype=torch.int32)
    return Visit(blocks, counts, torch.randint(1, 65, shape, dtype=torch.int32))


def table() -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of three requests, `[3, 40]` int64, and how many each has."""
    pages = torch.stack([torch.randperm(BLOCKS - 1)[:40] + 1 for _ in range(3)])
    return pages, torch.randint(1, 41, (3,), dtype=torch.int32)


def gate_weights() -> GateWeights:
    """A learned gate with all its parts, rotated for 1,024 positions."""
    angles = torch.arange(1024)[:, None] * 1e4 ** (-torch.arange(DIM // 2) / (DIM // 2))
    return GateWeights(
        q=torch.randn(KV_HEADS, GROUP, DIM, DIM) / DIM**0.5,
        k=torch.randn(KV_HEADS, len(K_PARTS) * DIM, DIM) / DIM**0.5,
        q_norm=torch.rand(DIM),
        k_norm=torch.rand(DIM),
        rope=torch.cat((angles.cos(), angles.sin()), 1),
    )


def distance(mine, theirs) -> float:
    """The largest difference; positions where both are infinite agree."""
    same = (mine == theirs) | (mine.isinf() & theirs.isinf())
    return float((mine - theirs).abs().masked_fill(same, 0.0).max())


def same_lists(one: Visit, other: Visit) -> bool:
    listed = torch.arange(one.blocks.shape[-1]) < one.count[..., None]
    used = one.count > 0
    same = torch.equal(one.count, other.count) and torch.equal(one.last_len[used], other.last_len[used])
    return same and not bool(((one.blocks != other.blocks) & listed).any())


def some_frames() -> torch.Tensor:
    """Frames of half of the blocks, `[BLOCKS, KV_HEADS]` int32, none twice; -1: none."""
    order = torch.randperm(BLOCKS * KV_HEADS, dtype=torch.int32).view(BLOCKS, KV_HEADS)
    return torch.where(order < FRAMES, order, -1)
