"""Time of MoE layers whose experts are not all in the device's memory: copies on demand, ahead of need, expert by expert.

Closed forms; the event engine runs the same tasks on streams and agrees with them (tests). A layer with copies:

    on demand    block + sync + copy(missing)
    ahead        sync + max(block, ahead(missing) - between)        the copies of a layer run while the layer before it does
    one by one   load_1 + sum_i max(compute_i, load_{i+1})          two buffers; any number: a flow shop of two machines

`block` is the layer with its attention and all experts in place, `between` what runs between two MoE layers. Suffixes: N cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.copies import MEMORY_LATENCY_S, MEMORY_SHARE, host_path
from moesim.cost.fitted import main_memory
from moesim.errors import InputError, ProfileError
from moesim.hardware import Cluster, Device, Memory

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetching:
    """How experts come to a device: bandwidth by what else goes on, and what does not shrink with bytes.

    alone_Bps    copies the computation waits for, nothing beside them
    beside_Bps   copies that run beside computation
    migrate_s    launch and completion of one expert's copy ahead of need (or of one copy of a whole layer)
    sync_s       once per layer: the host learns the routes, sees the layer's own copies complete and asks for the next
    storage_Bps  from an SSD to the host, a stage before the copy; inf: experts are in the host's memory already
    """

    alone_Bps: float
    beside_Bps: float
    migrate_s: float = 0.0
    sync_s: float = 0.0
    storage_Bps: float = math.inf
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for item in fields(self)[:5]:
            value = getattr(self, item.name)
            if not value >= 0 or (item.name.endswith("Bps") and value == 0) or (math.isinf(value) and item.name != "storage_Bps"):
                raise InputError(f"{item.name}={value!r}: bandwidths must be > 0, times >= 0, and all but storage_Bps finite")

    def demand_s(self, bytes_N: ArrayLike, *, stored: bool = False) -> Floats:
        """Seconds of copies that computation waits for: `bytes/alone`, after `bytes/storage` if they are `stored` on the SSD."""
        size_N = _bytes(bytes_N)
        return size_N / self.alone_Bps + (size_N / self.storage_Bps if stored else 0.0)

    def ahead_s(self, bytes_N: ArrayLike, copies_N: ArrayLike, *, stored: bool = False) -> Floats:
        """Seconds of `copies_N` copies of `bytes_N` bytes together that run ahead: `copies*migrate + bytes/beside`, and storage."""
        size_N = _bytes(bytes_N)
        return np.asarray(copies_N) * self.migrate_s + size_N / self.beside_Bps + (size_N / self.storage_Bps if stored else 0.0)


def _bytes(bytes_N: ArrayLike) -> Floats:
    size_N = np.asarray(bytes_N, np.float64)
    if not (size_N >= 0).all():
        raise InputError(f"bytes={bytes_N!r}: a copy has >= 0 bytes")
    return size_N


def own_memory(device: Device, tier: str) -> Memory | None:
    """The device's own memory called `tier`, if it has one."""
    return next((memory for memory in device.memories if memory.name == tier), None)


def fetching(cluster: Cluster, device: int, tier: str) -> Fetching:
    """How experts in memory `tier` reach a device, from profiles: the device's own memory of that name, else its host's.

    Own memory feeds at `MEMORY_SHARE` of its bandwidth; the host's as `cost.copies.host_path`, an SSD ("nvme") through
    the host's memory. Nothing is fitted: no sync, a launch costs the link's latency, and copies beside computation are as
    fast as alone; the notes say so. Raises ProfileError for a device without such a memory and without a host that has it.
    """
    own = own_memory(cluster.devices[device], tier)
    if own is not None:
        speed = own.bandwidth_Bps * MEMORY_SHARE
        note = f"not calibrated: copies from {own.name} of {cluster.devices[device].name} at {MEMORY_SHARE:.0%} of its bandwidth"
        return Fetching(alone_Bps=speed, beside_Bps=speed, migrate_s=MEMORY_LATENCY_S, notes=(note,))
    node_G = cluster.node_G
    path = host_path(cluster, device, "ddr" if tier == "nvme" else tier, sharing=int((node_G == node_G[device]).sum()))
    host = cluster.host(device)
    assert host is not None
    storage_Bps, notes = math.inf, list(path.notes)
    if tier == "nvme":
        found = next((memory for memory in host.memories if memory.name == tier), None)
        if found is None:
            has = ", ".join(memory.name for memory in host.memories)
            raise ProfileError(f"host {host.name!r} has no 'nvme'; it has {has}: add one to its memories")
        storage_Bps = found.bandwidth_Bps
        notes.append(f"not calibrated: experts are read from the SSD of {host.name} at its profile's bandwidth, then copied")
    speed = path.bandwidth_Bps
    return Fetching(alone_Bps=speed, beside_Bps=speed, migrate_s=path.latency_s, storage_Bps=storage_Bps, notes=tuple(notes))


