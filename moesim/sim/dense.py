"""Time of what surrounds the experts in the event engine: the dense parts of each block, collectives of weights, optimizer.

Rooflines of `cost.attention`, not calibrated; results say so. What is exact in the engine is their order and overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.attention import MODES, NOTE, Mode, attention_time, dense_parameters, product_s, roofline_s
from moesim.cost.collectives import Port
from moesim.cost.experts import ComputePeak

# Bytes of optimizer traffic for one parameter of mixed-precision Adam: fp32 master, two moments read and written, gradient read, weight written.
_ADAM_B = 4.0 * 6 + 2 + 2


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
    weights = dense_parameters(model)
    one_pass: Mode = "decode" if mode == "decode" else "prefill"  # the engine runs a training step's backward pass itself

    def seconds(parameters: float) -> dict[str, float]:
        return {
            name: float(product_s(tokens, parameters, weight_B=model.weight_bits / 8, mode=one_pass, peak=peak)) if parameters else 0.0
            for name, peak in cost.peaks.items()
        }

    attention = {
        name: float(attention_time(model, tokens=tokens, context=context, mode=one_pass, peak=peak).time_s_N) for name, peak in cost.peaks.items()
    }
    dense, gate, shared = (seconds(size) for size in (weights.dense_mlp, weights.gate, weights.shared_experts))
    before_L = np.diff(np.asarray(model.moe_layers), prepend=-1)  # blocks up to and including this MoE layer
    return DenseTimes(
        attention_LG=np.asarray([[n * attention[d.name] + (n - 1) * dense[d.name] for d in devices] for n in before_L.tolist()]),
        gate_G=np.asarray([gate[d.name] for d in devices]),
        shared_G=np.asarray([shared[d.name] for d in devices]),
        parameters_L=before_L * weights.attention + (before_L - 1) * weights.dense_mlp + weights.gate + weights.shared_experts,
    )


def optimizer_s(parameters: float, peak: ComputePeak) -> float:
    """Seconds of a mixed-precision Adam step over the parameters of one device."""
    return float(roofline_s(12 * parameters, _ADAM_B * parameters, peak))


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


__all__ = ["MODES", "NOTE", "DenseTimes", "Mode", "dense_times", "gather_s", "optimizer_s"]
