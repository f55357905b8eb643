"""One decode step on a GPU with the CPU beside it: memory that stays where it is, and a layer's kernels in order.

`begin` runs before each step, outside the CUDA graph; `tap` and `layer` are captured. Attention over what is resident
begins while the CPU's part is still being selected.
"""

import torch

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import GateWeights
from rheoserve_sgl.ops.doorbell import Exchange
from rheoserve_sgl.ops.gpu.append import NewTokens, append_gpu
from rheoserve_sgl.ops.gpu.attend import SplitRoom, attend_split, merge_parts
from rheoserve_sgl.ops.gpu.begin import tell_step
from rheoserve_sgl.ops.gpu.gate import gate_queries_gpu, gate_tap_gpu
from rheoserve_sgl.ops.gpu.listing import Listing, list_gpu
from rheoserve_sgl.ops.gpu.plan import MOST_PAGES, plan_gpu
from rheoserve_sgl.ops.gpu.quiet import mark_quiet
from rheoserve_sgl.ops.gpu.score import score_tiles
from rheoserve_sgl.ops.gpu.snapshot import snapshot
from rheoserve_sgl.ops.gpu.tables import Scratch, Tables
from rheoserve_sgl.ops.plan import Rule, Visit


class GpuStep:
    """Decodes up to `batch` requests of up to `max_pages` pages, with `group` query heads to a KV head.

    Args:
        pool: TwoTierKVPool, frames on the GPU and the host store pinned
        rules: each layer's
        exchange: pinned memory for the questions to the CPU, `[batch, kv_heads, ...]`
        asker: Asker; the CPU's threads answer for the next layer in turn
        answer: answers in their place, where there is no asker: Triton's interpreter has no bell
        totals: see `plan_gpu`; None: its own
    """

    def __init__(self, pool, rules: list[Rule], exchange: Exchange, asker, answer=None, totals=None):
        self.pool, self.rules, self.exchange, self.asker, self.answer = pool, rules, exchange, asker, answer
        batch, kv_heads, group, dim = exchange.q.shape
        max_pages = exchange.visit.blocks.shape[-1]
        if max_pages >= MOST_PAGES:
            most = (MOST_PAGES - 1) * PAGE_TOKENS
            raise ValueError(f"--context-length: {max_pages * PAGE_TOKENS} tokens of a request; legal: up to {most}")
        device = pool.device
        self.tables = Tables.make(batch, max_pages, device)
        # Of layers with even and with odd numbers: while one is attended to, the next one's lists are made.
        self.resident = [
            Visit(*(torch.zeros_like(t, device=device) for t in vars(exchange.visit).values())) for _ in range(2)
        ]
        self.visited, *self.seen = torch.zeros((3, batch, kv_heads), dtype=torch.int32, device=device)
        self.beside = not any(rule.selected_only for rule in rules)  # else lists depend on the selection
        self.room = SplitRoom(batch * kv_heads, group, dim, device)
        self.lse = torch.zeros((batch, kv_heads, group), dtype=torch.float32, device=device)
        self.budgets = torch.zeros(batch, dtype=torch.int32, device=device)
        self.weight = torch.ones(1, dtype=torch.float32, device=device)  # of this step's scores in the importance
        self.totals = torch.zeros((batch, 3), dtype=torch.int64, device=device) if totals is None else totals
        self.kind = pool.gate.kind
        self.selects = any(rule.needs_scores for rule in rules)
        self.rests = self.selects and self.beside
        if self.selects and not self.kind:
            raise ValueError(f"{type(pool.gate).__name__} has no kernels on a GPU")
        heads = 1 if self.kind == "seer" else group
        self.scratch = Scratch.make(batch, kv_heads, heads, max_pages, device) if self.selects else None
        width = pool.gate.key_dim(dim)
        self.gate_q = torch.zeros((batch, kv_heads, 1, width), dtype=torch.float32, device=device)

    def begin(self, req_to_token, slots, lens, rows: int, batch: int, limits, weight: float):
        """Before a step: its page table, in stream order.

        Args:
            slots, lens: `[>= rows]` int64, rows of req_to_token and lengths, the new token included
            rows: requests; batch: with the padding that a CUDA graph adds
            limits: `[requests]` int32, pages that a KV head may select, by row of req_to_token
            weight: of this step's scores in the importance of blocks
        """
        tables = self.tables.rows(batch)
        snapshot(req_to_token, slots, lens, rows, tables)
        if self.rests:
            mark_quiet(self.pool.residency.frame_of, tables)
        tell_step(limits, tables.requests, self.budgets, self.weight, self.exchange, rows, weight, self.asker)

    def tap(self, index: int, tapped):
        """Before `layer`, where the gate is a learned one: take in what it works on, which is not kept.

        Args:
            tapped: Tapped of the new tokens
        """
        gate, batch = self.pool.gate, len(tapped.q)
        quick, query = self.pool.quick.layers[index], self.gate_q[:batch, :, 0]
        tables = self.tables.rows(batch)
        gate_tap_gpu(gate.layers[index], tapped, tables, gate.running[index], quick, query, gate.rotate_last)

    def layer(self, index: int, q, k, v, loc, scale: float) -> torch.Tensor:
        """One layer's attention for the new tokens: `[batch, q_heads * head_dim]` in the dtype of q.

        Args:
            q: `[batch, q_heads * head_dim]`; k, v: `[batch, kv_heads, head_dim]`
            loc: `[batch]` int64, where the tokens are stored; 0 for padding
        """
        pool, rule = self.pool, self.rules[index]
        batch = len(q)
        _, kv_heads, group, dim = self.exchange.q.shape
        tables = self.tables.rows(batch)
        own = self.listing(index, tables)
        heads = q.contiguous().view(batch, kv_heads, group, dim)
        if self.beside and index == 0:
            list_gpu(own)
        new, scratch = NewTokens(pool.host.layers[index], pool.frames.layers[index], own.frame_of, loc, k, v), None
        if self.selects:
            scratch = self.score(index, heads, tables, scale, new)
        else:
            append_gpu(new)
        if pool.canary is not None:
            pool.canary.wrote(index, loc, k, v)
        visit, arrived = (None, own.seen) if self.beside else (own.visit, own.arrived)
        following = self.listing(index + 1, tables) if self.beside and index + 1 < len(self.rules) else None
        plan_gpu(
            rule, heads, tables, scratch, own.frame_of, pool.importance[index], self.weight, self.budgets,
            self.exchange, visit, self.visited[:batch], self.totals, self.asker, arrived, following,
        )  # fmt: skip
        split = self.room.split(batch * kv_heads)
        attend_split(heads, pool.frames.layers[index], own.visit, split, scale, self.beside)
        if self.asker is None:
            self.answer()
        out = torch.empty((batch, kv_heads, group, dim), dtype=q.dtype, device=q.device)
        host = self.visited, self.exchange.out, self.exchange.lse
        merge_parts(own.visit, split, out, self.lse, host, self.asker, self.beside)
        return out.view(batch, -1)

    def listing(self, index: int, tables: Tables) -> Listing:
        """Of a layer, in the memory of every second one."""
        pool, visit = self.pool, rows_of(self.resident[index % 2], len(tables.pages))
        arrived = pool.arrived[index : index + 1]
        return Listing(tables, pool.residency.frame_of[index], arrived, visit, self.seen[index % 2])

    def score(self, index: int, heads, tables: Tables, scale: float, new=None, tapped=None) -> Scratch:
        """Score the blocks in `tables` for one query of each request.

        Args:
            heads: `[batch, kv_heads, group, head_dim]`, queries
            new: NewTokens, appended before and, but with a learned gate, taken into their pages' keys; None: all are
                there
            tapped: Tapped of the queries, for a learned gate that `tap` was not given them
        """
        quick = self.pool.quick.layers[index]
        if self.kind != "seer":
            score_tiles(heads, quick, tables, self.scratch, scale, "range" if self.kind == "max_min" else "dot", new)
            return self.scratch
        query = self.gate_q[: len(heads)]
        weights: GateWeights = self.pool.gate.layers[index]
        if tapped is not None:
            gate_queries_gpu(weights, tapped.q.view(heads.shape), tapped.positions, query[:, :, 0])
        score_tiles(query, quick, tables, self.scratch, weights.gate_dim**-0.5, "dot", new, pooled=False)
        return self.scratch


def rows_of(visit: Visit, count: int) -> Visit:
    """The first rows of a list, in the same memory."""
    return Visit(*(tensor[:count] for tensor in vars(visit).values()))
