"""Queries and keys before RoPE, which SGLang's attention backends never see.

Each attention module's `rotary_emb` is replaced by a proxy that keeps what it is given, or hands it on, then delegates.
Models share one RotaryEmbedding between layers, so the proxies, not the shared module, know their layer.
"""

from collections.abc import Callable

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from rheoserve_sgl.gate.base import Tapped


class RopeTaps:
    """What the layer in flight gave to its RoPE; one layer's at a time.

    user: called with a layer's id and Tapped, which are as they are only until it returns, and the layer's attention
        asks `used`; None: they are kept for `of_layer`, on a GPU as copies, since RoPE rotates in place there
    """

    user: Callable[[int, Tapped], None] | None = None

    def __init__(self, model: nn.Module):
        self.rotary: nn.Module | None = None
        self._layer, self._used = -1, -1
        self._tapped: Tapped | None = None
        for module in list(model.modules()):
            attention, rotary = getattr(module, "attn", None), getattr(module, "rotary_emb", None)
            if not isinstance(attention, RadixAttention):
                continue
            if rotary is None:
                raise ValueError(
                    f"--rheoserve-gate-path: {type(module).__name__} has no rotary_emb whose queries and keys a "
                    "learned gate could see; use --rheoserve-selector quest"
                )
            self.rotary = rotary
            module.rotary_emb = _Tap(rotary, self, attention.layer_id)

    def keep(self, layer: int, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor):
        if positions.ndim != 1:
            raise NotImplementedError("a learned gate needs one position a token; use --rheoserve-selector quest")
        if self.user is not None:
            self.user(layer, Tapped(q, k, positions))
            self._used = layer
            return
        if q.is_cuda:
            q, k = q.clone(), k.clone()
        self._layer, self._tapped = layer, Tapped(q, k, positions)

    def of_layer(self, layer: int) -> Tapped:
        """What this layer gave to its RoPE, once: it is kept no longer. RuntimeError if the user has it, or nobody."""
        self._require(self._layer == layer and self._tapped is not None, layer)
        tapped, self._tapped = self._tapped, None
        return tapped

    def used(self, layer: int):
        """RuntimeError unless the user had what this layer gave to its RoPE; once, as `of_layer`."""
        self._require(self._used == layer, layer)
        self._used = -1

    @staticmethod
    def _require(seen: bool, layer: int):
        if not seen:
            raise RuntimeError(
                f"layer {layer} rotated its queries and keys elsewhere than in its rotary_emb, which a learned gate "
                "needs to see; use --rheoserve-selector quest"
            )


class _Tap(nn.Module):
    """Stands in for a RotaryEmbedding; everything but `forward` is the original's."""

    def __init__(self, inner: nn.Module, taps: RopeTaps, layer: int):
        super().__init__()
        # Past nn.Module's registry: the original stays the model's own, by its own name.
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "taps", taps)
        object.__setattr__(self, "layer", layer)

    def __getattr__(self, name: str):
        return getattr(object.__getattribute__(self, "inner"), name)

    def forward(self, positions, query, key, *args, **kwargs):
        self.taps.keep(self.layer, positions, query, key)
        return self.inner(positions, query, key, *args, **kwargs)


def rope_table(rotary: nn.Module) -> torch.Tensor:
    """Cosines and sines by position, `[positions, rotary_dim]` float32, of an SGLang RotaryEmbedding.

    On a CPU SGLang rounds its own table to the model's dtype; this one is computed anew.
    """
    own = rotary.cos_sin_cache
    if own.dtype == torch.float32:
        return own
    with torch.device(own.device):
        table = rotary._compute_cos_sin_cache().float()
    return torch.cat((table, own[len(table) :].float()))
