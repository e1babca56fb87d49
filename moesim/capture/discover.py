"""Finds the routers of a model, the trace column each one fills, and the ModelSpec the trace is stored under."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesim.capture.routers import Adapter, adapter_for, router_like
from moesim.errors import CaptureError, SpecError
from moesim.model import ModelSpec

if TYPE_CHECKING:
    from torch import nn

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LATE = (
    "{kind} was compiled and called before capture started, so hooks placed now would never fire: "
    "start capture before the first call, or call torch._dynamo.reset() first"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """One router: `name` without wrappers, `layer` the trace column, `owner` path of the module that runs the layers."""

    name: str
    module: nn.Module
    adapter: Adapter
    layer: int
    owner: str


def find_routers(model: nn.Module) -> list[Router]:
    """All routers of `model` in layer order.

    The column is the layer's index; a second stack (the decoder of an encoder-decoder) counts on after the first,
    and R routers in one layer (JetMoE routes attention too) take columns layer·R … layer·R + R-1.
    Raises CaptureError naming router-like modules and the call that adapts one when there is none.
    """
    found = [(path, module, adapter, *_place(path)) for path, module, adapter in _known(model)]
    if not found:
        raise CaptureError(_unknown(model))
    times = Counter((container, index) for *_, container, index in found)
    per_layer, next_column = max(times.values()), 0
    first_column: dict[str, int] = {}
    seen: defaultdict[tuple[str, int], int] = defaultdict(int)
    routers = []
    for path, module, adapter, container, index in sorted(found, key=lambda item: "attention" not in item[0]):  # attention runs first
        if container not in first_column:
            first_column[container] = next_column
            next_column += _length(model, container, index) * per_layer
        column = first_column[container] + index * per_layer + seen[container, index]
        seen[container, index] += 1
        owner = container.rpartition(".")[0]
        routers.append(Router(name=plain_name(path), module=module, adapter=adapter, layer=column, owner=owner))
    return sorted(routers, key=lambda router: router.layer)


def has_routers(model: nn.Module) -> bool:
    """Whether any router that is known lives in `model`."""
    return next(_known(model), None) is not None


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        adapter = adapter_for(module, modules.get(path.rpartition(".")[0]))
        if adapter and path:
            yield path, module, adapter


def _place(path: str) -> tuple[str, int]:
    """Path of the list of layers and the index in it: 'model.layers.3.mlp.gate' is ('model.layers', 3)."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part)
    return "", 0


def _length(model: nn.Module, container: str, index: int) -> int:
    layers = model.get_submodule(container)
    numbers = [int(name) for name, _ in layers.named_children() if name.isdigit()]
    return max((*numbers, index)) + 1


def plain_name(path: str) -> str:
    """Module path without the names DDP, FSDP, torch.compile and checkpoint wrappers put in."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _unknown(model: nn.Module) -> str:
    kinds = Counter(type(module).__name__ for module in model.modules() if router_like(module))
    names = ", ".join(f"{kind} ({n}×)" for kind, n in kinds.most_common(8)) or "none"
    return (
        f"no router of {type(model).__name__} is known; modules that look like one: {names}. Say how its choice is read: "
        "moesim.capture.register_router('ClassName', lambda module, inputs, output: (ids_TK, weights_TK))"
    )


def model_config(model: nn.Module) -> Any:
    """The Hugging Face config of `model` or of what it wraps; None when there is none."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict") and hasattr(config, "model_type"):
            return config
    return None


def trace_spec(model: nn.Module, routers: list[Router], given: ModelSpec | None) -> tuple[ModelSpec, int]:
    """The spec whose MoE layers are the routers' columns, and how many of its experts compute nothing.

    Experts without computation have ids from the real experts on; `ModelSpec.experts` counts them in.
    Raises CaptureError when there is neither a config nor a spec, or a MoE layer has no router that is known.
    """
    columns = tuple(router.layer for router in routers)
    config = model_config(model)
    zero = int(getattr(config, "zero_expert_num", None) or 0)
    if given is None:
        if config is None:
            raise CaptureError(f"{type(model).__name__} has no Hugging Face config to read the model's shape from; pass model_spec=ModelSpec(...)")
        try:
            found = ModelSpec.from_hf(config)
        except SpecError as problem:
            raise CaptureError(f"{problem}; pass model_spec=ModelSpec(...)") from None
        spec = replace(found, experts=found.experts + zero)
    else:
        spec = given
    one_stack = len({router.owner for router in routers}) == 1 and columns[-1] < spec.layers
    if one_stack and (absent := sorted(set(spec.moe_layers) - set(columns))):
        raise CaptureError(
            f"{spec.name!r} has MoE layers {absent} by its description, but no router that is known there; routers found: "
            f"{', '.join(router.name for router in routers)}. Register the others with moesim.capture.register_router, or pass model_spec="
        )
    if given is not None and columns != given.moe_layers:
        raise CaptureError(f"model_spec {given.name!r} names MoE layers {list(given.moe_layers)}, the model has routers at {list(columns)}")
    return replace(spec, moe_layers=columns, layers=max(spec.layers, columns[-1] + 1)), zero


def refuse_late(model: nn.Module, routers: list[Router]) -> None:
    """Raise CaptureError when torch.compile already holds code of a module on the way to a router: hooks would be missed."""
    if "torch._dynamo" not in sys.modules:
        return
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    inside = {id(router.module) for router in routers}
    kinds = {type(module) for module in model.modules() if any(id(child) in inside for child in module.modules())}
    for kind in kinds:
        forward: Any = kind.forward
        while forward is not None:
            code = getattr(forward, "__code__", None)
            if code is not None and _debug_get_cache_entry_list(code):
                raise CaptureError(LATE.format(kind=kind.__name__))
            forward = getattr(forward, "__wrapped__", None)
