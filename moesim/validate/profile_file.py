"""What a calibration found, as hardware files: a device profile, and a cluster of this machine's devices with its host."""

from __future__ import annotations

import json
import os

import torch

from moesim.calibrate.kernels import profile_fragment
from moesim.validate.calibrate import Calibration


def source_of(found: Calibration) -> str:
    """Where the numbers come from, in a line."""
    machine = found.hardware
    return f"moesim calibrate, {found.date}, {machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, {found.backend} back-end"


def profile_text(found: Calibration, *, name: str) -> str:
    """Device profile (TOML): measured ceilings and the fitted kernel with its residuals."""
    cuda = found.device.startswith("cuda")
    kind, memory = ("gpu", "hbm") if cuda else ("cpu", "ddr")
    capacity = torch.cuda.get_device_properties(found.device).total_memory if cuda else _host_B()
    source = source_of(found)
    clean = json.dumps(source)
    arithmetic = "bf16" if found.dtype == "fp8" else found.dtype
    lines = [
        f"name = {json.dumps(name)}",
        f"title = {json.dumps(str(found.hardware.get('gpu') or found.hardware['cpu']))}",
        f'kind = "{kind}"',
        "",
        "[compute]",
        f"source = {clean}",
        'confidence = "measured"',
        f"flops = {{ {arithmetic} = {found.peak.flops:.4g} }}",
        f"units = {found.peak.units}",
        f"cache = {found.peak.cache_B:.4g}",
        "",
        "[[memories]]",
        f'name = "{memory}"',
        f"capacity = {capacity:d}",
        f"bandwidth = {found.peak.memory_Bps:.4g}",
        f"source = {clean}",
        'confidence = "measured"',
        "",
    ]
    fragment = profile_fragment(found.fit, framework="torch", version=found.hardware["torch"], source=source, date=found.date)
    return "\n".join(lines) + "\n" + fragment


def cluster_text(found: Calibration, *, name: str, device_file: str) -> str:
    """Cluster file (TOML) of this machine: its devices, the copy between them, the copy from the host.

    The slot's bandwidth is what copies reached, pinned where there is pinning; the link is the peer copy, or with one
    device the copy inside it, and says so.
    """
    cuda = found.device.startswith("cuda")
    clean = json.dumps(source_of(found))
    between = "device-to-device" if "device-to-device" in found.copy_fits else "inside-device"
    host = "host-to-device pinned" if "host-to-device pinned" in found.copy_fits else "host-to-device pageable"
    link_title = "Copies between two GPUs" if between == "device-to-device" else "Copies inside the one device: a bound that no link reaches"
    devices = torch.cuda.device_count() if cuda else max(1, (os.cpu_count() or 1))

    def link(key: str, title: str, way: str) -> list[str]:
        fit = found.copy_fits[way]
        return [
            f"[links.{key}]",
            f"title = {json.dumps(title)}",
            f"bandwidth = {fit['bandwidth_Bps']:.4g}",
            f"latency = {fit['latency_s']:.4g}",
            f"source = {clean}",
            'confidence = "measured"',
            "",
        ]

    lines = [
        f"name = {json.dumps(name)}",
        f"title = {json.dumps('This machine: ' + str(found.hardware.get('gpu') or found.hardware['cpu']))}",
        "",
        "[[nodes]]",
        f"device = {json.dumps(device_file)}",
        f"devices = {devices}",
        'link = "measured-link"',
        'host = "this-host"',
        "",
        *link("measured-link", link_title, between),
        *link("measured-slot", f"{host} copies", host),
        "[hosts.this-host]",
        f"title = {json.dumps(str(found.hardware['cpu']))}",
        'link = "measured-slot"',
        "",
        "[[hosts.this-host.memories]]",
        'name = "ddr"',
        f"capacity = {_host_B():d}",
        f"bandwidth = {max(fit['bandwidth_Bps'] for fit in found.copy_fits.values()):.4g}",
        f"source = {json.dumps(source_of(found) + ': the fastest copy seen, a lower bound')}",
        'confidence = "measured"',
        "",
    ]
    return "\n".join(lines)


def _host_B() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
