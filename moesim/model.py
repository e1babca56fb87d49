"""ModelSpec: what moesim must know of a Mixture-of-Experts model. Shapes only, never weights.

>>> spec = load_model("deepseek-v2-lite")
>>> len(spec.moe_layers), spec.experts, spec.top_k, spec.expert_B
(26, 64, 6, 17301504.0)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from moesim.errors import SpecError
from moesim.files import digest, read_json, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Shape of one attention block. `kv_rank` > 0 means MLA (DeepSeek-V2 paper, arXiv 2405.04434)."""

    heads: int
    kv_heads: int
    head_dim: int
    kv_rank: int = 0
    q_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    @property
    def kind(self) -> str:
        """`mla`, `gqa` or `mha`."""
        return "mla" if self.kv_rank else "gqa" if self.kv_heads < self.heads else "mha"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A MoE decoder. `moe_layers` are absolute layer indices; dense layers are the others.

    `weight_bits` and `activation_bits` are what the checkpoint serves in; the cost model may override them.
    A decoder without experts has no `moe_layers`; only serving takes one (`load_model(…, dense=True)`).
    Raises SpecError when sizes are inconsistent.
    """

    name: str
    layers: int
    moe_layers: tuple[int, ...]
    hidden: int
    intermediate: int  # of one routed expert
    experts: int
    top_k: int
    pyramid: tuple[int, ...] = ()  # experts of each MoE layer where they differ, `experts` at most; their ids are the lowest
    shared_intermediate: int = 0  # all shared experts together; 0 = none
    expert_groups: int = 1  # routing is limited to some groups of experts (DeepSeek-V3); 1 = no limit
    dense_intermediate: int = 0  # MLP of a dense layer
    gated: bool = True  # three matrices per expert (SwiGLU) or two
    vocabulary: int = 0
    attention: Attention | None = None
    weight_bits: float = 16
    activation_bits: float = 16
    source: str = ""

    def __post_init__(self) -> None:
        dense = self.experts == 0 and not self.moe_layers
        for name in ("layers", "hidden", *(("dense_intermediate",) if dense else ("intermediate", "experts", "top_k"))):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"model {self.name!r}: {name}(={value!r}) must be a whole number >= 1")
        if self.experts > 65535:
            raise SpecError(f"model {self.name!r}: experts(={self.experts}) exceeds 65535, the largest id of the trace format")
        if self.top_k > self.experts:
            raise SpecError(f"model {self.name!r}: top_k(={self.top_k}) exceeds experts(={self.experts})")
        if dense:
            return
        if not self.moe_layers or sorted(set(self.moe_layers)) != list(self.moe_layers):
            raise SpecError(f"model {self.name!r}: moe_layers must be a rising, non-empty list, got {list(self.moe_layers)}")
        if self.moe_layers[0] < 0 or self.moe_layers[-1] >= self.layers:
            raise SpecError(f"model {self.name!r}: moe_layers {list(self.moe_layers)} outside 0..{self.layers - 1}")
        if self.pyramid and (len(self.pyramid) != len(self.moe_layers) or min(self.pyramid) < self.top_k or max(self.pyramid) != self.experts):
            raise SpecError(
                f"model {self.name!r}: pyramid {list(self.pyramid)} must give each of {len(self.moe_layers)} MoE layers "
                f"top_k(={self.top_k}) to experts(={self.experts}) experts, and one of them all"
            )

    @property
    def experts_L(self) -> tuple[int, ...]:
        """Experts of each MoE layer."""
        return self.pyramid or (self.experts,) * len(self.moe_layers)

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert: 3·H·F gated, 2·H·F plain."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def expert_B(self) -> float:
        """Bytes of one routed expert as served."""
        return self.expert_parameters * self.weight_bits / 8

    @property
    def digest(self) -> str:
        """Names the shape: equal for equal routing problems, whatever the model is called."""
        shape = [self.layers, self.moe_layers, self.hidden, self.intermediate, self.experts, self.top_k, *([self.pyramid] if self.pyramid else [])]
        return digest(json.dumps(shape))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` is its inverse."""
        data = asdict(self)
        data["moe_layers"] = list(self.moe_layers)
        data["pyramid"] = list(self.pyramid)
        return data if self.pyramid else {name: value for name, value in data.items() if name != "pyramid"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_dict`; unknown or missing keys raise SpecError."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise SpecError(f"model description: unknown keys {unknown}; known: {sorted(known)}")
        values = dict(data)
        try:
            values["moe_layers"] = tuple(values["moe_layers"])
            values["pyramid"] = tuple(values.get("pyramid", ()))
            if values.get("attention") is not None:
                values["attention"] = Attention(**values["attention"])
            return cls(**values)
        except (TypeError, KeyError) as problem:
            raise SpecError(f"model description is incomplete or malformed: {problem}") from None

    @classmethod
    def from_hf(cls, config: Any, *, name: str | None = None, dense: bool = False) -> ModelSpec:
        """Spec of a Hugging Face MoE config: an object with `to_dict()` or the mapping of a `config.json`.

        Raises SpecError naming what is missing when the config is not that of a MoE model, or (`dense`) of any decoder.
        """
        from moesim.hf_config import spec_values

        raw = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return cls.from_dict(spec_values(raw, name=name, dense=dense))


@cache
def _presets() -> dict[str, ModelSpec]:
    data = read_toml(Path(str(files("moesim") / "model_presets.toml")), SpecError)
    specs = {}
    for name, entry in data.items():
        spec = ModelSpec.from_hf(entry["config"], name=name)
        specs[name] = replace(spec, source=entry["source"], weight_bits=entry.get("weight_bits", spec.weight_bits))
    return specs


def model_names() -> list[str]:
    """Names of the presets."""
    return sorted(_presets())


def load_model(name: str | Path, *, dense: bool = False) -> ModelSpec:
    """A preset by name, or the spec of a Hugging Face `config.json` by path (a file or the folder holding it).

    Raises SpecError; for a model without experts unless `dense`.
    """
    text = str(name)
    if text.lower() in _presets():
        return _presets()[text.lower()]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        data = read_json(path, SpecError)
        if not isinstance(data, dict):
            raise SpecError(f"{path}: expected a JSON object, got {type(data).__name__}")
        try:
            return ModelSpec.from_hf(data, name=str(data.get("_name_or_path") or path.parent.name or "model"), dense=dense)
        except SpecError as problem:
            raise SpecError(f"{path}: {problem}") from None
    raise SpecError(f"model {text!r} is not known; presets: {', '.join(model_names())}; or give the path of a config.json")
