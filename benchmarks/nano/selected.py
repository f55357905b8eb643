"""Attention as it is served, in training: what recalls attends to the blocks that its gate picks, and not to all.

A model that only ever saw dense attention need not be right without the blocks that a gate leaves out, however little
weight they had: in training it meets what is missing, and learns to get by without. Prompts stay dense, as in serving.
"""

import torch
import torch.nn.functional as F

from benchmarks.nano.gates import ROWS, WINDOW, Gates
from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import project_query
from rheoserve_sgl.gate.target import far_blocks

QUERIES = 512  # of each sequence
ALWAYS = 2 + WINDOW // PAGE_TOKENS  # the first block, the window and the query's own block


class Selected:
    """Replaces the attention of some queries of a batch by that over a selection.

    Args:
        recalls: `[batch, length]` bool, the tokens that a served model generates
        blocks: how many a query attends to, `ALWAYS` of them whatever the gate says
    """

    def __init__(self, gates: Gates, recalls: torch.Tensor, blocks: int):
        if blocks < ALWAYS:
            raise ValueError(f"blocks is {blocks}: at least {ALWAYS} are always attended to")
        self.gates, self.picked = gates, blocks - ALWAYS
        self.positions = [draw_run(row) for row in recalls[:ROWS]]

    def __call__(self, layer: int, plain, rotated, v, angles, out: torch.Tensor) -> torch.Tensor:
        """`out` `[batch, heads, length, head_dim]` with the queries' rows replaced.

        Args:
            plain, rotated: (q, k) before and after RoPE, `[batch, length, heads, head_dim]`
            v: `[batch, length, kv_heads, head_dim]`
            angles: `[length, head_dim]`, cosines then sines
        """
        rows = []
        for row, positions in enumerate(self.positions):
            if len(positions) == 0:
                continue
            seen = self.seen(layer, [tensor[row] for tensor in plain], angles, positions)
            (q, k), own_v = (tensor[row] for tensor in rotated), v[row]
            rows.append((row, positions, attend(q[positions], k, own_v, positions, seen)))
        if not rows:
            return out
        out = out.clone()
        for row, positions, attended in rows:
            out[row][:, positions] = attended.transpose(0, 1).to(out.dtype)
        return out

    @torch.no_grad()
    def seen(self, layer: int, plain, angles, positions) -> torch.Tensor:
        """`[queries, kv_heads, blocks]` bool: the blocks that each query attends to."""
        with torch.autocast(angles.device.type, enabled=False):
            q, k = (tensor.float() for tensor in plain)
            weights = self.gates.weights(layer, angles)
            whole = len(k) // PAGE_TOKENS  # a last block that is not complete is a query's own, or behind it
            blocks = -(-len(k) // PAGE_TOKENS)
            queries = project_query(weights, q[positions].unflatten(1, (k.shape[1], -1)), positions)
            far = far_blocks(positions, blocks, PAGE_TOKENS, WINDOW)
            scores = torch.full((len(positions), k.shape[1], blocks), -torch.inf, device=k.device)
            scores[:, :, :whole] = torch.einsum("nhw,bhw->nhb", queries, self.gates.keys(weights, k))
            scores.masked_fill_(~far[:, None], -torch.inf)
            best = scores.topk(min(self.picked, blocks), -1).indices
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & far[:, None] | ~far[:, None]


def attend(q, k, v, positions, seen) -> torch.Tensor:
    """Causal attention `[queries, heads, head_dim]` over the tokens of the blocks that are seen.

    Args:
        q: `[queries, heads, head_dim]`
        k, v: `[tokens, kv_heads, head_dim]`
        positions: `[queries]`
        seen: `[queries, kv_heads, blocks]` bool
    """
    tokens, kv_heads, _ = k.shape
    mask = seen.repeat_interleave(PAGE_TOKENS, -1)[..., :tokens]
    mask = mask & (torch.arange(tokens, device=k.device) <= positions[:, None])[:, None]
    # KV heads as a batch: the query heads of a group share a mask.
    q = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    k, v = (t.transpose(0, 1)[:, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.transpose(0, 1)[:, None])
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def draw_run(recalls: torch.Tensor) -> torch.Tensor:
    """Up to `QUERIES` positions that recall, one after the other from a random one on, so that answers are whole."""
    some = torch.nonzero(recalls)[:, 0]
    start = int(torch.randint(max(len(some) - QUERIES, 0) + 1, ()))
    return some[start : start + QUERIES]


def draw_blocks(length: int) -> int:
    """How many blocks a step's queries attend to: about a sixteenth of the context, half or twice that at times, and at
    least two more than every query's own (of 4,096 tokens always an eighth)."""
    share = (1 / 32, 1 / 16, 1 / 16, 1 / 8)[int(torch.randint(4, ()))]
    return max(int(length * share) // PAGE_TOKENS, ALWAYS + 2)