def on_demand_s(block_s_N: ArrayLike, missing_N: ArrayLike, expert_B: float, way: Fetching, *, stored: bool = False) -> Floats:
    """Seconds of layers that copy their `missing_N` experts after the gate: `block + sync + missing*bytes/alone`.

    Missing may be a mean (1 - hit ratio at one expert per layer): the form is linear in it.
    """
    return np.asarray(block_s_N, np.float64) + way.sync_s + way.demand_s(np.asarray(missing_N) * expert_B, stored=stored)


def ahead_layer_s(
    block_s_N: ArrayLike,
    missing_N: ArrayLike,
    expert_B: float,
    way: Fetching,
    *,
    between_s: float = 0.0,
    bulk: bool = False,
    stored: bool = False,
) -> Floats:
    """Seconds of layers in steady state whose experts are copied while the layer before runs, one layer ahead.

    The host asks for a layer's copies when those of the layer before have come (`sync`), so that

        sync + max(block, copies*migrate + missing*bytes/beside - between)

    with one copy per expert, or one for all (`bulk`). `missing_N` are whole experts of one layer each: the form is convex,
    so a mean of layers is not the layer of the mean; `Raises` InputError for negative ones. The first layer of a step has
    nothing before it that knows its experts: it is `on_demand_s`.
    """
    missing = np.asarray(missing_N, np.float64)
    copies = np.minimum(missing, 1) if bulk else missing
    copy_s = way.ahead_s(missing * expert_B, copies, stored=stored)
    return np.asarray(way.sync_s + np.maximum(np.asarray(block_s_N, np.float64), copy_s - between_s))


def one_by_one_s(load_s_N: Sequence[float], compute_s_N: Sequence[float], *, buffers: int | None = 2) -> float:
    """Seconds of N pieces computed in turn, each loaded before, loads in the same order on one engine.

        load_i begins at max(end load_{i-1}, end compute_{i-buffers});  compute_i at max(end compute_{i-1}, end load_i)

    Two buffers are ping-pong (`cost.copies.ping_pong_s`); None is room for all, where Johnson's order is the best one
    (S. M. Johnson 1954). Raises InputError on unequal lists and buffers < 1.
    """
    if len(load_s_N) != len(compute_s_N) or (buffers is not None and buffers < 1):
        raise InputError(f"{len(load_s_N)} loads, {len(compute_s_N)} computations, {buffers} buffers: pass one of each per piece, and buffers >= 1")
    loaded, ends = 0.0, [0.0]
    for i, (load, compute) in enumerate(zip(load_s_N, compute_s_N, strict=True)):
        free = ends[max(0, i + 1 - buffers)] if buffers is not None else 0.0
        loaded = max(loaded, free) + load
        ends.append(max(ends[-1], loaded) + compute)
    return ends[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostCompute:
    """A host that computes experts: activations move instead of weights (Fiddler, arXiv 2402.07033).

    flops, memory_Bps   of the host's cores at the expert's arithmetic, as reached (not peaks)
    launch_s            per expert: to hand it over and back
    beside              host and device share a layer's missing experts so that the later of both ends soonest (`shared_with_host`);
                        otherwise the host takes every expert that it alone computes sooner than the device copies and computes it
    """

    flops: float
    memory_Bps: float
    launch_s: float = 0.0
    beside: bool = False

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.memory_Bps > 0 and self.launch_s >= 0):
            raise InputError(f"{self}: rates must be > 0, launch_s >= 0; correct the host's numbers")

    def expert_s(self, tokens_N: ArrayLike, *, parameters: float, expert_B: float, moved_B: float = 0.0, link_Bps: float = math.inf) -> Floats:
        """Seconds of one expert with n tokens on the host: `launch + weights read + n*(2*parameters/flops + moved/link)`.

        Linear in n: weights are read once, then every token costs the same; `moved_B` goes over the link for each, both ways.
        """
        tokens = np.asarray(tokens_N, np.float64)
        each_s = 2 * parameters / self.flops + moved_B / link_Bps
        return np.where(tokens > 0, self.launch_s + expert_B / self.memory_Bps + tokens * each_s, 0.0)


