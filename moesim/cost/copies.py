"""Time of copies: inside a device's memory, between host and device, from an SSD.

A copy engine works first in, first out, one for each direction; concurrent copies of one direction take turns and do not
share. Suffixes: N copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.fitted import main_memory
from moesim.errors import InputError, ProfileError
from moesim.hardware import Cluster, Device

Floats = NDArray[np.float64]
# AIConfigurator 0.12.0: observed share of memory bandwidth, start of a memory operation.
MEMORY_SHARE, MEMORY_LATENCY_S = 0.8, 3e-6
# Share of a PCIe link's bandwidth that pinned copies of expert size reach: 51 of 63 GB/s (batched copies, published).
PINNED_SHARE = 0.81


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPath:
    """A way bytes take: start-up, bandwidth of its narrowest part, what that part is, and remarks."""

    latency_s: float
    bandwidth_Bps: float
    bottleneck: str
    notes: tuple[str, ...] = ()

    def time_s(self, bytes_N: ArrayLike) -> Floats:
        """Seconds of each copy alone: `latency + bytes/bandwidth`, 0 for no bytes. InputError for negative bytes."""
        size_N = np.asarray(bytes_N, np.float64)
        if (size_N < 0).any():
            raise InputError(f"bytes={bytes_N!r}: a copy has >= 0 bytes")
        return np.where(size_N > 0, self.latency_s + size_N / self.bandwidth_Bps, 0.0)


def memory_path(device: Device) -> CopyPath:
    """A copy inside the device's main memory: every byte is read and written."""
    bandwidth_Bps = main_memory(device).bandwidth_Bps * MEMORY_SHARE / 2
    return CopyPath(latency_s=MEMORY_LATENCY_S, bandwidth_Bps=bandwidth_Bps, bottleneck=main_memory(device).name)


def host_path(cluster: Cluster, device: int, memory: str = "ddr", *, sharing: int = 1) -> CopyPath:
    """Between a memory of the host ("ddr", "nvme", …) and a device's main memory, either direction.

    Parts work at the same time on pieces of the copy, so the narrowest one sets the bandwidth: the memory, divided by the
    `sharing` devices that copy at once, the slot at `PINNED_SHARE`, the device's memory. Raises ProfileError when the
    cluster's file describes no host or no such memory.
    """
    host = cluster.host(device)
    if host is None:
        raise ProfileError(f'{cluster.name!r}: device {device} has no host; name one in its [[nodes]] table, as in host = "dgx-h100"')
    found = next((each for each in host.memories if each.name == memory), None)
    if found is None:
        has = ", ".join(each.name for each in host.memories)
        raise ProfileError(f"host {host.name!r} has no {memory!r}; it has {has}: add one to its memories")
    measured = any(fact.path == "$.bandwidth" and fact.confidence == "measured" for fact in host.link.facts)
    reached = 1.0 if measured else PINNED_SHARE  # a measured slot already is what copies reach
    own = main_memory(cluster.devices[device])
    parts = {
        f"{memory} of {host.name}": found.bandwidth_Bps / sharing,
        host.link.name: host.link.bandwidth_Bps * reached,
        own.name: own.bandwidth_Bps * MEMORY_SHARE,
    }
    narrow = min(parts, key=lambda name: parts[name])
    note = f"not calibrated: host copies over {host.link.name} reach {PINNED_SHARE:.0%} of its bandwidth from pinned memory"
    notes = () if reached == 1 else (note,)
    return CopyPath(latency_s=host.link.latency_s, bandwidth_Bps=parts[narrow], bottleneck=narrow, notes=notes)


def ping_pong_s(load_s_N: ArrayLike, compute_s_N: ArrayLike) -> float:
    """Seconds of N experts computed in turn while the next one loads into the second of two buffers.

        load_1 + sum_i max(compute_i, load_{i+1}),  the last with nothing to load

    Source: M3ViT (arXiv:2210.14793), Edge-MoE (arXiv:2305.18691). Raises InputError on unequal or empty lists.
    """
    load_N, compute_N = np.asarray(load_s_N, np.float64), np.asarray(compute_s_N, np.float64)
    if load_N.shape != compute_N.shape or load_N.ndim != 1 or not load_N.size:
        raise InputError(f"loads {load_N.shape} and computations {compute_N.shape}: pass one of each per expert")
    return float(load_N[0] + np.maximum(compute_N, np.append(load_N[1:], 0.0)).sum())
