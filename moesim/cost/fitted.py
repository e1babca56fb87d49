"""From profiles to cost functions: picks the fitted parameters of a device, and says where there are none."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cost.collectives import CollectiveCurve, LinearPort, Port, Ports, collective
from moesim.cost.experts import ComputePeak, ExpertKernel
from moesim.errors import ProfileError
from moesim.hardware import Cluster, Device, Fitted

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
        raise ProfileError(f"device {device.name!r} lists no peak for {dtype} (only {', '.join(device.flops)}); add compute.flops.{dtype} to its profile")
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
    style = "loop" if device.kind == "cpu" else "fused"
    kernel = ExpertKernel(name="typical", style=style, dtype=dtype)
    return kernel, [f"not calibrated: {device.name} has no fitted {dtype} expert kernel; times come from a typical {style} kernel"]


def device_ports(cluster: Cluster) -> tuple[Ports, list[str]]:
    """Ports of a cluster's devices: fitted curves where the profile has them, else bandwidth and latency of the links."""
    notes: list[str] = []
    slowest = min(range(cluster.size), key=lambda g: cluster.intra_G[g].bandwidth_Bps)
    device, wire = cluster.devices[slowest], cluster.intra_G[slowest]
    if len({link.name for link in cluster.intra_G}) > 1:
        notes.append(f"all-to-all inside nodes is computed with the slowest port, {wire.name}")
    curve = _all_to_all(device.collectives)
    link: Port
    if curve is not None and wire.name.startswith("nvlink"):
        link = curve.port
    else:
        link = LinearPort(latency_s=wire.latency_s, bandwidth_Bps=wire.bandwidth_Bps)
        notes.append(f"not calibrated: all-to-all over {wire.name} is latency + bytes/bandwidth of its datasheet")
    if cluster.network is None:
        return Ports(link=link), notes
    nic = LinearPort(latency_s=cluster.network.latency_s, bandwidth_Bps=cluster.network.bandwidth_Bps / cluster.oversubscription)
    fitted = [found for fit in device.collectives if isinstance(found := collective(fit), Ports) and found.nic is not None]
    if fitted and cluster.network.bandwidth_Bps == 50e9 and cluster.oversubscription == 1:
        nic = fitted[0].nic  # type: ignore[assignment]
    else:
        notes.append(f"not calibrated: all-to-all over {cluster.network.name} is latency + bytes/bandwidth of its datasheet")
    if cluster.oversubscription > 1:
        notes.append(f"over-subscription {cluster.oversubscription:g}: every NIC is given 1/{cluster.oversubscription:g} of its bandwidth")
    return Ports(link=link, nic=nic), notes


def _all_to_all(fits: Sequence[Fitted]) -> CollectiveCurve | None:
    curves = [found for fit in fits if isinstance(found := collective(fit), CollectiveCurve) and found.op == "all_to_all"]
    return max(curves, key=lambda curve: curve.ranks[1]) if curves else None