def shared_with_host(host_s_A: ArrayLike, device_s_A: ArrayLike, event_A: ArrayLike, resident_s_N: ArrayLike) -> NDArray[np.bool_]:
    """Which of the missing experts A of events N the host computes while the device copies and computes the others.

    Those it is best at relative to the device, as many of them as make `max(sum host, resident + sum device)` least; ties go to the
    device. Every choice by a ratio of both times is among those tried, so none ends sooner; with experts that can be cut this is
    the optimum (two unrelated machines, a fractional knapsack). `event_A` names each expert's event.
    """
    host_s, device_s, resident_s = (np.asarray(each, np.float64) for each in (host_s_A, device_s_A, resident_s_N))
    event = np.asarray(event_A, np.int64)
    order = np.lexsort((host_s / device_s, event))
    event, host_s, device_s = event[order], host_s[order], device_s[order]
    total_N = np.bincount(event, device_s, minlength=len(resident_s)) + resident_s
    first_N = np.searchsorted(event, np.arange(len(resident_s)))
    before_host, before_device = np.cumsum(host_s) - host_s, np.cumsum(device_s) - device_s
    at = first_N[event]
    ends_s = np.maximum(before_host + host_s - before_host[at], total_N[event] - (before_device + device_s - before_device[at]))
    best_N = total_N.copy()  # the device computes all
    np.minimum.at(best_N, event, ends_s)
    least = (ends_s == best_N[event]) & (best_N < total_N)[event]
    last_N = np.full(len(resident_s), len(event))
    np.minimum.at(last_N, event[least], np.flatnonzero(least))
    found = np.zeros(len(event), bool)
    found[order] = (np.arange(len(event)) <= last_N[event]) & (last_N < len(event))[event]
    return found


def crossover(host_s_N: ArrayLike, device_s_N: ArrayLike) -> int:
    """n*, the fewest tokens from which the device (copy and computation) is no slower than the host; N if it always is.

    Entry n of both is the time of n + 1 tokens. One number says it all when the host's time grows faster than the device's.
    """
    wins = np.asarray(device_s_N) <= np.asarray(host_s_N)
    return int(np.argmax(wins)) + 1 if wins.any() else wins.size + 1


def on_chip_B(device: Device) -> float:
    """Bytes on the chip that can buffer experts (block RAM, SRAM, last-level cache); ProfileError when the profile has none."""
    sram = own_memory(device, "sram")
    size = sram.capacity_B if sram else device.cache_B
    if not size:
        raise ProfileError(f"device {device.name!r} names no memory on the chip; add compute.cache to its profile")
    return float(size)


def is_main(device: Device, tier: str) -> bool:
    """True when memory `tier` is where the device computes from, so that slots for its experts are on the chip."""
    return main_memory(device).name == tier


__all__ = [
    "Fetching",
    "HostCompute",
    "ahead_layer_s",
    "crossover",
    "fetching",
    "is_main",
    "on_chip_B",
    "on_demand_s",
    "one_by_one_s",
    "own_memory",
    "shared_with_host",
]
