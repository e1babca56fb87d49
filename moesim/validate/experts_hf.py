"""A real Hugging Face model run under a placement: an experts implementation that computes rank by rank.

`under_plan` registers it with transformers (`ALL_EXPERTS_FUNCTIONS`, 5.x), and puts back what was there. Every rank's
slots hold copies of its own experts; attention, router and all else are the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moesim.errors import PlanError, ValidationError
from moesim.plan import Placement
from moesim.validate.backends import Backend
from moesim.validate.layer import slots_layer
from moesim.validate.ranks import check_equal, in_order, shares
from moesim.validate.weights import ROUNDING, ExpertWeights

NAME = "moesim-plan"


@dataclass(kw_only=True, eq=False)
class Served:
    """What ran under a plan: selections each rank computed, per MoE layer, and how far outputs were from the unplaced experts'."""

    placement: Placement
    backend: Backend
    selections_LG: NDArray[np.int64]
    check: bool = False
    calls: int = 0
    deviation: float = 0.0
    layers: dict[int, tuple[int, Placement, list[ExpertWeights]]] = field(default_factory=dict)  # by id of the experts module

    def forward(self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' forward of transformers: hidden [T, H], choices and gates [T, K]."""
        row, placement, resident = self.layers[id(module)]
        ids = top_k_index.detach().cpu().numpy().astype(np.uint16)[:, None]
        gates = top_k_weights.detach().float().cpu().numpy()[:, None]
        node_G = np.zeros(placement.devices, np.int64)
        parts = shares(placement, ids, gates, node_G=node_G, device=str(hidden_states.device))
        self.selections_LG[row] += [len(share.slots_N) for share in parts]
        self.calls += 1
        out = in_order(parts, resident, hidden_states, top_k_weights, backend=self.backend)
        if self.check:
            whole = slots_layer(hidden_states, top_k_index, top_k_weights, _whole(module), backend=self.backend)
            self.deviation = max(self.deviation, check_equal(out, whole, tolerance=ROUNDING[out.dtype]))
        return out


@contextmanager
def under_plan(model: nn.Module, placement: Placement, *, backend: Backend = "loop", check: bool = False) -> Iterator[Served]:
    """Run a model's experts rank by rank while this is open, for inference; `check` compares every call with the unplaced experts.

    Raises PlanError when the placement is for other layers or experts, ValidationError for experts that are not two stacked,
    untransposed, bias-free matrices with SwiGLU, and when a plan is already served.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME in ALL_EXPERTS_FUNCTIONS:
        raise ValidationError("a model is already served under a plan; leave that context first")
    zeros_LG = np.zeros((len(placement.layers), placement.devices), np.int64)
    served = Served(placement=placement, backend=backend, selections_LG=zeros_LG, check=check)
    configs: list[Any] = []
    for layer, module in find_experts(model).items():
        if layer not in placement.layers:
            raise PlanError(f"the model has experts in layer {layer}, the placement is for {list(placement.layers)}; make a plan of this model")
        row = placement.layers.index(layer)
        alone = replace(placement, slots_LP=placement.slots_LP[row : row + 1], layers=(layer,))
        served.layers[id(module)] = (row, alone, _residents(module, alone, layer))
        configs.append(module.config)
    if len(served.layers) != len(placement.layers):
        raise PlanError(f"the placement is for {len(placement.layers)} MoE layers, the model has experts in {len(served.layers)}")
    before = [config._experts_implementation for config in configs]
    ALL_EXPERTS_FUNCTIONS[NAME] = served.forward
    try:
        for config in configs:
            config._experts_implementation = NAME
        yield served
    finally:
        for config, name in zip(configs, before, strict=True):
            config._experts_implementation = name
        del ALL_EXPERTS_FUNCTIONS[NAME]


def find_experts(model: nn.Module) -> dict[int, Any]:
    """Modules that hold a layer's experts as stacked matrices, by the layer's index in their path. ValidationError without any."""
    found: dict[int, Any] = {}
    for path, module in model.named_modules():
        up = getattr(module, "gate_up_proj", None)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
        if isinstance(up, Tensor) and up.ndim == 3 and number and hasattr(getattr(module, "config", None), "_experts_implementation"):
            found[int(number[1])] = module
    if not found:
        raise ValidationError(f"{type(model).__name__} has no experts that others may execute: needs transformers >= 5 and gate_up_proj")
    return found


def _residents(module: Any, placement: Placement, layer: int) -> list[ExpertWeights]:
    odd = [name for name in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(module, name, False)]
    odd += [f"not {name}" for name in ("has_gate", "is_concatenated") if not getattr(module, name, True)]
    if odd or type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        raise ValidationError(f"layer {layer}: experts of {type(module).__name__} ({', '.join(odd) or module.act_fn}) cannot run under a plan")
    if len(module.gate_up_proj) != placement.experts:
        raise PlanError(f"layer {layer}: {len(module.gate_up_proj)} experts, the placement has {placement.experts}; make a plan of this model")
    whole = _whole(module)
    ends = np.cumsum(placement.slots_G)
    return [whole.take(placement.slots_LP[0, end - count : end].tolist()) for end, count in zip(ends, placement.slots_G, strict=True)]


def _whole(module: Any) -> ExpertWeights:
    return ExpertWeights(up=module.gate_up_proj.detach(), down=module.down_proj.detach(), gated=True)


def execute_in_model(model: Any, placement: Placement, input_ids: Tensor, *, new_tokens: int = 16, backend: Backend = "loop") -> dict[str, Any]:
    """Generate greedily with the model as it is and under the plan; token ids must be the same, and every layer's output to rounding.

    Returns, JSON-ready: tokens generated, the largest deviation of a layer's output and of a logit of the prompt, selections per
    layer and rank. ValidationError when a token or an output differs.
    """
    arguments = {"max_new_tokens": new_tokens, "do_sample": False}
    with torch.inference_mode():
        plain, logits = model.generate(input_ids, **arguments), model(input_ids).logits
        with under_plan(model, placement, backend=backend, check=True) as served:
            placed, placed_logits = model.generate(input_ids, **arguments), model(input_ids).logits
    if plain.shape != placed.shape or not bool((plain == placed).all()):
        where = "its length" if plain.shape != placed.shape else f"place {torch.nonzero(plain != placed)[0].tolist()}"
        raise ValidationError(f"the model under the plan generated other tokens, first at {where}; the placement corrupts outputs")
    return {
        "tokens": int(placed.numel() - input_ids.numel()),
        "identical": True,
        "deviation": served.deviation,
        "largest_logit_deviation": float((logits - placed_logits).abs().max()),
        "expert_calls": served.calls,
        "selections": served.selections_LG.tolist(),
    }
