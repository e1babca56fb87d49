"""From profiles to cost functions: picks the fitted parameters of a device, and scales those of another where it has none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from moesim.cost.collectives import CollectiveCurve, LinearPort, Port, Ports, collective, pick_curve
from moesim.cost.experts import ComputePeak, ExpertKernel, Style
from moesim.errors import ProfileError
from moesim.hardware import Cluster, Device, Link, Memory, device_names, load_device, load_links

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
_REFERENCE = "h200"  # whose kernels and collectives stand in, scaled, for devices that were not measured
_MULTIPLY = 0.75  # of its peak that a GPU reaches where only multiplying counts
_GENERATION = 1.2  # ratio of FLOP/s per unit from which two GPUs are of different generations
_ACROSS = 0.94  # of its share of the bandwidth that a kernel keeps on another generation, by what is published of A100s
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

    Without fitted kernels the first of a similar device is scaled (`kernels_for`), else the typical one returned; a remark
    says that it is not calibrated. Raises ProfileError for a name that is not there.
    """
    kernels, notes = kernels_for(device, dtype)
    found = [kernel for kernel in kernels if name in (None, kernel.name)]
    if found:
        return found[0], notes
    if name is not None:
        known = ", ".join(kernel.name for kernel in kernels) or "none"
        raise ProfileError(f"device {device.name!r} has no kernel {name!r} for {dtype}; it has: {known}")
    style: Style = "loop" if device.kind == "cpu" else "fused"
    kernel = ExpertKernel(name="typical", style=style, dtype=dtype)
    return kernel, [f"not calibrated: {device.name} has no fitted {dtype} expert kernel; times come from a typical {style} kernel"]


def kernels_for(device: Device, dtype: str) -> tuple[list[ExpertKernel], list[str]]:
    """The expert kernels fitted on a device for `dtype`; on a GPU without, those of a similar GPU, scaled, and a remark.

    Similar is the reference device, or another whose log distance in FLOP/s and memory bandwidth is less than half as far.
    Empty where nothing was fitted for the dtype, for anything but a GPU and for weights that are widened before they multiply.
    """
    own = fitted_kernels(device, dtype)
    if own or device.kind != "gpu" or _ARITHMETIC[dtype][0] not in device.flops:
        return own, []
    peak, _ = device_peak(device, dtype)
    others = [load_device(name) for name in _fitted_gpus(dtype)]
    if not others:
        return [], []
    far = {other.name: _distance(peak, device_peak(other, dtype)[0]) * (2 if other.name != _REFERENCE else 1) for other in others}
    of = min(others, key=lambda other: far[other.name])
    kernels = [scaled_kernel(kernel, device_peak(of, dtype)[0], peak) for kernel in fitted_kernels(of, dtype)]
    remark = (
        f"not calibrated: {device.name} has no fitted {dtype} expert kernel; those of {of.name} are scaled to its datasheet, "
        f"multiplying x {peak.flops / device_peak(of, dtype)[0].flops:.3g}, memory x {peak.memory_Bps / device_peak(of, dtype)[0].memory_Bps:.3g}"
    )
    return kernels, [remark]


def fitted_kernels(device: Device, dtype: str) -> list[ExpertKernel]:
    """Expert kernels of a profile for weights of `dtype`, in the profile's order."""
    return [ExpertKernel.from_profile(fit) for fit in device.kernels if fit.attributes["dtype"] == dtype]


