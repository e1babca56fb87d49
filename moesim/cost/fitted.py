"""From profiles to cost functions: picks the fitted parameters of a device, and says where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.cost.collectives import CollectiveCurve, LinearPort, Port, Ports, collective, pick_curve
from moesim.cost.experts import ComputePeak, ExpertKernel, Style
from moesim.errors import ProfileError
from moesim.hardware import Cluster, Device, Link, Memory, load_device, load_links

# Arithmetic a weight format runs at: weights of fewer bits are widened first, unless the device has the format.
_ARITHMETIC = {
    "fp32": ("fp32", "bf16"),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16"),
    "fp8_block": ("fp8", "bf16", "fp16"),
    "int8": ("int8", "bf16", "fp16"),
    "int4": ("bf16", "fp16", "int8"),
    "fp4": ("fp4", "bf16", "fp16"),
}
_TYPICAL_CACHE_B, _TYPICAL_UNITS = 32e6, 100
_REFERENCE = "h200"  # whose collectives stand in, scaled, for devices that were not measured
_DEEPEP_NIC = "ib-ndr"


def main_memory(device: Device) -> Memory:
    """The memory that holds weights: HBM or GDDR where the device has it, else its largest DDR."""
    fast = [memory for memory in device.memories if memory.name in ("hbm", "gddr")]
    return fast[-1] if fast else max(device.memories, key=lambda memory: memory.capacity_B if memory.name in ("ddr", "lpddr") else 0.0)


def device_peak(device: Device, dtype: str) -> tuple[ComputePeak, list[str]]:
    """Peaks of a device for weights of `dtype`, and remarks on what the profile does not say.

    Raises ProfileError when the device has no arithmetic for the dtype.
    """
    if dtype not in _ARITHMETIC:
        raise ProfileError(f"dtype {dtype!r} is unknown; use one of {', '.join(_ARITHMETIC)}")
    usable = [name for name in _ARITHMETIC[dtype] if name in device.flops]
    if not usable:
        raise ProfileError(
            f"device {device.name!r} lists no peak for {dtype} (only {', '.join(device.flops)}); add compute.flops.{dtype} to its profile"
        )
    notes = [f"{device.name}: no {dtype} arithmetic listed, computed in {usable[0]}"] if usable[0] != _ARITHMETIC[dtype][0] else []
    for name, value in (("compute.cache", device.cache_B), ("compute.units", device.units)):
        if value is None:
            notes.append(f"{device.name}: {name} is not in the profile; a typical value was taken")
    main = main_memory(device)
    peak = ComputePeak(
        flops=device.flops[usable[0]],
        memory_Bps=main.bandwidth_Bps,
        cache_B=device.cache_B or _TYPICAL_CACHE_B,
        units=device.units or _TYPICAL_UNITS,
    )
    return peak, notes


def device_kernel(device: Device, dtype: str, name: str | None = None) -> tuple[ExpertKernel, list[str]]:
    """The fitted expert kernel of a device for `dtype` (the first, or the one called `name`), with remarks.

    Without a fitted kernel the typical one is returned, and a remark says that it is not calibrated.
    """
    fits = [fit for fit in device.kernels if fit.attributes["dtype"] == dtype and name in (None, fit.name)]
    if fits:
        return ExpertKernel.from_profile(fits[0]), []
    if name is not None:
        known = ", ".join(f"{fit.name}[{fit.attributes['dtype']}]" for fit in device.kernels) or "none"
        raise ProfileError(f"device {device.name!r} has no kernel {name!r} for {dtype}; it has: {known}")
    style: Style = "loop" if device.kind == "cpu" else "fused"
    kernel = ExpertKernel(name="typical", style=style, dtype=dtype)
    return kernel, [f"not calibrated: {device.name} has no fitted {dtype} expert kernel; times come from a typical {style} kernel"]


def scaled_curve(curve: CollectiveCurve, *, of: Device, device: Device, wire: Link) -> tuple[CollectiveCurve, list[str]]:
    """The curve measured on `of` as it would be on `device` over `wire`, and a remark if that is another.

    Start-up terms grow with the latency of the link, the port with its bandwidth, and what copy kernels move (short
    messages, copy_bandwidth) with the units that run them. Facts are those of the two profiles; nothing is fitted.
    """
    home = load_links().get(of.link)
    if home is None:
        return curve, []
    latency, port = wire.latency_s / home.latency_s, wire.bandwidth_Bps / home.bandwidth_Bps
    units = (device.units or _TYPICAL_UNITS) / (of.units or _TYPICAL_UNITS)
    if latency == port == units == 1:
        return curve, []
    factors = {
        **dict.fromkeys(("short_latency_s", "short_message_s", "long_floor_s", "long_latency_s", "long_message_s"), latency),
        **dict.fromkeys(("short_bandwidth_Bps", "copy_bandwidth_Bps"), units),
        "port_bandwidth_Bps": port,
    }
    scaled = replace(curve.port, **{name: getattr(curve.port, name) * factor for name, factor in factors.items()})
    remark = (
        f"not calibrated: {curve.name} {curve.op} over {wire.name} is that of {of.name} over {home.name} with start-up x {latency:.3g}, "
        f"port x {port:.3g}, copy kernels x {units:.3g}"
    )
    return replace(curve, port=scaled), [remark]


def deepep_ports(device: Device, name: str, *, wire: Link | None = None, network: Link | None = None) -> tuple[Ports, list[str]]:
    """Ports of a DeepEP mode ("deepep-normal", "deepep-low-latency") as a profile has them, scaled to other links.

    Bandwidths are proportional to those of the links (None: as measured), latencies are kept: they are mostly kernels'.
    Raises ProfileError when the profile has no such fit.
    """
    fit = next((fit for fit in device.collectives if fit.name == name), None)
    ports = collective(fit) if fit else None
    if fit is None or not isinstance(ports, Ports) or not isinstance(ports.link, LinearPort) or ports.nic is None:
        has = ", ".join(f"{fit.name} {fit.attributes['op']}" for fit in device.collectives) or "none"
        raise ProfileError(f"device {device.name!r} has no ports of {name}; it has: {has}")
    notes, link, nic = [], ports.link, ports.nic
    home, home_nic = load_links()[fit.attributes["link"] or device.link], load_links()[_DEEPEP_NIC]
    if wire is not None and wire.bandwidth_Bps != home.bandwidth_Bps:
        link = replace(link, bandwidth_Bps=link.bandwidth_Bps * wire.bandwidth_Bps / home.bandwidth_Bps)
        notes.append(f"{name} over {wire.name}: fitted over {home.name}, bandwidth x {wire.bandwidth_Bps / home.bandwidth_Bps:.3g}")
    if network is not None and network.bandwidth_Bps != home_nic.bandwidth_Bps:
        nic = replace(nic, bandwidth_Bps=nic.bandwidth_Bps * network.bandwidth_Bps / home_nic.bandwidth_Bps)
        notes.append(f"{name} over {network.name}: fitted over {home_nic.name}, bandwidth x {network.bandwidth_Bps / home_nic.bandwidth_Bps:.3g}")
    elif network is not None:
        notes.append(f"{name} over {network.name}: fitted on H800 with the same NIC")
    if name == "deepep-low-latency" and wire is not None:
        notes.append(f"{name}: fitted to kernels that use RDMA inside nodes, too; later ones use the link there and start sooner")
    return Ports(link=link, nic=nic), notes


def intra_curve(cluster: Cluster, op: str) -> tuple[CollectiveCurve | None, list[str]]:
    """NCCL's curve of `op` inside the nodes of a cluster, for its slowest port: the device's own, else a scaled one.

    None over anything but NVLink, where nothing was measured.
    """
    g = _slowest(cluster.intra_G)
    device, wire = cluster.devices[g], cluster.intra_G[g]
    if not wire.name.startswith("nvlink"):
        return None, []
    ranks = int(np.unique(cluster.node_G, return_counts=True)[1].max())
    for of in (device, load_device(_REFERENCE)):
        curves = [curve for fit in of.collectives if isinstance(curve := collective(fit), CollectiveCurve) and curve.op == op]
        if curves:
            return scaled_curve(pick_curve(curves, op=op, ranks=max(2, ranks)), of=of, device=device, wire=wire)
    raise ProfileError(f"{_REFERENCE} has no curve of {op}; calibrate one")


def device_ports(cluster: Cluster, library: str) -> tuple[Ports, list[str]]:
    """Ports of a cluster's devices under a library's all-to-all ("nccl", "deepep-normal", "deepep-low-latency").

    Fitted curves where a profile has them, scaled to the cluster's links, else latency and bandwidth of the links. All
    devices get the slowest port and the slowest NIC, an over-subscribed network gives every NIC its share.
    """
    notes: list[str] = []
    g = _slowest(cluster.intra_G)
    wire, nics = cluster.intra_G[g], cluster.nic_G
    network = nics[_slowest(nics)] if nics else None
    for kind, links in (("inside nodes", cluster.intra_G), ("between nodes", nics)):
        if len({link.name for link in links}) > 1:
            notes.append(f"all-to-all {kind} is computed with the slowest port, {links[_slowest(links)].name}")
    link: Port = LinearPort(latency_s=wire.latency_s, bandwidth_Bps=wire.bandwidth_Bps)
    nic = LinearPort(latency_s=network.latency_s, bandwidth_Bps=network.bandwidth_Bps) if network else None
    curve, curve_notes = intra_curve(cluster, "all_to_all")
    known_link = known_nic = False
    if library == "nccl" and curve is not None:
        link, known_link = curve.port, True
        notes += curve_notes
    elif library != "nccl" and curve is not None:
        rdma = network is not None and network.name.startswith(("ib-", "roce-"))
        own = [d for d in cluster.devices if any(fit.name == library for fit in d.collectives)]
        ports, port_notes = deepep_ports(own[0] if own else load_device(_REFERENCE), library, wire=wire, network=network if rdma else None)
        link, known_link = ports.link, True
        notes += port_notes
        if rdma:
            nic, known_nic = ports.nic, True
    if not known_link and cluster.size > cluster.nodes:
        notes.append(f"not calibrated: all-to-all over {wire.name} is latency + bytes/bandwidth of its profile")
    if network is not None and not known_nic:
        notes.append(f"not calibrated: all-to-all over {network.name} is latency + bytes/bandwidth of its profile")
    if nic is not None and cluster.oversubscription > 1:
        nic = replace(nic, bandwidth_Bps=nic.bandwidth_Bps / cluster.oversubscription)
        notes.append(f"over-subscription {cluster.oversubscription:g}: every NIC gets 1/{cluster.oversubscription:g} of its bandwidth")
    return Ports(link=link, nic=nic), notes


def _slowest(links: Sequence[Link]) -> int:
    return min(range(len(links)), key=lambda g: links[g].bandwidth_Bps)
