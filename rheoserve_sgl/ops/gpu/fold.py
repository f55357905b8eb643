"""Max, min and sum over the keys of each page that a prefill writes: one program a (page, KV head)."""

import torch
import triton
import triton.language as tl


@triton.jit
def _fold(k, token, before, filled, requests, running, out, kv_heads, dim, WIDE: tl.constexpr):
    page = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, WIDE)
    there = i < dim
    had = tl.load(before + page)
    own = running + (tl.load(requests + page) * kv_heads + head) * 3 * dim + i
    old = there & (had > 0)
    high = tl.load(own, mask=old, other=float("-inf"))
    low = tl.load(own + dim, mask=old, other=float("inf"))
    total = tl.load(own + 2 * dim, mask=old, other=0.0)
    key = k + (tl.load(token + page) * kv_heads + head) * dim + i
    for _ in range(tl.load(filled + page) - had):  # in the tokens' order: the sum has the same bits however they came
        new = tl.load(key, mask=there, other=0.0).to(tl.float32)
        high = tl.where((new > high) | (new != new), new, high)
        low = tl.where((new < low) | (new != new), new, low)
        total += new
        key += kv_heads * dim
    to = out + (page.to(tl.int64) * kv_heads + head) * 3 * dim + i
    tl.store(to, high, mask=there)
    tl.store(to + dim, low, mask=there)
    tl.store(to + 2 * dim, total, mask=there)


def fold_gpu(plain: torch.Tensor, writes, running: torch.Tensor) -> torch.Tensor:
    """As `rheoserve_sgl.ops.attn_gate.fold_torch`; plain may be of any float dtype."""
    _, kv_heads, dim = plain.shape
    out = torch.empty((len(writes.pages), kv_heads, 3, dim), dtype=torch.float32, device=plain.device)
    if len(writes.pages):
        _fold[(len(writes.pages), kv_heads)](
            plain, writes.token, writes.before, writes.filled, writes.requests, running, out, kv_heads, dim,
            WIDE=triton.next_power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return out
