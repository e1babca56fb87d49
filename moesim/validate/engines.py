"""What the simulator's engines say about a measured batch: its ranks' computation, and the network nobody measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.experts import ComputePeak
from moesim.errors import PlanError
from moesim.hardware import Cluster
from moesim.hardware.profile import Device, Memory, load_links
from moesim.model import ModelSpec
from moesim.plan import Plan
from moesim.sim import simulate
from moesim.sim.event import simulate_event
from moesim.trace import Trace
from moesim.validate.calibrate import Calibration


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Predicted:
    """One plan by both engines, one step: computation of every rank, and the modelled exchanges (None: no cluster was named)."""

    lockstep_s_LG: NDArray[np.float64]
    event_s_LG: NDArray[np.float64]
    network_s_L: NDArray[np.float64] | None


def predict_plans(trace: Trace, plans: Sequence[Plan], found: Calibration, *, shape: ModelSpec, cluster: Cluster | None = None) -> list[Predicted]:
    """Both engines on the trace's selected tokens as one step, with the calibrated kernel on every device.

    `shape` is the trace's model, or one of the same layers and experts whose expert sizes are executed.
    `cluster` is where the exchanges are modelled; its devices are taken to be the calibrated one. PlanError when its size is
    not the plan's. Engines take weights to come from memory in every layer, as they do after a flush.
    """
    predicted = []
    for plan in plans:
        devices = plan.placement.devices
        if cluster is not None and cluster.size != devices:
            raise PlanError(f"plan {plan.name!r} has {devices} devices, cluster {cluster.name!r} {cluster.size}; choose a cluster of that size")
        where = cluster or stand_in(found.peak, devices, kind="cpu" if found.device == "cpu" else "gpu", dtype=found.dtype)
        measured = {device.name: (found.peak, found.fit.kernel) for device in where.devices}
        cost = CostModel.of(where, shape, measured=measured)
        size = max(1, trace.tokens // devices)
        lockstep = simulate(trace, plan, where, tokens_per_device=size, cost=cost)
        event = simulate_event(trace, plan, where, tokens_per_device=size, cost=cost)
        exchange = lockstep.dispatch_s_SL.mean(axis=0) + lockstep.combine_s_SL.mean(axis=0)
        predicted.append(
            Predicted(
                lockstep_s_LG=lockstep.compute_s_SLG.mean(axis=0),
                event_s_LG=event.compute_s_SLG.mean(axis=0),
                network_s_L=exchange if cluster else None,
            )
        )
    return predicted


def stand_in(peak: ComputePeak, devices: int, *, kind: Literal["cpu", "gpu"], dtype: str) -> Cluster:
    """A node of `devices` devices known by their peaks, for computation only: its link is a placeholder whose times are not used."""
    memory = Memory(name="ddr" if kind == "cpu" else "hbm", capacity_B=1e15, bandwidth_Bps=peak.memory_Bps, channels=1)
    device = Device(
        name="calibrated",
        title="the calibrated device",
        kind=kind,
        flops={"bf16" if dtype == "fp8" else dtype: peak.flops},
        units=peak.units,
        cache_B=peak.cache_B,
        memories=(memory,),
        power_W=None,
        rent_per_hour=None,
        kernels=(),
        collectives=(),
        facts=(),
    )
    link = load_links()["shared-memory"]
    node_G = np.zeros(devices, np.int32)
    return Cluster(
        name="calibrated-node", title="calibrated devices", devices=(device,) * devices, node_G=node_G, intra_G=(link,) * devices, network=None
    )
