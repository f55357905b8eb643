"""Residency: which frame holds which block, in both directions."""

from dataclasses import dataclass

import torch

FREE, RESERVED = -1, -2  # in owner
# In frame_of, as good as -1 to all but a swap and a GPU's lists: a block on its way, and, from ARRIVING downwards, one
# on its way into frame ARRIVING - frame_of.
ON_ITS_WAY, ARRIVING = -2, -3


@dataclass(frozen=True)
class Moves:
    """Blocks on their way into frames, in slots of which each layer uses the first `count`.

    block, frame: `[layers, slots]` int64; unused slots have block 0, which is nobody's, and the frame behind the last
    count: `[layers]` int64
    """

    block: torch.Tensor
    frame: torch.Tensor
    count: torch.Tensor

    @classmethod
    def make(cls, layers: int, slots: int, frames: int, device) -> "Moves":
        """No moves yet, among so many frames."""
        block = torch.zeros((layers, slots), dtype=torch.int64, device=device)
        return cls(block, torch.full_like(block, frames), block.new_zeros(layers))

    def add(self, layer: int, block: int, frame: int):
        slot = int(self.count[layer])
        self.block[layer, slot], self.frame[layer, slot] = block, frame
        self.count[layer] += 1


class Residency:
    """The two maps between blocks and frames, kept inverse to each other.

    frame_of: `[layers, pages, kv_heads]` int32, the frame of a block, negative when only the host store has it: -1, or
        ON_ITS_WAY or less for one that a swap moves.
    owner: `[layers, frames]` int64, the block (`page * kv_heads + head`) in a frame, or FREE, or RESERVED for one that
        is on its way.

    Shapes never depend on values, so that on a GPU nothing here waits for it.
    """

    def __init__(self, layers: int, pages: int, kv_heads: int, frames: int, device: str):
        self.kv_heads = kv_heads
        self.frames = frames
        self.frame_of = torch.full((layers, pages, kv_heads), -1, dtype=torch.int32, device=device)
        # One column more, which takes what is written for no frame.
        self.owners = torch.full((layers, frames + 1), FREE, dtype=torch.int64, device=device)
        self._dropped = torch.zeros(pages, dtype=torch.bool, device=device)  # since the last `begin`

    @property
    def owner(self) -> torch.Tensor:
        return self.owners[:, : self.frames]

    @property
    def used(self) -> int:
        """Frames in use, over all layers."""
        return int((self.owner >= 0).sum())

    @property
    def free(self) -> torch.Tensor:
        """Free frames of each layer, `[layers]` int64."""
        return (self.owner == FREE).sum(1)

    def drop_pages(self, pages: torch.Tensor):
        """Free the frames of all blocks of these pages `[n]`, in every layer, also of those on their way."""
        held = self.frame_of[:, pages].flatten(1).long()
        self.owners.scatter_(1, torch.where(held < 0, self.frames, held), FREE)
        # (Assigning a number by an index would wait for the GPU.)
        self.frame_of.index_fill_(1, pages, -1)
        self._dropped.index_fill_(0, pages, True)

    def release(self, leaving: torch.Tensor):
        """Free the frames of resident blocks in `leaving`, `[layers, pages, kv_heads]` bool."""
        owner = self.owner
        owner.masked_fill_((owner >= 0) & leaving.flatten(1).gather(1, owner.clamp(min=0)), FREE)
        self.frame_of.masked_fill_(leaving, -1)

    def reserve(self, arriving: torch.Tensor, most: int) -> Moves:
        """Reserve free frames for blocks that are not resident before `admit`, in page order.

        Args:
            arriving: `[layers, pages, kv_heads]` bool
            most: blocks of a layer
        """
        arriving, free = arriving.flatten(1), self.owner == FREE
        most = min(most, self.frames, arriving.shape[1])
        count = torch.minimum(arriving.sum(1), free.sum(1)).clamp(max=most)
        used = torch.arange(most, device=count.device) < count[:, None]
        block = torch.where(used, first_places(arriving, most), 0)
        frame = torch.where(used, first_places(free, most), self.frames)
        self.owners.scatter_(1, frame, RESERVED)
        self.begin()
        return Moves(block, frame, count)

    def begin(self):
        """Moves are about to be made; pages that are dropped from now on are not admitted."""
        self._dropped.fill_(False)

    def admit(self, moves: Moves):
        """The blocks are in their frames now; those whose pages were dropped meanwhile give them back."""
        arrived = (moves.frame < self.frames) & ~self._dropped[moves.block // self.kv_heads]
        self.owners.scatter_(1, moves.frame, torch.where(arrived, moves.block, FREE))
        block, frame = torch.where(arrived, moves.block, 0), torch.where(arrived, moves.frame, -1)
        self.frame_of.flatten(1).scatter_(1, block, frame.to(torch.int32))

    def cancel(self, moves: Moves):
        """The blocks did not get into the frames reserved for them: these are free again, and the blocks elsewhere."""
        self.owners.scatter_(1, moves.frame, FREE)
        self.frame_of.flatten(1).scatter_(1, moves.block, -1)  # a swap's say where they were to go

    def clear(self):
        self.frame_of.fill_(-1)
        self.owners.fill_(FREE)
        self._dropped.fill_(True)


def first_places(mask: torch.Tensor, most: int) -> torch.Tensor:
    """Where the first `most` true values of each row `[rows, n]` are: `[rows, most]` int64, any value beyond them."""
    places = torch.zeros((len(mask), most + 1), dtype=torch.int64, device=mask.device)
    if mask.is_cuda:
        rank = mask.cumsum(1) - 1
        slot = torch.where(mask & (rank < most), rank, most)
        places.scatter_(1, slot, torch.arange(mask.shape[1], device=mask.device).expand_as(slot))
    else:  # few of many are true: a CPU need not touch the others
        row, place = torch.nonzero(mask, as_tuple=True)
        count = torch.bincount(row, minlength=len(mask))
        rank = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
        places[row, rank.clamp(max=most)] = place
    return places[:, :most]
