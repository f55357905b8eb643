"""Swaps: blocks of a request and head that matter more now take the frames of others of that request and head.

How many frames each has is the exchange's to change; a swap leaves it, but for pages that requests share, where one may
take what another keeps. So it needs no ranking over all requests, and on a GPU it is cheap enough for every step
(rheoserve_sgl/ops/gpu/swap.py); here is what it does in plain torch.
"""

from dataclasses import dataclass
from itertools import product

import torch

from rheoserve_sgl.cache.residency import ARRIVING, ON_ITS_WAY, RESERVED, Moves, Residency
from rheoserve_sgl.coordinator.exchange import rank_blocks
from rheoserve_sgl.ops.plan import forced_pages


@dataclass(frozen=True)
class Ranking:
    """What makes a block worth a frame: see `rank_blocks`."""

    ranks_by: str
    forced_only: bool
    sink_pages: int
    window_pages: int

    @classmethod
    def of(cls, config) -> "Ranking":
        """The ranking of a RheoConfig's mode."""
        by = "importance" if config.mode == "balanced" else "recency"
        return cls(by, config.mode in ("window", "retrieval"), config.sink_pages, config.window_pages)


def swap_blocks(
    ranking: Ranking, residency: Residency, importance, tables, most: int, least: float = 0.0
) -> tuple[Moves, Moves]:
    """Take victims out of the table and reserve their frames for as many arrivals.

    Args:
        importance: `[layers, all_pages, kv_heads]` float32
        tables: the step's page table: `pages` `[batch, max_pages]`, `n_pages` `[batch]`
        most: swaps of each layer, request and head
        least: importance of a block that may arrive: what hardly matters must not take the turn of what does

    Returns:
        (newest, others): moves of each request's newest page, which the step is about to write, and of other pages.
        Newer pages come first. A block that two requests share moves once.
    """
    if importance.is_cuda:
        from rheoserve_sgl.ops.gpu.swap import swap_gpu as run
    else:
        run = swap_torch
    residency.begin()
    return run(ranking, residency, importance, tables, most, least)


def swap_torch(
    ranking: Ranking, residency: Residency, importance, tables, most: int, least: float
) -> tuple[Moves, Moves]:
    layers, _, kv_heads = importance.shape
    pages, counts = tables.pages.long(), tables.n_pages
    at = torch.arange(pages.shape[1])
    valid = at < counts[:, None]
    forced = valid & forced_pages(at, counts[:, None], ranking.sink_pages, ranking.window_pages)
    frame_of, owner = residency.frame_of, residency.owner
    worth = rank_blocks(
        importance, frame_of >= 0, pages, valid, forced, ranks_by=ranking.ranks_by, forced_only=ranking.forced_only
    )
    pairs = []
    for layer, row, head in product(range(layers), range(len(pages)), range(kv_heads)):
        resident = (frame_of[layer, pages[row], head] >= 0) & valid[row]
        ranks = worth[layer, row, head]
        best = torch.sort(ranks, descending=True, stable=True).indices[: int(resident.sum())]
        wanted = torch.zeros_like(resident).index_fill_(0, best, True) & (ranks > -torch.inf)
        enough = ranks >= (least if ranking.ranks_by == "importance" else -torch.inf)
        arriving = torch.nonzero(wanted & ~resident & enough)[:, 0].flip(0)
        leaving = torch.nonzero(resident & ~wanted)[:, 0]
        for new, old in list(zip(arriving.tolist(), leaving.tolist(), strict=False))[:most]:
            blocks = tuple(int(pages[row, place]) * kv_heads + head for place in (new, old))
            pairs.append((layer, *blocks, new == int(counts[row]) - 1))
    newest, others = (Moves.make(layers, max(len(pairs), 1), residency.frames, importance.device) for _ in range(2))
    for layer, new, old, tail in pairs:
        where = frame_of[layer].view(-1)
        frame = int(where[old])
        if where[new] == -1 and frame >= 0:  # no other request was first
            where[new], where[old] = ON_ITS_WAY if tail else ARRIVING - frame, -1
            owner[layer, frame] = RESERVED
            (newest if tail else others).add(layer, new, frame)
    return newest, others
