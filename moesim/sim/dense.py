"""Time of what surrounds the experts: attention, gate, shared experts, projections, collectives of weights, optimizer.

Rooflines at typical efficiency, not calibrated; results say so. What is exact in the engine is their order and overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.collectives import Port
from moesim.cost.experts import ComputePeak
from moesim.model import Attention, ModelSpec

Mode = Literal["prefill", "decode", "training"]
MODES = ("prefill", "decode", "training")
# Share of peak that large dense products reach on current accelerators (assumed), and of memory bandwidth (AIConfigurator
# 0.12.0 observed factor); launch of one fused block of kernels (assumed).
FLOPS_EFFICIENCY, MEMORY_EFFICIENCY, LAUNCH_S = 0.6, 0.8, 15e-6
NOTE = "not calibrated: attention, gate, shared experts and optimizer are rooflines at 60 % of peak FLOP/s and 80 % of memory bandwidth"
# Bytes of optimizer traffic for one parameter of mixed-precision Adam: fp32 master, two moments read and written, gradient read, weight written.
_ADAM_B = 4.0 * 6 + 2 + 2


def roofline_s(flops: float, moved_B: float, peak: ComputePeak) -> float:
    """Seconds of one fused block: launch + max(flops/(peak·efficiency), bytes/(bandwidth·efficiency)); 0 for no work."""
    if flops <= 0 and moved_B <= 0:
        return 0.0
    return LAUNCH_S + max(flops / (peak.flops * FLOPS_EFFICIENCY), moved_B / (peak.memory_Bps * MEMORY_EFFICIENCY))


def attention_parameters(model: ModelSpec) -> float:
    """Weights of one attention block: query, key, value and output projections (MLA through its ranks)."""
    a, hidden = model.attention, model.hidden
    if a is None:
        return 4.0 * hidden**2
    value = a.value_dim or a.head_dim
    if a.kv_rank:
        query = a.q_rank * (hidden + a.heads * (a.head_dim + a.rope_dim)) if a.q_rank else hidden * a.heads * (a.head_dim + a.rope_dim)
        return float(query + hidden * (a.kv_rank + a.rope_dim) + a.kv_rank * a.heads * (a.head_dim + value) + a.heads * value * hidden)
    return float(hidden * a.head_dim * (a.heads + 2 * a.kv_heads) + a.heads * value * hidden)


def attention_s(model: ModelSpec, tokens: float, context: float, mode: Mode, peak: ComputePeak) -> float:
    """Seconds of one attention block for `tokens` tokens.

    Each attends to `context` tokens in decode and to half of its sequence of `context` tokens otherwise.
    """
    a = model.attention or Attention(heads=max(1, model.hidden // 128), kv_heads=max(1, model.hidden // 128), head_dim=min(128, model.hidden))
    parameters = attention_parameters(model)
    seen = context if mode == "decode" else context / 2
    flops = 2 * tokens * parameters + 2 * tokens * seen * a.heads * (a.head_dim + a.rope_dim + (a.value_dim or a.head_dim))
    cached = a.kv_rank + a.rope_dim if a.kv_rank else 2 * a.kv_heads * a.head_dim
    cache_B = tokens * cached * (context if mode == "decode" else 1) * model.activation_bits / 8
    return roofline_s(flops, parameters * model.weight_bits / 8 + cache_B + 2 * tokens * model.hidden * model.activation_bits / 8, peak)


def mlp_s(tokens: float, hidden: int, width: int, gated: bool, weight_B: float, peak: ComputePeak) -> float:
    """Seconds of one dense MLP, 0 without width."""
    parameters = (3 if gated else 2) * hidden * width
    return roofline_s(2 * tokens * parameters, parameters * weight_B, peak)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTimes:
    """Seconds per device of one step. attention_LG holds the dense layers before each MoE layer, too."""

    attention_LG: NDArray[np.float64]
    gate_G: NDArray[np.float64]
    shared_G: NDArray[np.float64]
    parameters_L: NDArray[np.float64]  # dense weights replicated on every device, of each MoE layer and the dense ones before it


def dense_times(cost: CostModel, *, tokens: float, context: float, mode: Mode) -> DenseTimes:
    """Times of all dense parts for `tokens` tokens on each device."""
    model, devices = cost.model, cost.cluster.devices
    weight_B = model.weight_bits / 8
    kinds = {d.name: cost.peaks[d.name] for d in devices}
    attention = {name: attention_s(model, tokens, context, mode, peak) for name, peak in kinds.items()}
    dense = {name: mlp_s(tokens, model.hidden, model.dense_intermediate, model.gated, weight_B, peak) for name, peak in kinds.items()}
    gate = {
        name: roofline_s(2 * tokens * model.hidden * model.experts, model.hidden * model.experts * weight_B, peak) for name, peak in kinds.items()
    }
    shared = {name: mlp_s(tokens, model.hidden, model.shared_intermediate, model.gated, weight_B, peak) for name, peak in kinds.items()}
    before_L = np.diff(np.asarray(model.moe_layers), prepend=-1)  # blocks up to and including this MoE layer
    per_block = attention_parameters(model)
    factor = 3 if model.gated else 2
    return DenseTimes(
        attention_LG=np.asarray([[n * attention[d.name] + (n - 1) * dense[d.name] for d in devices] for n in before_L.tolist()]),
        gate_G=np.asarray([gate[d.name] for d in devices]),
        shared_G=np.asarray([shared[d.name] for d in devices]),
        parameters_L=before_L * per_block
        + (before_L - 1) * factor * model.hidden * model.dense_intermediate
        + model.hidden * (model.experts + factor * model.shared_intermediate),
    )


def optimizer_s(parameters: float, peak: ComputePeak) -> float:
    """Seconds of a mixed-precision Adam step over the parameters of one device."""
    return roofline_s(12 * parameters, _ADAM_B * parameters, peak)


def gather_s(cost: CostModel, size_B: float) -> float:
    """Seconds until every device holds `size_B` bytes that were spread over all of them (all-gather).

    Each NIC fetches a share of 1/D of what other nodes hold, then the D devices of a node exchange their shares; both
    tiers work at the same time, the busier one sets the time. A reduce-scatter is the same backwards, an all-reduce both.
    """
    nodes = cost.cluster.nodes
    local = cost.cluster.size / nodes

    def through(port: Port, moved_B: float, peers: float) -> float:
        return float(port.time_s(moved_B, messages_N=peers, largest_N=moved_B / max(peers, 1.0), ranks=peers + 1))

    link = through(cost.ports.link, size_B * (local - 1) / local, local - 1) if local > 1 else 0.0
    nic = through(cost.ports.nic, size_B / local * (nodes - 1) / nodes, nodes - 1) if nodes > 1 and cost.ports.nic else 0.0
    return max(link, nic)
