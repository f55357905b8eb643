"""The attention backend: one layer's way through both tiers, in reading order."""

import logging
from dataclasses import replace
from itertools import accumulate
from time import perf_counter

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from rheoserve_sgl.cache.pool import TwoTierKVPool
from rheoserve_sgl.coordinator.attended import Attended
from rheoserve_sgl.coordinator.working_set import WorkingSets
from rheoserve_sgl.hooks import require_hooks
from rheoserve_sgl.ops.attention import attend_tiers
from rheoserve_sgl.ops.plan import Rule, Select, plan
from rheoserve_sgl.ops.prefill import prefill_attention, prefill_flash
from rheoserve_sgl.ops.processors import pinned
from rheoserve_sgl.ops.workers import cpu_variant
from rheoserve_sgl.refusals import attention_layers
from rheoserve_sgl.runtime.batch import Batch, pages_of
from rheoserve_sgl.runtime.calibration import calibrate
from rheoserve_sgl.runtime.ranks import own_processors
from rheoserve_sgl.runtime.request_options import SelectionLimits
from rheoserve_sgl.runtime.rope_tap import RopeTaps, rope_table
from rheoserve_sgl.runtime.telemetry import observe
from rheoserve_sgl.runtime.writes import Writes, places, to_device

logger = logging.getLogger(__name__)


