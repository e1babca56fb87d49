"""From profiles to cost functions: picks the fitted parameters of a device, and says where there are none."""

from __future__ import annotations

from dataclasses import replace

from moesim.cost.collectives import CollectiveCurve, LinearPort, Port, Ports, collective
from moesim.cost.experts import ComputePeak, ExpertKernel, Style
from moesim.errors import ProfileError
from moesim.hardware import Cluster, Device

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
    main = max(device.memories, key=lambda memory: memory.capacity_B if memory.name in ("hbm", "gddr", "ddr", "lpddr") else 0.0)
    for memory in device.memories:
        if memory.name in ("hbm", "gddr"):
            main = memory
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


def device_ports(cluster: Cluster) -> tuple[Ports, list[str]]:
    """Ports of a cluster's devices: fitted curves where the profile has them, else bandwidth and latency of the links.

    Inside a node: the device's own all-to-all curve over NVLink. Between nodes: the NIC of the DeepEP normal kernels,
    which the profile carries for 400 Gbit/s NICs; an over-subscribed network gives every NIC its share.
    """
    notes: list[str] = []
    slowest = min(range(cluster.size), key=lambda g: cluster.intra_G[g].bandwidth_Bps)
    device, wire = cluster.devices[slowest], cluster.intra_G[slowest]
    if len({link.name for link in cluster.intra_G}) > 1:
        notes.append(f"all-to-all inside nodes is computed with the slowest port, {wire.name}")
    found = {(fit.name, fit.attributes["op"]): collective(fit) for fit in device.collectives}
    curve, deepep = found.get(("nccl", "all_to_all")), found.get(("deepep-normal", "all_to_all"))
    link: Port = LinearPort(latency_s=wire.latency_s, bandwidth_Bps=wire.bandwidth_Bps)
    if isinstance(curve, CollectiveCurve) and wire.name.startswith("nvlink"):
        link = curve.port
    elif cluster.size > cluster.nodes:
        notes.append(f"not calibrated: all-to-all over {wire.name} is latency + bytes/bandwidth of its profile")
    network = cluster.network
    if network is None:
        return Ports(link=link), notes
    nic = LinearPort(latency_s=network.latency_s, bandwidth_Bps=network.bandwidth_Bps)
    if isinstance(deepep, Ports) and deepep.nic is not None and network.name == "ib-ndr":
        nic = deepep.nic
        notes.append(f"all-to-all over {network.name}: DeepEP normal kernels, fitted on H800 with the same NIC")
    else:
        notes.append(f"not calibrated: all-to-all over {network.name} is latency + bytes/bandwidth of its profile")
    if cluster.oversubscription > 1:
        nic = replace(nic, bandwidth_Bps=nic.bandwidth_Bps / cluster.oversubscription)
        notes.append(f"over-subscription {cluster.oversubscription:g}: every NIC gets 1/{cluster.oversubscription:g} of its bandwidth")
    return Ports(link=link, nic=nic), notes
