"""Kernels of a prefill, of page tables and of moves on a GPU, each against its plain-torch form; see `operators.py`."""

from types import SimpleNamespace

import torch

from rheoserve_sgl.cache.residency import Residency
from rheoserve_sgl.coordinator.swap import Ranking, swap_torch
from rheoserve_sgl.doctor.inputs import BLOCKS, DIM, FRAMES, GROUP, KV_HEADS, distance, gate_weights, some_frames
from rheoserve_sgl.doctor.operators_attention import prefill
from rheoserve_sgl.gate import make_gate
from rheoserve_sgl.gate.attn_gate import project_query
from rheoserve_sgl.gate.base import Tapped
from rheoserve_sgl.ops.append import append_torch
from rheoserve_sgl.ops.attn_gate import fold_torch, gate_keys_torch
from rheoserve_sgl.ops.pool_keys import pool_keys_torch
from rheoserve_sgl.ops.score import record_torch, score_torch
from rheoserve_sgl.runtime.batch import Batch
from rheoserve_sgl.runtime.writes import Writes

DEVICE = "cuda"
CONTEXT, SLOTS, LAYERS = 64 * 16, 6, 2


def requests(least: int = 1):
    """(token table, rows of it, tokens of each, Batch) of three requests."""
    lens = torch.randint(least, CONTEXT + 1, (3,))
    pages = torch.randperm(BLOCKS - 1)[: 3 * CONTEXT // 64].view(3, -1, 1) + 1
    table, rows = torch.zeros(SLOTS, CONTEXT, dtype=torch.int32), torch.randperm(SLOTS)[:3]
    table[rows] = (pages * 64 + torch.arange(64)).flatten(1).int()
    return table, rows, lens, Batch.build(table, rows, lens, int(lens.max()), 1, 2)


def there(item):
    """A dataclass of tensors on the device."""
    return type(item)(**{n: t.to(DEVICE) if torch.is_tensor(t) else t for n, t in vars(item).items()})


def snapshot_of(table, rows, lens):
    """Tables as a step's first kernel fills them, with one row of padding."""
    from rheoserve_sgl.ops.gpu.snapshot import snapshot
    from rheoserve_sgl.ops.gpu.tables import Tables

    tables = Tables.make(4, CONTEXT // 64, DEVICE)
    snapshot(table.to(DEVICE), rows.to(DEVICE), lens.to(DEVICE), 3, tables)
    return tables


def page_tables() -> tuple[float, float]:
    """A step's page table, and which of its requests are resident altogether."""
    from rheoserve_sgl.ops.gpu.quiet import EVERY, mark_quiet

    table, rows, lens, batch = requests()
    tables = snapshot_of(table, rows, lens)
    frame_of = torch.zeros(LAYERS, BLOCKS, KV_HEADS, dtype=torch.int32)
    frame_of[1, batch.pages[0, 0], 1] = -1
    mark_quiet(frame_of.to(DEVICE), tables)
    width, due = batch.pages.shape[1], (lens % EVERY == 0)
    quiet = torch.cat((torch.tensor([False, True, True]) & ~due, torch.tensor([False])))
    same = (
        torch.equal(tables.pages[:3, :width].cpu().long(), batch.pages)
        and torch.equal(tables.n_pages[:3].cpu(), batch.n_pages)
        and torch.equal(tables.tail_len[:3].cpu(), batch.tail_len)
        and torch.equal(tables.newest[:3].cpu(), batch.newest)
        and not tables.n_pages[3:].any()
        and torch.equal(tables.quiet.cpu().bool(), quiet)
    )
    return float(not same), 0.0


def prompts() -> tuple[float, float]:
    """New tokens of a prefill into both tiers, and the keys of their pages, pooled and folded."""
    from rheoserve_sgl.ops.gpu.append_pages import append_pages_gpu
    from rheoserve_sgl.ops.gpu.fold import fold_gpu, pool_gpu

    table, rows, lens, batch = requests(2)
    before = [int(torch.randint(0, int(n), ())) for n in lens]
    writes = Writes.of_extend(batch, before, [int(n) - had for n, had in zip(lens, before, strict=True)])
    loc = torch.cat([table[row, had:n] for row, had, n in zip(rows, before, lens.tolist(), strict=True)]).long()
    k, v = torch.randn(2, len(loc), KV_HEADS, DIM).half()
    frame_of, running = some_frames(), torch.randn(SLOTS, KV_HEADS, 3, DIM)
    host, frames = torch.randn(BLOCKS, KV_HEADS, 2, 64, DIM).half(), torch.zeros(FRAMES + 1, 2, 64, DIM).half()
    gate, had = make_gate(("quest", "mean")[int(torch.randint(2, ()))]), writes.before > 0
    keys = torch.zeros(BLOCKS, KV_HEADS, gate.key_dim(DIM))
    pool_keys_torch(gate, host, writes.pages[had], writes.before[had], keys)
    new, mine = there(writes), [tensor.to(DEVICE) for tensor in (host, frames, keys)]
    on_device = [tensor.to(DEVICE) for tensor in (k, v)]
    append_pages_gpu(*mine[:2], frame_of.to(DEVICE), new, *on_device)
    pool_gpu(gate.kind, on_device[0], new, mine[2])
    mine.append(fold_gpu(on_device[0], new, running.to(DEVICE)))
    append_torch(host, frames, frame_of, loc, k, v)
    pool_keys_torch(gate, host, writes.pages, writes.filled, keys)
    theirs = (host, frames[:FRAMES], keys, fold_torch(k.float(), writes, running))
    mine[1] = mine[1][:FRAMES]  # (on a CPU the last frame takes what has none)
    return max(distance(a.cpu().float(), b.float()) for a, b in zip(mine, theirs, strict=True)), 1e-4


def staging() -> tuple[float, float]:
    """A prefix out of both tiers."""
    from rheoserve_sgl.ops.gpu.gather import gather_prefix

    host, frames = torch.randn(BLOCKS, KV_HEADS, 2, 64, DIM).half(), torch.randn(FRAMES + 1, 2, 64, DIM).half()
    frame_of, pages = some_frames(), torch.randperm(BLOCKS - 1)[:9] + 1
    out = torch.zeros(2, 64 * len(pages), KV_HEADS, DIM, dtype=host.dtype, device=DEVICE)
    gather_prefix(*(tensor.to(DEVICE) for tensor in (host, frames, frame_of, pages)), out)
    held = frame_of[pages].long()
    blocks = torch.where((held >= 0)[..., None, None, None], frames[held], host[pages])
    return distance(out.cpu(), blocks.permute(2, 0, 3, 1, 4).flatten(1, 2)), 0.0


def first_scores() -> tuple[float, float]:
    """A prompt's blocks get their first importance from its last query."""
    from rheoserve_sgl.ops.gpu.first import add_scores
    from rheoserve_sgl.ops.gpu.score import score_tiles
    from rheoserve_sgl.ops.gpu.tables import Scratch

    table, rows, lens, batch = requests()
    tables = snapshot_of(table, rows, lens).rows(3)
    q, quick = torch.randn(3, KV_HEADS, 1, DIM), torch.randn(BLOCKS, KV_HEADS, DIM)
    scores = score_torch(q, quick, batch.pages, batch.n_pages, DIM**-0.5)
    importance = torch.rand(BLOCKS, KV_HEADS)
    mine, scratch = importance.to(DEVICE), Scratch.make(3, KV_HEADS, 1, CONTEXT // 64, DEVICE)
    score_tiles(q.to(DEVICE), quick.to(DEVICE), tables, scratch, DIM**-0.5, "dot")
    add_scores(scratch, tables, mine, 2.0)
    record_torch(scores, None, importance, batch.pages, batch.n_pages, 2.0)
    return distance(mine.cpu()[1:], importance[1:]), 1e-3


def gate_keys() -> tuple[float, float]:
    """A decode step's tokens with a learned gate: their pages' keys, complete ones and others, and its queries."""
    from rheoserve_sgl.ops.gpu.append import NewTokens
    from rheoserve_sgl.ops.gpu.gate import gate_tap_gpu
    from rheoserve_sgl.ops.gpu.score import score_tiles
    from rheoserve_sgl.ops.gpu.tables import Scratch

    table, rows, lens, batch = requests()
    lens[0] = int(batch.n_pages[0]) * 64  # complete with this step
    batch = Batch.build(table, rows, lens, int(lens.max()), 1, 2)
    weights, plain, running = gate_weights(), torch.randn(3, KV_HEADS, DIM), torch.randn(SLOTS, KV_HEADS, 3, DIM)
    keys = torch.zeros(BLOCKS, KV_HEADS, weights.gate_dim)
    mine, tables = (running.to(DEVICE), keys.to(DEVICE)), snapshot_of(table, rows, lens).rows(3)
    tiers = [torch.zeros(count, *shape, 2, 64, DIM) for count, shape in ((BLOCKS, (KV_HEADS,)), (FRAMES + 1, ()))]
    q, v = torch.randn(3, KV_HEADS * GROUP * DIM), torch.randn_like(plain)
    tokens = some_frames(), batch.newest * 64 + batch.tail_len - 1, plain, v
    new = NewTokens(*(tensor.to(DEVICE) for tensor in (*tiers, *tokens)))
    tapped, asked = there(Tapped(q, plain.flatten(1), lens - 1)), torch.empty(3, KV_HEADS, DIM, device=DEVICE)
    gate_tap_gpu(there(weights), tapped, tables, *mine, asked)
    scratch = Scratch.make(3, KV_HEADS, 1, CONTEXT // 64, DEVICE)
    score_tiles(asked[:, :, None], mine[1], tables, scratch, DIM**-0.5, "dot", new, pooled=False)
    append_torch(*tiers, *tokens)
    gate_keys_torch(weights, plain, Writes.of_decode(batch), running, keys)
    right = project_query(weights, q.view(3, KV_HEADS, GROUP, DIM), lens - 1)
    # (On a CPU the last frame takes what has none.)
    same = torch.equal(new.host.cpu(), tiers[0]) and torch.equal(new.frames[:-1].cpu(), tiers[1][:-1])
    return max(distance(mine[1].cpu(), keys), distance(asked.cpu(), right)) if same else 1.0, 1e-3


def swaps() -> tuple[float, float]:
    """Blocks that matter more take the frames of others; moves that differ count as 1."""
    from rheoserve_sgl.ops.gpu.swap import swap_gpu

    table, rows, lens, batch = requests()
    theirs = Residency(LAYERS, BLOCKS, KV_HEADS, FRAMES, "cpu")
    live = torch.zeros(BLOCKS, dtype=torch.bool).index_fill_(0, batch.pages[batch.valid], True)
    wanted = (torch.rand(LAYERS, BLOCKS, KV_HEADS) < 0.5) & live[:, None]
    theirs.admit(theirs.reserve(wanted, FRAMES))
    mine = Residency(LAYERS, BLOCKS, KV_HEADS, FRAMES, DEVICE)
    mine.frame_of.copy_(theirs.frame_of), mine.owners.copy_(theirs.owners)
    ranking, importance = Ranking("importance", False, 1, 2), torch.rand(LAYERS, BLOCKS, KV_HEADS)
    own = SimpleNamespace(pages=batch.pages.int().to(DEVICE), n_pages=batch.n_pages.to(DEVICE))
    swap_gpu(ranking, mine, importance.to(DEVICE), own, 8, 0.3)
    swap_torch(ranking, theirs, importance, batch, 8, 0.3)
    same = torch.equal(mine.frame_of.cpu(), theirs.frame_of) and torch.equal(mine.owners.cpu(), theirs.owners)
    return float(not same), 0.0


CHECKS = {
    "prefill, GPU": lambda: prefill(DEVICE),
    "page tables, GPU": page_tables,
    "pages of a prefill, GPU": prompts,
    "staged prefix, GPU": staging,
    "first scores, GPU": first_scores,
    "gate keys, GPU": gate_keys,
    "swaps, GPU": swaps,
}