class RheoAttnBackend(AttentionBackend):
    """Decode over frames and host blocks merged by LSE; full attention in prefill."""

    def __init__(self, model_runner):
        super().__init__()
        require_hooks()
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool: TwoTierKVPool = model_runner.token_to_kv_pool
        if not isinstance(self.token_to_kv_pool, TwoTierKVPool):
            raise RuntimeError(
                f"RheoServe's KV pool is not in place (found {type(self.token_to_kv_pool).__name__}); "
                "another plugin may have replaced it: see SGLANG_PLUGINS"
            )
        self.coordinator = self.token_to_kv_pool.coordinator
        self.config = self.token_to_kv_pool.config
        slots, device = len(self.req_to_token_pool.req_to_token), torch.device(self.token_to_kv_pool.device)
        self.coordinator.attended = Attended(slots, device)
        self.coordinator.working_sets = WorkingSets(slots, device)
        observe(self.coordinator)
        rule = decode_rule(self.config)
        self.selects = rule.needs_scores
        self.rules = [
            replace(rule, select=Select.ALL) if index < self.config.dense_layers else rule
            for index in range(self.token_to_kv_pool.layer_num)
        ]
        self.limits = SelectionLimits(slots, self.config, device)
        self.token_to_kv_pool.limits = self.limits
        self.budgets: torch.Tensor | None = None
        self.threads = self.token_to_kv_pool.threads
        self.taps = self._tap(model_runner.model) if self.selects else None
        self.batch: Batch | None = None
        self.writes: Writes | None = None
        self.prefixes: list[int] = []  # of a prefill's requests, tokens that were stored before
        # Of a prefill: pages of its requests `[n]`, which of them others have that were prefilled before, `[n]` bool,
        # and where in its tokens each one's last is, `[batch]`.
        self.prefilled: torch.Tensor | None = None
        self.shared: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self.staging, self.behind = self._lanes()
        first, *_ = attention_layers(model_runner.model).values()
        group = first.tp_q_head_num // self.token_to_kv_pool.head_num
        self.coordinator.latency = calibrate(self.token_to_kv_pool, model_runner.model, group)
        self.gpu = self._on_gpu(model_runner, group) if device.type == "cuda" else None
        self.first = self._first_scores()
        logger.info("RheoServe: CPU attention by %s on %d threads", cpu_variant(), self.threads)

    def init_forward_metadata(self, forward_batch):
        """Build the page table, and let the coordinator move blocks before a decode step."""
        on_gpu = forward_batch.forward_mode.is_decode() and self.gpu is not None
        if self.taps:
            self.taps.user = self.gpu.tap if on_gpu else None
        if forward_batch.forward_mode.is_idle():
            self.coordinator.settle()
            return
        if on_gpu:
            return self._begin_on_gpu(forward_batch, forward_batch.batch_size)
        self.batch = self._batch(forward_batch, forward_batch.batch_size)
        if forward_batch.forward_mode.is_decode():
            self.writes = Writes.of_decode(self.batch, rotate_last=self.config.gate_rope == "last")
            self.budgets = self.limits.pages[self.batch.requests]
            self.coordinator.begin_decode(lambda: self.batch)
            self.coordinator.stores(forward_batch.batch_size)
        else:
            lengths = forward_batch.extend_seq_lens_cpu
            # Not by SGLang's prefixes: where steps overlap, that of a decode in a mixed batch may count the new token.
            # (Its rotation goes by SGLang's own, as with every backend.)
            self.prefixes = prefixes = [
                n - new for n, new in zip(forward_batch.seq_lens_cpu.tolist(), lengths, strict=True)
            ]
            self._begin_extend(prefixes, lengths)
            if self.first is not None:
                slots, lens = forward_batch.req_pool_indices, forward_batch.seq_lens
                self.first.begin(self.req_to_token_pool.req_to_token, slots, lens, forward_batch.batch_size)
            if self.staging is not None:
                lists = zip(self.batch.pages, prefixes, lengths, strict=True)
                self.staging.begin([(pages[: pages_of(before)], before) for pages, before, new in lists if new])

    def _begin_extend(self, prefixes: list[int], lengths: list[int]):
        """Where the new tokens of a prefill go, and frames for them."""
        pages, device = self.batch.pages, self.batch.pages.device
        self.writes = Writes.of_extend(self.batch, prefixes, lengths)
        # One new token is a decode step in a mixed batch.
        ends = [pages_of(before + new) if new > 1 else 0 for before, new in zip(prefixes, lengths, strict=True)]
        row, at = to_device(places(torch.tensor(ends).clamp(max=pages.shape[1])), device)
        self.prefilled = pages[row, at]
        if self.config.mode == "balanced":
            decodes = to_device(torch.tensor([new == 1 for new in lengths]), device)
            self.shared = self.coordinator.idle.holds(self.prefilled, pages * decodes[:, None])
        self.last = to_device(torch.tensor([max(end - 1, 0) for end in accumulate(lengths)]), device)
        self.coordinator.begin_extend(pages, self.writes.fresh)
        self.coordinator.stores(sum(lengths))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        """Nothing: what graphs are captured over exists for as many requests as can run."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False):
        """Before a graph is captured, over no request at all, or replayed."""
        if in_capture:
            if self.taps:
                self.taps.user = self.gpu.tap
            nothing = torch.zeros(1, dtype=torch.int64, device=self.token_to_kv_pool.device)
            table = self.req_to_token_pool.req_to_token
            return self.gpu.begin(table, nothing, nothing, 0, forward_batch.batch_size, self.limits.pages)
        self._begin_on_gpu(forward_batch, forward_batch.batch_size - forward_batch.num_padding)
        self.gpu.expect()

    def _begin_on_gpu(self, forward_batch, rows: int):
        lens = forward_batch.seq_lens_cpu
        self.coordinator.begin_decode(lambda: self._batch(forward_batch, rows), None if lens is None else lens[:rows])
        self.coordinator.stores(rows)
        self.gpu.begin(
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            rows,
            forward_batch.batch_size,
            self.limits.pages,
        )
        self.coordinator.swap(self.gpu.step.tables.rows(rows))

    def _batch(self, forward_batch, rows: int) -> Batch:
        lens = forward_batch.seq_lens_cpu
        return Batch.build(
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices[:rows],
            forward_batch.seq_lens[:rows],
            int((forward_batch.seq_lens if lens is None else lens)[:rows].max()),
            self.config.sink_pages,
            self.config.window_pages,
        )

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        pool, batch = self.token_to_kv_pool, self.batch
        index = layer.layer_id - pool.start_layer
        self._refuse_extras(layer, k, kwargs)
        if self.gpu is not None:
            if self.taps:
                self.taps.used(layer.layer_id)
            k, v = (t.view(len(t), pool.head_num, pool.head_dim).to(pool.dtype) for t in (k, v))
            return self.gpu.layer(index, q, k, v, forward_batch.out_cache_loc, layer.scaling)
        if save_kv_cache:
            self._store(layer, forward_batch, k, v)
        heads = q.float().reshape(-1, pool.head_num, layer.tp_q_head_num // pool.head_num, layer.head_dim)
        began, scores = perf_counter(), None
        if self.selects:
            tapped = self.taps and self.taps.of_layer(layer.layer_id)
            pool.gate.refresh(pool, index, self.writes, k, tapped)
            scores = pool.gate.score(pool, index, heads, layer.scaling, batch, tapped)
        frame_of = pool.residency.frame_of[index]
        rule = self.rules[index]
        steps = plan(rule, scores, batch.pages, batch.n_pages, batch.tail_len, frame_of, self.threads, self.budgets)
        if self.selects:
            self.coordinator.record(index, batch, scores, steps.chosen if rule.needs_scores else None)
        self.coordinator.attended.add(steps, batch.requests)
        chosen = perf_counter()
        out = attend_tiers(
            heads, pool.frames.layers[index], pool.host.blocks(index), steps, layer.scaling, self.threads
        )
        if out.device.type == "cpu":
            seconds = self.coordinator.seconds
            seconds["selection_seconds"] += chosen - began
            seconds["host_attention_seconds"] += perf_counter() - chosen
        return out.view(len(out), -1).to(q.dtype)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        pool, batch = self.token_to_kv_pool, self.batch
        index = layer.layer_id - pool.start_layer
        self._refuse_extras(layer, k, kwargs)
        if save_kv_cache and self.behind is not None:
            self.behind.write(pool, index, forward_batch.out_cache_loc, self.writes, k, v)
        elif save_kv_cache:
            self._store(layer, forward_batch, k, v)
        q = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        parts, start = [], 0
        lengths = forward_batch.extend_seq_lens_cpu
        for row, (before, new) in enumerate(zip(self.prefixes, lengths, strict=True)):
            tokens = slice(start, start + new)
            if new:
                own = [tensor[tokens] for tensor in (q, k, v)]
                if self.staging is None:
                    parts.append(self._prefill(index, *own, batch.pages[row], before, layer.scaling))
                else:
                    prefix = self.staging.take().to(q.dtype) if before else None
                    parts.append(prefill_flash(*own, prefix, layer.scaling))
            start += new
        if start < len(q):  # padding
            parts.append(torch.zeros_like(q[start:]))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        # After the last layer anything may be read; before that, the oracle reads stored keys.
        if self.behind is not None and (index == pool.layer_num - 1 or not pool.gate.kind):
            self.behind.join()
        if save_kv_cache and self.selects:
            self._summarise(index, q, k, layer)
        return out.reshape(len(out), -1)

    def _store(self, layer, forward_batch, k, v):
        """Write K and V through."""
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)

    def _refuse_extras(self, layer, k, extras: dict):
        """Refuse what a model may ask of a backend and this one does not do."""
        asked = [name for name, value in extras.items() if value is not None]
        if asked or k is None:
            what = f"attention arguments {asked}" if asked else "a layer that shares another layer's KV"
            raise NotImplementedError(f"layer {layer.layer_id}: RheoServe does not serve {what}")

    def _prefill(self, index: int, q, k, v, pages: torch.Tensor, before: int, scale: float) -> torch.Tensor:
        """Attention of one request's new tokens, of which `before` came earlier."""
        prefix = None
        if before:
            pool = self.token_to_kv_pool
            prefix = pool.host.gather(index, pages[: pages_of(before)].cpu())[:, :, :before].to(pool.device)
        return prefill_attention(q, k, v, prefix, scale)

    def _summarise(self, index: int, q: torch.Tensor, k: torch.Tensor, layer):
        """Gate keys of the pages that were written, and a first importance from each last query.

        Once a layer, so nothing here may wait for a GPU: it would stand still until the next layer is launched.
        """
        pool, batch = self.token_to_kv_pool, self.batch
        tapped = self.taps and self.taps.of_layer(layer.layer_id)
        pool.gate.refresh(pool, index, self.writes, k, tapped)
        if self.config.mode == "balanced":
            self.coordinator.forget(index, self.prefilled, self.shared)
            heads = q[self.last].view(len(self.last), pool.head_num, -1, layer.head_dim)
            tapped = tapped and tapped.take(self.last)
            if self.first is not None:
                return self.first.layer(index, heads, layer.scaling, self.coordinator.weight, tapped)
            scores = pool.gate.score(pool, index, heads.float(), layer.scaling, batch, tapped)
            self.coordinator.record(index, batch, scores)

    def _lanes(self):
        """What moves beside a prefill on a GPU, where its attention kernels take the model's dtype; else two None."""
        pool = self.token_to_kv_pool
        if torch.device(pool.device).type != "cuda" or pool.dtype not in (torch.float16, torch.bfloat16):
            return None, None
        from rheoserve_sgl.runtime.staging import Staging
        from rheoserve_sgl.runtime.write_behind import WriteBehind

        context = self.req_to_token_pool.req_to_token.shape[1]
        return Staging(pool, pages_of(context) * pool.page_size), WriteBehind()

    def _on_gpu(self, model_runner, group: int):
        """The kernels of a decode step, or None where a gate has none (the oracle)."""
        pool = self.token_to_kv_pool
        if self.selects and not pool.gate.kind:
            return None
        from rheoserve_sgl.runtime.gpu_decode import GpuDecode

        first, *others = attention_layers(model_runner.model).values()
        for layer in others:
            if layer.scaling != first.scaling:
                raise ValueError(f"layer {layer.layer_id} scales logits by {layer.scaling}, layer 0 by {first.scaling}")
        slots, context = self.req_to_token_pool.req_to_token.shape
        return GpuDecode(
            pool,
            self.rules,
            batch=slots,
            max_pages=pages_of(context),
            group=group,
            scale=first.scaling,
            cpus=pinned(own_processors(), self.threads),
        )

    def _first_scores(self):
        """The kernels that give a prompt's blocks their first importance, where there are some and it is asked for."""
        if self.gpu is None or not self.gpu.step.selects or self.config.mode != "balanced":
            return None  # (a step that selects in no layer has no room for scores)
        from rheoserve_sgl.ops.gpu.first import FirstScores

        return FirstScores(self.gpu.step)

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
