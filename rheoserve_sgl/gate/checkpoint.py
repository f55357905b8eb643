"""Gate weights on disk, in the format of the published SeerAttention-R gates.

A folder with `config.json` (keys `seerattn_*`) and `attn_gate_weights.pth` (a flat state dict, read with
weights_only=True) or `attn_gate_weights.safetensors`. Tensors are named
`model.layers.N.self_attn.attn_gate.attngate_{linear_q,linear_k,qnorm,knorm}.weight`.
"""

import json
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rheoserve_sgl import PAGE_TOKENS
from rheoserve_sgl.gate.attn_gate import K_PARTS, Q_POOLINGS, GateWeights

NAME = "model.layers.{layer}.self_attn.attn_gate.attngate_{part}.weight"
TENSORS = {"linear_q": "q", "linear_k": "k", "qnorm": "q_norm", "knorm": "k_norm"}
FILES = ("attn_gate_weights.safetensors", "attn_gate_weights.pth")
K_POOLINGS = {"K" + "".join(some): some for n in (1, 2, 3) for some in combinations(K_PARTS, n)}


@dataclass(frozen=True)
class ModelShape:
    """What of a model a gate depends on; heads over all ranks."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class GateConfig:
    """The `seerattn_*` keys of a gate's config.json that decoding depends on, with their published defaults."""

    gate_block_size: int = 64
    gate_hidden_size: int = 128
    q_head_pooling_type: str = "Qproj"
    k_seq_pooling_type: str = "Kmaxminavg"
    use_qk_norm: bool = False
    use_rope: bool = True
    start_layer: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        return K_POOLINGS[self.k_seq_pooling_type]

    def shapes(self, model: ModelShape) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors, by field of GateWeights."""
        dim, width = model.head_dim, self.gate_hidden_size
        shapes = {"k": (model.kv_heads, len(self.parts) * dim, width)}
        if self.q_head_pooling_type == "Qproj":
            shapes["q"] = (model.kv_heads, model.group, dim, width)
        elif self.q_head_pooling_type == "Qavgproj":
            shapes["q"] = (model.kv_heads, dim, width)
        if self.use_qk_norm:
            shapes["q_norm"] = shapes["k_norm"] = (width,)
        return shapes

    def as_json(self) -> dict:
        return {"seerattn_" + name: value for name, value in vars(self).items()}


def read_config(path: Path, model: ModelShape) -> GateConfig:
    """The gate's configuration.

    Raises:
        ValueError: no such file, or a key that cannot be served with this model, named with its legal values
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"--rheoserve-gate-path is {str(path)!r}, which has no config.json")
    try:
        stored = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{file} holds {type(stored).__name__}; legal: an object")
    fields = {name: "seerattn_" + name for name in GateConfig.__dataclass_fields__}
    given = {name: stored[key] for name, key in fields.items() if key in stored}
    for name, value in given.items():
        kind = type(getattr(GateConfig, name))
        if type(value) is not kind:
            raise ValueError(f"{file}: seerattn_{name} is {value!r}; legal: a value of type {kind.__name__}")
    config = GateConfig(**given)
    width = config.gate_hidden_size
    averaged = config.q_head_pooling_type == "Qavg"
    for name, legal, what in (
        ("gate_block_size", config.gate_block_size == PAGE_TOKENS, str(PAGE_TOKENS)),
        ("q_head_pooling_type", config.q_head_pooling_type in Q_POOLINGS, ", ".join(Q_POOLINGS)),
        ("k_seq_pooling_type", config.k_seq_pooling_type in K_POOLINGS, ", ".join(K_POOLINGS)),
        ("gate_hidden_size", 16 <= width <= 256 and width % 16 == 0, "multiples of 16 up to 256"),
        (
            "gate_hidden_size",
            width == model.head_dim or not (config.use_rope or averaged),
            f"{model.head_dim}, the model's head dim, with RoPE or Qavg",
        ),
        ("start_layer", 0 <= config.start_layer <= model.layers, f"0 to {model.layers}"),
    ):
        if not legal:
            raise ValueError(f"{file}: seerattn_{name} is {getattr(config, name)!r}; legal: {what}")
    return config


def read_gate(path: Path, model: ModelShape) -> tuple[GateConfig, list[dict[str, torch.Tensor]]]:
    """Configuration and float32 tensors of each layer, by field of GateWeights.

    Raises:
        ValueError: what does not fit the model, by the tensor's name, its shape and the expected one
    """
    config = read_config(path, model)
    stored = _read_tensors(Path(path))
    layers = []
    for layer in range(model.layers):
        shapes, tensors = config.shapes(model), {}
        for part, field in TENSORS.items():
            name = NAME.format(layer=layer, part=part)
            shape = shapes.get(field)
            found = stored.pop(name, None)
            if (None if found is None else tuple(found.shape)) != shape:
                has, needs = ("no tensor" if s is None else list(s) for s in (getattr(found, "shape", None), shape))
                raise ValueError(f"{path}: {name}: {has}; {needs} fits the model and config.json")
            if found is not None:
                tensors[field] = found.float()
        layers.append(tensors)
    if stored:
        others = sorted({int(n) for n in re.findall(r"layers\.(\d+)\.", " ".join(stored))})
        what = f"layers up to {others[-1]}" if others else f"{next(iter(stored))}, unknown here"
        raise ValueError(f"{path}: it has {what}; the model has {model.layers} layers")
    return config, layers


def take_heads(tensors: dict[str, torch.Tensor], heads: slice, parts, rope, device) -> GateWeights:
    """One layer's gate for some KV heads (a tensor-parallel rank's), on a device.

    Float32, but for a GPU's matrices that bfloat16 holds as they are, as those of published gates: a step reads all.
    """
    own = {name: tensor if "norm" in name else tensor[heads] for name, tensor in tensors.items()}
    own = {name: tensor.to(device, torch.float32).contiguous() for name, tensor in own.items()}
    if torch.device(device).type == "cuda":
        for name in own.keys() & {"q", "k"}:
            half = own[name].bfloat16()
            if torch.equal(half.float(), own[name]):
                own[name] = half
    return GateWeights(**{field: own.get(field) for field in TENSORS.values()}, rope=rope, parts=parts)


def write_gate(path: Path, config: GateConfig, layers: list[dict[str, torch.Tensor]], base_model: str):
    """Write a folder in the published format (bf16, as the published gates are)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    names = {field: part for part, field in TENSORS.items()}
    state = {
        NAME.format(layer=layer, part=names[field]): tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for layer, tensors in enumerate(layers)
        for field, tensor in tensors.items()
    }
    torch.save(state, path / "attn_gate_weights.pth")
    (path / "config.json").write_text(json.dumps({"base_model": base_model, **config.as_json()}, indent=2) + "\n")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    for name in FILES:
        file = path / name
        if not file.is_file():
            continue
        try:
            pickled = file.suffix == ".pth"
            stored = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
        except (UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} cannot be read: {error or 'it is empty'}") from error
        if not isinstance(stored, dict) or not all(isinstance(value, torch.Tensor) for value in stored.values()):
            raise ValueError(f"{file} holds something else; legal: tensors by name")
        return dict(stored)
    raise ValueError(f"--rheoserve-gate-path is {str(path)!r}, which has neither of {', '.join(FILES)}")
