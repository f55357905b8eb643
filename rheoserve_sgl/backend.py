"""The attention backend: one layer's way through both tiers, in reading order."""

import logging
from dataclasses import replace

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.hooks import require_hooks
from rheoserve_sgl.ops.attention import attend_tiers
from rheoserve_sgl.ops.plan import Rule, Select, plan
from rheoserve_sgl.ops.prefill import prefill_attention
from rheoserve_sgl.ops.workers import worker_pool
from rheoserve_sgl.refusals import refuse_layers
from rheoserve_sgl.runtime.batch import Batch
from rheoserve_sgl.runtime.request_options import SelectionLimits
from rheoserve_sgl.runtime.rope_tap import RopeTaps, rope_table
from rheoserve_sgl.runtime.writes import Writes

logger = logging.getLogger(__name__)


class RheoAttnBackend(AttentionBackend):
    """Decode over frames and host blocks merged by LSE; full attention in prefill."""

    def __init__(self, model_runner):
        super().__init__()
        require_hooks()
        refuse_layers(model_runner.model)
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool: TwoTierKVPool = model_runner.token_to_kv_pool
        if not isinstance(self.token_to_kv_pool, TwoTierKVPool):
            raise RuntimeError(
                f"RheoServe's KV pool is not in place (found {type(self.token_to_kv_pool).__name__}); "
                "another plugin may have replaced it: see SGLANG_PLUGINS"
            )
        self.coordinator = self.token_to_kv_pool.coordinator
        self.config = self.token_to_kv_pool.config
        rule = decode_rule(self.config)
        self.selects = rule.needs_scores
        self.rules = [
            replace(rule, select=Select.ALL) if index < self.config.dense_layers else rule
            for index in range(self.token_to_kv_pool.layer_num)
        ]
        self.limits = SelectionLimits(
            len(self.req_to_token_pool.req_to_token), self.config, self.token_to_kv_pool.device
        )
        self.token_to_kv_pool.limits = self.limits
        self.budgets: torch.Tensor | None = None
        self.threads = self.token_to_kv_pool.threads
        self.taps = self._tap(model_runner.model) if self.selects else None
        self.batch: Batch | None = None
        self.writes: Writes | None = None
        self.prefilled: torch.Tensor | None = None  # `[n]` pages of the requests in a prefill
        logger.info("RheoServe: CPU attention by %s on %d threads", worker_pool(self.threads).variant, self.threads)

    def init_forward_metadata(self, forward_batch):
        """Build the page table, and let the coordinator move blocks before a decode step."""
        if forward_batch.forward_mode.is_idle():
            self.coordinator.settle()
            return
        lens = forward_batch.seq_lens_cpu
        self.batch = Batch.build(
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            int(lens.max() if lens is not None else forward_batch.seq_lens.max()),
            self.config.sink_pages,
            self.config.window_pages,
        )
        if forward_batch.forward_mode.is_decode():
            self.writes = Writes.of_decode(self.batch, rotate_last=self.config.gate_rope == "last")
            self.budgets = self.limits.pages[self.batch.requests]
            self.coordinator.begin_decode(self.batch)
        else:
            lengths = forward_batch.extend_seq_lens_cpu
            self.writes = Writes.of_extend(self.batch, forward_batch.extend_prefix_lens_cpu, lengths)
            prefilled = torch.tensor([new > 1 for new in lengths], device=self.batch.pages.device)
            self.prefilled = self.batch.pages[self.batch.valid & prefilled[:, None]]
            self.coordinator.begin_extend()

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        pool, batch = self.token_to_kv_pool, self.batch
        index = layer.layer_id - pool.start_layer
        self._store(layer, forward_batch, k, v, save_kv_cache, kwargs)
        heads = q.float().reshape(-1, pool.head_num, layer.tp_q_head_num // pool.head_num, layer.head_dim)
        scores = None
        if self.selects:
            tapped = self.taps and self.taps.of_layer(layer.layer_id)
            pool.gate.refresh(pool, index, self.writes, tapped)
            scores = pool.gate.score(pool, index, heads, layer.scaling, batch, tapped)
            self.coordinator.record(index, batch, scores)
        frame_of = pool.residency.frame_of[index]
        steps = plan(
            self.rules[index], scores, batch.pages, batch.n_pages, batch.tail_len, frame_of, self.threads, self.budgets
        )
        self.coordinator.count_visits(steps)
        out = attend_tiers(
            heads, pool.frames.layers[index], pool.host.blocks(index), steps, layer.scaling, self.threads
        )
        return out.view(len(out), -1).to(q.dtype)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        pool, batch = self.token_to_kv_pool, self.batch
        index = layer.layer_id - pool.start_layer
        self._store(layer, forward_batch, k, v, save_kv_cache, kwargs)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        out = torch.empty_like(q)
        start = 0
        prefixes = forward_batch.extend_prefix_lens_cpu
        lengths = forward_batch.extend_seq_lens_cpu
        for row, (before, new) in enumerate(zip(prefixes, lengths, strict=True)):
            tokens = slice(start, start + new)
            if new:
                prefix = self._gather_prefix(index, batch.pages[row], before)
                out[tokens] = prefill_attention(q[tokens], k[tokens], v[tokens], prefix, layer.scaling)
            start += new
        if save_kv_cache and self.selects:
            self._summarise(index, q, lengths, layer)
        return out.view(len(out), -1)

    def _store(self, layer, forward_batch, k, v, save_kv_cache, extras: dict):
        """Write K and V through; refuse what a model may ask of a backend and this one does not do."""
        asked = [name for name, value in extras.items() if value is not None]
        if asked or k is None:
            what = f"attention arguments {asked}" if asked else "a layer that shares another layer's KV"
            raise NotImplementedError(f"layer {layer.layer_id}: RheoServe does not serve {what}")
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _gather_prefix(self, index: int, pages: torch.Tensor, tokens: int):
        """K and V of a request's first tokens, `[2, kv_heads, tokens, head_dim]`, or None."""
        if tokens == 0:
            return None
        needed = (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS
        prefix = self.token_to_kv_pool.host.gather(index, pages[:needed].cpu())
        return prefix[:, :, :tokens].to(self.token_to_kv_pool.device)

    def _summarise(self, index: int, q: torch.Tensor, lengths: list[int], layer):
        """Gate keys of the pages that were written, and a first importance from each last query."""
        pool, batch = self.token_to_kv_pool, self.batch
        tapped = self.taps and self.taps.of_layer(layer.layer_id)
        pool.gate.refresh(pool, index, self.writes, tapped)
        if self.config.mode == "balanced":
            last = (torch.tensor(lengths, device=q.device).cumsum(0) - 1).clamp(min=0)
            heads = q[last].float().reshape(len(lengths), pool.head_num, -1, layer.head_dim)
            scores = pool.gate.score(pool, index, heads, layer.scaling, batch, tapped and tapped.take(last))
            pool.importance[index, self.prefilled] = 0.0  # of earlier chunks: the last one's query counts
            self.coordinator.record(index, batch, scores)

    def _tap(self, model) -> RopeTaps | None:
        """See queries and keys before RoPE, if the gate works on those."""
        pool = self.token_to_kv_pool
        if not pool.gate.needs_taps:
            return None
        taps = RopeTaps(model)
        pool.gate.prepare(rope_table(taps.rotary), len(self.req_to_token_pool.req_to_token), pool.head_dim)
        return taps


def decode_rule(config) -> Rule:
    """How a decode step selects blocks under these settings."""
    pages = {"sink_pages": config.sink_pages, "window_pages": config.window_pages}
    if config.mode == "full":
        return Rule(Select.ALL, **pages, selected_only=config.attends_selected_only)
    if config.mode == "window":
        return Rule(Select.FORCED, **pages, selected_only=True)
    if config.threshold is not None:
        log_threshold = torch.log(torch.tensor(config.threshold)).item()
        return Rule(Select.THRESHOLD, **pages, log_threshold=log_threshold, selected_only=config.attends_selected_only)
    return Rule(Select.BUDGET, **pages, budget_pages=config.budget_pages, selected_only=config.attends_selected_only)
