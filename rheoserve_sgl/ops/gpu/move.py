"""Blocks from the pinned host store into frames of all layers, by one kernel that reads over PCIe.

Layers are filled in their order, and each is told of when it is done: a step that runs beside may use what has arrived.
"""

import triton
import triton.language as tl

WORDS = 1024  # of 8 bytes, read at once by a program
BESIDE = 24  # programs that fill the bus and leave the multiprocessors to others
ALONE = 264


@triton.jit(do_not_specialize=["most"])
def _fill(
    hosts, frames, blocks, targets, counts, arrived, layers, most,
    SIZE: tl.constexpr, WORDS: tl.constexpr, TELLS: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, WORDS)
    pieces = (SIZE + WORDS - 1) // WORDS
    for layer in range(0, layers):
        count = tl.load(counts + layer)
        source = tl.load(hosts + layer).to(tl.pointer_type(tl.int64))
        target = tl.load(frames + layer).to(tl.pointer_type(tl.int64))
        for job in range(tl.program_id(0), count * pieces, tl.num_programs(0)):
            slot = layer * most + job // pieces
            place = (job % pieces) * WORDS + at
            block = tl.load(blocks + slot)
            frame = tl.load(targets + slot)
            words = tl.load(source + block * SIZE + place, mask=place < SIZE)
            tl.store(target + frame * SIZE + place, words, mask=place < SIZE)
        if TELLS:
            tl.debug_barrier()  # all of this program's threads have written
            tl.atomic_add(arrived + layer, 1, sem="release", scope="gpu")


def fill_frames(hosts, frames, block_bytes: int, moves, programs: int = ALONE, arrived=None):
    """Copy the blocks of `moves` into their frames, in stream order.

    Args:
        hosts: `[layers]` int64, addresses of `[all_blocks, 2, 64, head_dim]`, pinned
        frames: `[layers]` int64, addresses of `[frames + 1, 2, 64, head_dim]`
        block_bytes: of a block, a multiple of 8
        moves: rheoserve_sgl.cache.residency.Moves
        programs: how many work at it
        arrived: `[layers]` int32 on the device, each counted up by every program that is done with a layer; None:
            nobody is told
    """
    layers, most = moves.block.shape
    if most == 0:
        return
    _fill[(programs,)](
        hosts, frames, moves.block, moves.frame, moves.count, moves.count if arrived is None else arrived, layers, most,
        SIZE=block_bytes // 8, WORDS=WORDS, TELLS=arrived is not None,
    )  # fmt: skip
