"""Transformers' forward pass with block-sparse attention by a learned gate: what a server should answer.

Everything of the selection is written here anew, in float64 (gate_reference.py); only the model is transformers'.
"""

import gate_reference
import numpy as np
import torch
import transformers.models.qwen3.modeling_qwen3 as qwen3
from transformers import AutoModelForCausalLM

BLOCK = 64


class GatedModel:
    """A Qwen3 checkpoint whose queries after the prompt attend to selected blocks only.

    Args:
        path: checkpoint
        gates: one layer's float tensors each: q `[kv_heads, group, dim, width]`, k `[kv_heads, 3 * dim, width]`, norms
        budget, sink, window: in blocks
        threshold: instead of the budget, blocks are selected whose score exceeds it
        start: layers before this one attend to all
        rotate_last: whether a block that is completed while decoding has its key rotated at its last token
    """

    def __init__(
        self, path, gates: list[dict], budget: int, sink: int, window: int, start: int = 0, rotate_last: bool = False,
        threshold: float | None = None,
    ):  # fmt: skip
        self.start, self.rotate_last, self.threshold = start, rotate_last, threshold
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model.config._attn_implementation = "eager"
        self.gates = [{name: tensor.double().numpy() for name, tensor in gate.items()} for gate in gates]
        self.theta = self.model.config.rope_parameters["rope_theta"]
        self.budget, self.sink, self.window = budget, sink, window
        self.left_out = 0  # blocks that a query did not attend to, over the last forward
        self._plain = {}
        for layer in self.model.model.layers:
            attention = layer.self_attn
            attention.q_norm.register_forward_hook(self._keep("q", attention.layer_idx))
            attention.k_norm.register_forward_hook(self._keep("k", attention.layer_idx))

    def greedy(self, prompt: list[int], answer: list[int], earlier=()) -> list[int]:
        """The next token after the prompt, and after each token of the answer but the last.

        Args:
            earlier: positions in the prompt whose queries were sparse, too
        """
        self.sparse = [*earlier, *range(len(prompt), len(prompt) + len(answer) - 1)]
        self._prompt = len(prompt)
        self.left_out = 0
        original = qwen3.eager_attention_forward
        qwen3.eager_attention_forward = self._attend
        try:
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0]
        finally:
            qwen3.eager_attention_forward = original
        return logits[len(prompt) - 1 :].argmax(-1).tolist()

    def _keep(self, name: str, layer: int):
        def hook(module, inputs, output):
            self._plain[name, layer] = output[0].double().numpy()  # [tokens, heads, dim]

        return hook

    def _attend(self, module, query, key, value, attention_mask, scaling, **_):
        tokens, kv_heads = key.shape[2], key.shape[1]
        group = query.shape[1] // kv_heads
        mask = torch.ones(kv_heads, tokens, tokens, dtype=torch.bool).tril()
        for head in range(kv_heads):
            self._select(module.layer_idx, head, group, mask[head])
        logits = query[0].view(kv_heads, group, tokens, -1) @ key[0, :, None].transpose(-1, -2) * scaling
        weights = torch.softmax(logits.masked_fill(~mask[:, None], -torch.inf), -1)
        out = (weights @ value[0, :, None]).reshape(-1, tokens, value.shape[-1])
        return out.transpose(0, 1)[None], None

    def _select(self, layer: int, head: int, group: int, mask: torch.Tensor):
        """Clear what sparse queries leave out: mask `[tokens, tokens]` of one KV head."""
        if layer < self.start:
            return
        gate = self.gates[layer]
        q, k = self._plain["q", layer], self._plain["k", layer][:, head]
        keys = [
            gate_reference.key(
                k[at : at + BLOCK],
                ("max", "min", "avg"),
                gate["k"][head],
                gate["k_norm"],
                at + BLOCK - 1 if self.rotate_last and at + BLOCK > self._prompt else at,
                self.theta,
            )
            for at in range(0, len(k) - BLOCK + 1, BLOCK)
        ]
        for position in self.sparse:
            blocks = position // BLOCK + 1
            own = keys[: (position + 1) // BLOCK]
            own = own + [np.zeros_like(keys[0])] * (blocks - len(own))  # the newest one, not complete yet
            heads = q[position, head * group : (head + 1) * group]
            gate_q = gate_reference.query(heads, gate["q"][head], gate["q_norm"], position, self.theta)
            scores = gate_reference.probabilities(gate_q, own)
            forced = {*range(min(self.sink, blocks)), *range(max(blocks - 1 - self.window, 0), blocks)}
            rest = sorted((n for n in range(blocks) if n not in forced), key=lambda n: -scores[n])
            if self.threshold is None:
                rest = rest[: max(self.budget - len(forced), 0)]
            else:
                rest = [n for n in rest if scores[n] > self.threshold]
            chosen = forced | set(rest)
            for n in set(range(blocks)) - chosen:
                mask[position, n * BLOCK : (n + 1) * BLOCK] = False
                self.left_out += 1
