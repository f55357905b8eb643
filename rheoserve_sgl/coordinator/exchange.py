"""The exchange policy: which blocks should be resident."""

import torch

# A resident block is worth this much more than its importance, so that near-equal blocks do not
# take turns in a frame.
HYSTERESIS = 1.25
BEHIND = 1e-6  # of what matters, what is behind it
TINY = 1e-30  # of blocks that nobody has selected yet the resident ones stay
# At most this much is copied at once, over all layers; the rest follows with the next exchange: before a step, beside
# steps (40 ms over PCIe), and by a step's swaps (10 ms; less where steps are shorter, see `Lane`).
BEFORE_BYTES, BESIDE_BYTES, SWAP_BYTES = 256 << 20, 2 << 30, 512 << 20

# Blocks that are ranked at once, some 64 bytes each with all that is made on the way; or a layer's.
RANKED_AT_ONCE = 1 << 22


def equal_shares(n_pages: torch.Tensor, capacity: int) -> torch.Tensor:
    """Split `capacity` pages of frames equally; what a short request cannot use goes to the others.

    Args:
        n_pages: `[batch]` pages of each request

    Returns:
        `[batch]` int64, each at most its n_pages, summing to at most capacity
    """
    order = torch.argsort(n_pages)
    ranked = n_pages[order].long()
    before = torch.cumsum(ranked, 0) - ranked
    heads_left = len(ranked) - torch.arange(len(ranked), device=n_pages.device)
    # The i-th shortest gets its need, unless that is more than an equal part of what the shorter ones
    # left; the first that is cut sets the cut for all longer ones.
    level = (capacity - before).clamp(min=0) // heads_left
    cut = ranked > level
    cap = torch.where(cut.any(), level.gather(0, cut.int().argmax()[None]), ranked[-1:])
    shares = torch.empty_like(ranked)
    shares[order] = torch.minimum(ranked, cap)
    return shares


def layers_at_once(pages: torch.Tensor, kv_heads: int, most: int) -> int:
    """How many layers have `most` blocks of `[batch, max_pages]` pages, padding included; at least one.

    Going through layers in such parts takes bounded memory, where one long request decodes beside many short ones, too.
    """
    return max(most // (pages.numel() * kv_heads), 1)


def rank_blocks(importance, resident, pages, valid, forced, *, ranks_by, forced_only, least: float = 0.0):
    """How much each block of the running requests deserves a frame; -inf where it must not have one.

    Args:
        importance, resident: `[layers, all_pages, kv_heads]` float32, bool
        pages, valid, forced: `[batch, max_pages]` int64, bool, bool
        ranks_by: "importance" or "recency"
        forced_only: whether only sink, window and newest page may be resident
        least: with less importance a block ranks behind all resident ones; 0: by importance alone

    Returns:
        `[layers, batch, kv_heads, max_pages]` float32
    """
    if ranks_by == "importance":
        worth, there = importance[:, pages], resident[:, pages]
        stays, waits = worth * HYSTERESIS + max(least * BEHIND, TINY), worth.where(worth >= least, worth * BEHIND**2)
        worth = torch.where(there, stays, waits)
    else:
        layers, _, kv_heads = importance.shape
        position = torch.arange(pages.shape[1], device=pages.device, dtype=torch.float32)
        worth = position[None, None, :, None].expand(layers, len(pages), -1, kv_heads)
    worth = worth.masked_fill(forced[None, ..., None], torch.finfo(torch.float32).max)
    keep = valid & forced if forced_only else valid
    return worth.masked_fill(~keep[None, ..., None], -torch.inf).transpose(2, 3)


def wanted_blocks(worth, pages, shares, all_pages: int, capacity: int, joint: bool = False):
    """The blocks that should be resident: the best `shares` of each (layer, request, head).

    Args:
        worth: `[layers, batch, kv_heads, max_pages]`
        pages: `[batch, max_pages]`
        shares: `[batch]`, each at most `capacity`
        joint: whether the heads of a layer and request share its frames by worth, instead of having equally many

    Returns:
        `[layers, all_pages, kv_heads]` bool
    """
    layers, batch, kv_heads, max_pages = worth.shape
    wanted = torch.zeros((layers, all_pages * kv_heads), dtype=torch.bool, device=worth.device)
    head = torch.arange(kv_heads, device=worth.device)
    blocks = (pages[:, None] * kv_heads + head[:, None]).expand(layers, -1, -1, -1)
    most = min(capacity, max_pages)
    if joint:
        worth, blocks = worth.flatten(2)[:, :, None], blocks.flatten(2)[:, :, None]
        most, shares = most * kv_heads, shares * kv_heads
    best, at = torch.topk(worth, most, dim=3)
    rank = torch.arange(most, device=worth.device)
    take = (rank < shares[:, None])[None, :, None] & (best > -torch.inf)
    block = blocks.gather(3, at)
    # What is not taken marks block 0, which is nobody's.
    wanted.scatter_(1, torch.where(take, block, 0).flatten(1), True)
    wanted[:, :kv_heads] = False
    return wanted.view(layers, all_pages, kv_heads)
