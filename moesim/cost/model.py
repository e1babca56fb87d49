"""CostModel: how long the MoE layer of one model takes on one cluster, from tokens per expert and bytes between devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.attention import Mode, attention_time
from moesim.cost.collectives import Algorithm, AllToAllTime, Ports, all_to_all_time
from moesim.cost.experts import ComputePeak, ExpertKernel, expert_time_s
from moesim.cost.fitted import device_kernel, device_peak, device_ports
from moesim.cost.memory import MemoryUse, memory_use
from moesim.cost.traffic import Traffic
from moesim.cost.transport import TRANSPORTS, Transport, pick_transport
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement


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

    dispatch_B and combine_B are bytes of one token copy each way; `transport` names how copies travel (`cost.transport`).
    """

    model: ModelSpec
    cluster: Cluster
    peaks: dict[str, ComputePeak]
    kernels: dict[str, ExpertKernel]
    ports: Ports
    transport: str
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
        transport: str | None = None,
        measured: Mapping[str, tuple[ComputePeak, ExpertKernel]] | None = None,
    ) -> CostModel:
        """Cost model from the cluster's profiles, for weights of `dtype` (default: what the checkpoint serves in).

        The transport defaults to deepep-normal where several equal nodes are joined by a network, else nccl. Fitted kernels
        are used where a profile has them; else a roofline at typical efficiency, and a note says so. `measured`
        replaces peaks and kernel of devices by name with what a calibration of this machine found.
        """
        wanted = dtype or {8: "fp8", 32: "fp32"}.get(int(model.weight_bits), "bf16")
        chosen = pick_transport(transport, cluster)
        peaks, kernels, notes = {}, {}, []
        for device in {d.name: d for d in cluster.devices}.values():
            if measured and device.name in measured:
                peaks[device.name], kernels[device.name] = measured[device.name]
                notes.append(f"{device.name}: expert kernel {kernels[device.name].name} as calibrated on this machine")
                continue
            peaks[device.name], peak_notes = device_peak(device, wanted)
            kernels[device.name], kernel_notes = device_kernel(device, wanted)
            notes += [*peak_notes, *kernel_notes]
        ports, port_notes = device_ports(cluster, chosen.library)
        weak = [f"unverified input: {fact}" for fact in cluster.weak_facts if not measured or fact.split(":")[0] not in measured]
        element_B = model.activation_bits / 8
        return cls(
            model=model,
            cluster=cluster,
            peaks=peaks,
            kernels=kernels,
            ports=ports,
            transport=chosen.name,
            dispatch_B=model.hidden * element_B,
            combine_B=model.hidden * element_B,
            notes=tuple(dict.fromkeys([*notes, *port_notes, *weak])),
        )

    @property
    def way(self) -> Transport:
        """What the transport's name stands for."""
        return TRANSPORTS[self.transport]

    @property
    def algorithm(self) -> Algorithm:
        """Which ports carry a copy under this transport."""
        return self.way.algorithm

    def copies_SLGG(self, traffic: Traffic) -> NDArray[np.float64]:
        """Copies from device to device that this transport sends: one per token and device, or one per chosen expert.

        Raises InputError where selections are needed and were not counted.
        """
        if not self.way.per_selection:
            return traffic.copies_SLGG
        if traffic.selections_SLGG is None:
            raise InputError(f"transport {self.transport!r} sends one copy per chosen expert; count them with route(…, selections=True)")
        return traffic.selections_SLGG

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
            algorithm=self.algorithm,
            node_traffic_NGM=node_copies_SLGN * element_B if self.algorithm == "forwarded" else None,
        )

    def layer_times(self, traffic: Traffic, placement: Placement) -> LayerTimes:
        """Dispatch, expert computation of each device, and combine, for every step and layer of a traffic."""
        compute, outside = self.expert_times(traffic.slot_tokens_SLP, traffic.copies_SLGG.sum(axis=2), placement.slots_G)
        copies = self.copies_SLGG(traffic)
        dispatch = self.exchange(copies, traffic.node_copies_SLGN, self.dispatch_B)
        same = self.dispatch_B == self.combine_B  # the way back loads the same ports
        return LayerTimes(
            dispatch=dispatch,
            combine=dispatch if same else self.exchange(copies, traffic.node_copies_SLGN, self.combine_B),
            compute_s_SLG=compute,
            extrapolated_SLG=outside,
        )

    def attention_s_G(self, tokens: float, context: float, mode: Mode) -> NDArray[np.float64]:
        """Seconds of one attention block on each device for its `tokens` tokens; see `cost.attention`."""
        found = {
            name: float(attention_time(self.model, tokens=tokens, context=context, mode=mode, peak=peak).time_s_N)
            for name, peak in self.peaks.items()
        }
        return np.asarray([found[device.name] for device in self.cluster.devices])

    def memory(self, placement: Placement, *, tokens_per_device: int, context: int = 0) -> MemoryUse:
        """What a placement needs on each device, and by how much it does not fit; see `cost.memory`."""
        return memory_use(self.model, placement, self.cluster, tokens_per_device=tokens_per_device, context=context)

    def weights(self, *, tokens_per_device: int) -> Weights:
        """Slopes of the layer time around an evenly loaded cluster with uniform traffic, by finite differences."""
        cluster, model = self.cluster, self.model
        devices, nodes = cluster.size, cluster.nodes
        total = tokens_per_device * devices
        fan = float(min(devices, devices * (1 - (1 - 1 / devices) ** model.top_k)))
        sent = float(model.top_k) if self.way.per_selection else None
        node_fan = float(min(nodes, nodes * (1 - (1 - 1 / nodes) ** model.top_k)))

        def compute_s(ratio: float) -> float:
            slots = max(1, model.experts // devices)
            tokens = np.full((1, 1, slots * devices), total * model.top_k / (slots * devices)) * ratio
            arriving = np.full((1, 1, devices), tokens_per_device * fan * ratio)
            return float(self.expert_times(tokens, arriving, np.full(devices, slots))[0].max())

        def exchange_s(fan: float, node_fan: float) -> float:
            copies = np.full((1, 1, devices, devices), tokens_per_device * (sent or fan) / devices)
            node_copies = np.full((1, 1, devices, nodes), tokens_per_device * node_fan / nodes)
            return sum(float(self.exchange(copies, node_copies, size).time_s_N.max()) for size in (self.dispatch_B, self.combine_B))

        step, slack = 0.1, 0.9
        base = exchange_s(fan, node_fan)
        return Weights(
            load_s=(compute_s(1 + step) - compute_s(1.0)) / step,
            devices_s=(base - exchange_s(fan * slack, node_fan)) / (fan * (1 - slack)) if devices > 1 else 0.0,
            nodes_s=(base - exchange_s(fan, node_fan * slack)) / (node_fan * (1 - slack)) if nodes > 1 else 0.0,
        )
