"""Result: what a simulation or a measurement found. Same shape for both, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Times of MoE layers under one plan.

    dispatch_s_SL, combine_s_SL   the two all-to-alls of each step and layer
    compute_s_SLG                 expert computation of each device; a layer waits for the slowest
    tokens_SLG                    token-expert pairs each device computed
    traffic_B_LGG                 bytes between devices, dispatch and combine, mean step
    engine                        "lockstep", "event" or "measured"
    notes                         everything the reader must know to judge the figures (extrapolation, unverified inputs)
    """

    name: str
    engine: str
    model: str
    cluster: str
    layers: tuple[int, ...]
    dispatch_s_SL: NDArray[np.float64]
    compute_s_SLG: NDArray[np.float64]
    combine_s_SL: NDArray[np.float64]
    tokens_SLG: NDArray[np.float64]
    traffic_B_LGG: NDArray[np.float64]
    fanout_devices_L: NDArray[np.float64]
    fanout_nodes_L: NDArray[np.float64]
    tokens_per_step: float
    bottlenecks: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def layer_s_SL(self) -> NDArray[np.float64]:
        """Time of each step's MoE layer: dispatch, slowest device, combine."""
        return np.asarray(self.dispatch_s_SL + self.compute_s_SLG.max(axis=2) + self.combine_s_SL)

    @cached_property
    def load_ratio_L(self) -> NDArray[np.float64]:
        """Busiest device over the mean device by token-expert pairs of all steps, per layer."""
        load = self.tokens_SLG.sum(axis=0)
        return np.asarray(load.max(axis=1) / load.mean(axis=1))

    def summary(self) -> dict[str, Any]:
        """The figures people compare, JSON-ready. Times are means over steps and layers."""
        return {
            "name": self.name,
            "engine": self.engine,
            "max_load_ratio": float(self.load_ratio_L.mean()),
            "worst_layer_load_ratio": float(self.load_ratio_L.max()),
            "fanout_devices": float(self.fanout_devices_L.mean()),
            "fanout_nodes": float(self.fanout_nodes_L.mean()),
            "a2a_bytes": float(self.traffic_B_LGG.sum(axis=(1, 2)).mean()),
            "layer_time_s": float(self.layer_s_SL.mean()),
            "dispatch_s": float(self.dispatch_s_SL.mean()),
            "compute_s": float(self.compute_s_SLG.max(axis=2).mean()),
            "combine_s": float(self.combine_s_SL.mean()),
            "step_time_s": float(self.layer_s_SL.sum(axis=1).mean()),
            "tokens_per_s": float(self.tokens_per_step / self.layer_s_SL.sum(axis=1).mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole result, JSON-ready: the summary, per-layer and per-device means over steps, notes and inputs."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "cluster": self.cluster,
            "steps": len(self.layer_s_SL),
            "tokens_per_step": self.tokens_per_step,
            "summary": self.summary(),
            "layers": list(self.layers),
            "layer_s": self.layer_s_SL.mean(axis=0).tolist(),
            "dispatch_s": self.dispatch_s_SL.mean(axis=0).tolist(),
            "combine_s": self.combine_s_SL.mean(axis=0).tolist(),
            "device_compute_s": self.compute_s_SLG.mean(axis=0).tolist(),
            "device_tokens": self.tokens_SLG.mean(axis=0).tolist(),
            "traffic_B": self.traffic_B_LGG.sum(axis=0).tolist(),
            "load_ratio": self.load_ratio_L.tolist(),
            "fanout_devices": self.fanout_devices_L.tolist(),
            "fanout_nodes": self.fanout_nodes_L.tolist(),
            "bottlenecks": dict(self.bottlenecks),
            "notes": list(self.notes),
            "inputs": dict(self.inputs),
        }
