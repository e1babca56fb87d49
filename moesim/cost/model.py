"""CostModel: how long the MoE layer of one model takes on one cluster, from tokens per expert and bytes between devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost.collectives import AllToAllTime, Ports, all_to_all_time
from moesim.cost.experts import ComputePeak, ExpertKernel, expert_time_s
from moesim.cost.fitted import device_kernel, device_peak, device_ports
from moesim.cost.traffic import Traffic
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement

Transport = Literal["flat", "forwarded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimes:
    """Seconds of each step s and MoE layer l, and what set them."""

    dispatch: AllToAllTime  # [S, L]
    combine: AllToAllTime
    compute_s_SLG: NDArray[np.float64]
    extrapolated_SLG: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What moving a placement is worth: seconds per layer for one unit of busiest-over-mean load, of mean distinct devices
    per token and of mean distinct nodes per token."""

    load_s: float
    devices_s: float
    nodes_s: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Cost of MoE layers. Devices of one name share a kernel; `notes` says what is not calibrated.

    dispatch_B and combine_B are bytes of one token copy each way; transport `flat` sends to every device directly (NCCL),
    `forwarded` sends once per destination node and forwards inside it (DeepEP normal kernels).
    """

    model: ModelSpec
    cluster: Cluster
    peaks: dict[str, ComputePeak]
    kernels: dict[str, ExpertKernel]
    ports: Ports
    transport: Transport
    dispatch_B: float
    combine_B: float
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        cluster: Cluster,
        model: ModelSpec,
        *,
        dtype: str | None = None,
        transport: Transport | None = None,
        measured: Mapping[str, tuple[ComputePeak, ExpertKernel]] | None = None,
    ) -> CostModel:
        """Cost model from the cluster's profiles, for weights of `dtype` (default: what the checkpoint serves in).

        The transport defaults to `forwarded` where several equal nodes are joined by a network, else `flat`. Fitted
        kernels are used where a profile has them; else a roofline at typical efficiency, and a note says so. `measured`
        replaces peaks and kernel of devices by name with what a calibration of this machine found.
        """
        wanted = dtype or {8: "fp8", 32: "fp32"}.get(int(model.weight_bits), "bf16")
        sizes = np.unique(cluster.node_G, return_counts=True)[1]
        regular = len(sizes) > 1 and len(set(sizes.tolist())) == 1
        chosen = transport or ("forwarded" if regular else "flat")
        if chosen == "forwarded" and not regular:
            raise InputError(f"transport 'forwarded' needs several equal nodes; {cluster.name!r} has nodes of {sizes.tolist()} devices: use 'flat'")
        peaks, kernels, notes = {}, {}, []
        for device in {d.name: d for d in cluster.devices}.values():
            if measured and device.name in measured:
                peaks[device.name], kernels[device.name] = measured[device.name]
                notes.append(f"{device.name}: expert kernel {kernels[device.name].name} as calibrated on this machine")
                continue
            peaks[device.name], peak_notes = device_peak(device, wanted)
            kernels[device.name], kernel_notes = device_kernel(device, wanted)
            notes += [*peak_notes, *kernel_notes]
        ports, port_notes = device_ports(cluster)
        weak = [f"unverified input: {fact}" for fact in cluster.weak_facts if not measured or fact.split(":")[0] not in measured]
        element_B = model.activation_bits / 8
        return cls(
            model=model,
            cluster=cluster,
            peaks=peaks,
            kernels=kernels,
            ports=ports,
            transport=chosen,
            dispatch_B=model.hidden * element_B,
            combine_B=model.hidden * element_B,
            notes=tuple(dict.fromkeys([*notes, *port_notes, *weak])),
        )

    def expert_times(
        self, slot_tokens_SLP: NDArray[np.float64], tokens_SLG: NDArray[np.float64], slots_G: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """compute_s_SLG and extrapolated_SLG of tokens per physical slot and distinct tokens per device; devices own
        consecutive slots."""
        steps, layers, _ = slot_tokens_SLP.shape
        times = np.zeros((steps, layers, len(slots_G)))
        outside = np.zeros(times.shape, bool)
        ends = np.cumsum(slots_G)
        groups: dict[tuple[str, int], list[int]] = {}
        for g, device in enumerate(self.cluster.devices):
            groups.setdefault((device.name, int(slots_G[g])), []).append(g)
        for (name, slots), members in groups.items():
            if slots == 0:
                continue
            columns = np.concatenate([np.arange(ends[g] - slots, ends[g]) for g in members])
            tokens = slot_tokens_SLP[:, :, columns].reshape(-1, slots)
            found = expert_time_s(
                tokens,
                hidden=self.model.hidden,
                intermediate=self.model.intermediate,
                gated=self.model.gated,
                top_k=self.model.top_k,
                peak=self.peaks[name],
                kernel=self.kernels[name],
                tokens_N=tokens_SLG[:, :, members].reshape(-1),
            )
            times[:, :, members] = found.time_s_N.reshape(steps, layers, -1)
            outside[:, :, members] = found.extrapolated_N.reshape(steps, layers, -1)
        return times, outside

    def exchange(self, copies_SLGG: NDArray[np.float64], node_copies_SLGN: NDArray[np.float64], element_B: float) -> AllToAllTime:
        """Time of moving `element_B` bytes for every token copy: the dispatch, or backwards the combine."""
        return all_to_all_time(
            copies_SLGG * element_B,
            self.cluster.node_G,
            self.ports,
            algorithm=self.transport,
            node_traffic_NGM=node_copies_SLGN * element_B if self.transport == "forwarded" else None,
        )

    def layer_times(self, traffic: Traffic, placement: Placement) -> LayerTimes:
        """Dispatch, expert computation of each device, and combine, for every step and layer of a traffic."""
        compute, outside = self.expert_times(traffic.slot_tokens_SLP, traffic.copies_SLGG.sum(axis=2), placement.slots_G)
        return LayerTimes(
            dispatch=self.exchange(traffic.copies_SLGG, traffic.node_copies_SLGN, self.dispatch_B),
            combine=self.exchange(traffic.copies_SLGG, traffic.node_copies_SLGN, self.combine_B),
            compute_s_SLG=compute,
            extrapolated_SLG=outside,
        )

    def weights(self, *, tokens_per_device: int) -> Weights:
        """Slopes of the layer time around an evenly loaded cluster with uniform traffic, by finite differences."""
        cluster, model = self.cluster, self.model
        devices, nodes = cluster.size, cluster.nodes
        total = tokens_per_device * devices
        fan = float(min(devices, devices * (1 - (1 - 1 / devices) ** model.top_k)))
        node_fan = float(min(nodes, nodes * (1 - (1 - 1 / nodes) ** model.top_k)))

        def compute_s(ratio: float) -> float:
            slots = max(1, model.experts // devices)
            tokens = np.full((1, 1, slots * devices), total * model.top_k / (slots * devices)) * ratio
            arriving = np.full((1, 1, devices), tokens_per_device * fan * ratio)
            return float(self.expert_times(tokens, arriving, np.full(devices, slots))[0].max())

        def exchange_s(fan: float, node_fan: float) -> float:
            copies = np.full((1, 1, devices, devices), tokens_per_device * fan / devices)
            node_copies = np.full((1, 1, devices, nodes), tokens_per_device * node_fan / nodes)
            return sum(float(self.exchange(copies, node_copies, size).time_s_N.max()) for size in (self.dispatch_B, self.combine_B))

        step, slack = 0.1, 0.9
        base = exchange_s(fan, node_fan)
        return Weights(
            load_s=(compute_s(1 + step) - compute_s(1.0)) / step,
            devices_s=(base - exchange_s(fan * slack, node_fan)) / (fan * (1 - slack)) if devices > 1 else 0.0,
            nodes_s=(base - exchange_s(fan, node_fan * slack)) / (node_fan * (1 - slack)) if nodes > 1 else 0.0,
        )