def scaled_kernel(kernel: ExpertKernel, of: ComputePeak, to: ComputePeak) -> ExpertKernel:
    """A kernel fitted to one device as it would be on another: shares of the peaks stay but where other limits show.

    At its largest tiles a kernel needs 1/share = 1/0.75 + loads of the time at peak: multiplying follows the peak, loads into
    the units follow their number, so they weigh less on a device with less peak a unit. The bytes a unit must have in
    flight (`load_stall`) follow the memory bandwidth of a unit. Tuned tiles are of one device. Source: kernels of an H200
    scaled to A100s are within 7 % of vLLM pull requests 40542, 55511 (80 GB) and 19049 (40 GB) from 16 tokens on, bias -3 %.
    """
    rows = max(kernel.tile_rows)
    needed = (rows + kernel.tile_overhead) / (rows * kernel.flops_efficiency)
    loads = max(needed - 1 / _MULTIPLY, 0.0)
    crowd = (to.flops / to.units) / (of.flops / of.units)
    flight = (to.memory_Bps / to.units) / (of.memory_Bps / of.units)
    return replace(
        kernel,
        memory_efficiency=kernel.memory_efficiency * (_ACROSS if max(crowd, 1 / crowd) > _GENERATION else 1.0),
        flops_efficiency=kernel.flops_efficiency * needed / (needed - loads + loads * crowd),
        load_stall=max((1 + kernel.load_stall) * flight - 1, 0.0) if kernel.load_stall else 0.0,
        tuned=kernel.tuned if of == to else (),
    )


def _distance(one: ComputePeak, other: ComputePeak) -> float:
    return abs(math.log(one.flops / other.flops)) + abs(math.log(one.memory_Bps / other.memory_Bps))


@lru_cache(maxsize=16)
def _fitted_gpus(dtype: str) -> tuple[str, ...]:
    """Names of the shipped GPUs with a fitted kernel for a dtype."""
    devices = (load_device(name) for name in device_names())
    return tuple(device.name for device in devices if device.kind == "gpu" and any(fit.attributes["dtype"] == dtype for fit in device.kernels))


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
    A device that was not measured gets those of the reference, and a remark. Raises ProfileError for another name.
    """
    of = device if any(fit.name == name for fit in device.collectives) else load_device(_REFERENCE)
    fit = next((fit for fit in of.collectives if fit.name == name), None)
    ports = collective(fit) if fit else None
    if fit is None or not isinstance(ports, Ports) or not isinstance(ports.link, LinearPort) or ports.nic is None:
        has = ", ".join(f"{fit.name} {fit.attributes['op']}" for fit in of.collectives) or "none"
        raise ProfileError(f"device {of.name!r} has no ports of {name}; it has: {has}")
    notes = [] if of == device else [f"not calibrated: {device.name} was not measured with {name}; ports are those of {of.name}"]
    link, nic = ports.link, ports.nic
    home, home_nic = load_links()[fit.attributes["link"] or of.link], load_links()[_DEEPEP_NIC]
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


def curves_of(device: Device, op: str | None = None) -> tuple[Device, list[CollectiveCurve]]:
    """Curves of collectives (of one op) that a device was measured with, and the device: itself, else the reference."""
    for of in (device, load_device(_REFERENCE)):
        curves = [curve for fit in of.collectives if isinstance(curve := collective(fit), CollectiveCurve) and op in (None, curve.op)]
        if curves:
            return of, curves
    raise ProfileError(f"{device.name} and {_REFERENCE} have no curve{f' of {op}' if op else ''}; calibrate one")


def intra_curve(cluster: Cluster, op: str) -> tuple[CollectiveCurve | None, list[str]]:
    """NCCL's curve of `op` inside the nodes of a cluster, for its slowest port: the device's own, else a scaled one.

    None over anything but NVLink, where nothing was measured.
    """
    g = _slowest(cluster.intra_G)
    device, wire = cluster.devices[g], cluster.intra_G[g]
    if not wire.name.startswith("nvlink"):
        return None, []
    ranks = int(np.unique(cluster.node_G, return_counts=True)[1].max())
    of, curves = curves_of(device, op)
    return scaled_curve(pick_curve(curves, op=op, ranks=max(2, ranks)), of=of, device=device, wire=wire)


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
        ports, port_notes = deepep_ports(own[0] if own else cluster.devices[g], library, wire=wire, network=network if rdma else None)
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
