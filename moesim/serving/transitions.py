"""From one size of a deployment to another: the work, its steps, how long intake pauses, what memory peaks at.

    boot ───────────────────────────────┐
    (pool) ── copy or load ── hand over ┴── warm up ── switch        weights on devices that stay are reused
    boot ── reload everything ──────────── warm up ── switch         nothing is reused

Devices are numbered as in the cluster that holds those before and those after; suffix G. Bytes over links come from the
cluster; what software adds (`Rates`) is measured, on the system that `Rates.source` names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.cost.attention import dense_parameters
from moesim.cost.copies import host_path
from moesim.cost.fitted import main_memory
from moesim.errors import InputError
from moesim.hardware import Cluster
from moesim.model import ModelSpec
from moesim.plan import Placement
from moesim.units import human

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Source = Literal["peers", "host", "disk"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What software adds to a transition, in the units of what it grows with.

    boot_round_s   start of an instance, for each doubling of its ranks: a tree of rendezvous (at least one round)
    channel_s      warm-up, for each other rank: the first exchange opens a channel to it
    land_Bps       weights arriving on a device from its peers: pages allocated, received, mapped
    pool_Bps       growth of a caching allocator's pool on a device that joins, where memory is not allocated to be shared
    disk_Bps       weights from the disk the devices share, every tensor once
    reload_Bps     weights of one device from its host's page cache, through the engine's loader, all devices at a time
    """

    boot_round_s: float
    channel_s: float
    land_Bps: float
    pool_Bps: float
    disk_Bps: float
    reload_Bps: float
    source: str

    def boot_s(self, ranks: int) -> float:
        """Start of an instance of `ranks` devices."""
        return self.boot_round_s * max(1.0, math.log2(ranks))

    def warm_up_s(self, ranks: int) -> float:
        """First step of an instance of `ranks` devices."""
        return self.channel_s * (ranks - 1)


# Solved from the scale-up column of ElasticMoE's ablation alone; `moesim.studies.scaling.solve_rates` does it again.
ASCEND = Rates(
    boot_round_s=20.378,
    channel_s=0.23516,
    land_Bps=6.2635e9,
    pool_Bps=6.9155e9,
    disk_Bps=1.21779e9,
    reload_Bps=1.0628e9,
    source="ElasticMoE (arXiv:2510.02613), table 1 and figure 11: DeepSeek-V2-Lite, 6 to 8 Ascend 910C, vLLM",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """How a deployment changes size.

    standby  the new instance was started ahead, without weights
    shared   memory is allocated so that another process can map it (no growth of pools)
    source   where weights come from that a device lacks: its peers, host memory, or the disk
    reuse    weights and caches on devices that stay are mapped, not loaded again
    beside   the new instance loads beside the old one: two copies of the weights. On devices of its own the old one serves on;
             on the same devices it does not (ElasticMoE, table 2: 0.467 of 1.338 requests/s, what the seconds around it explain)
    """

    name: str
    standby: bool = True
    shared: bool = True
    source: Source = "peers"
    reuse: bool = True
    beside: bool = False


ELASTIC = Method(name="elastic")
COLD_RESTART = Method(name="cold-restart", standby=False, shared=False, source="disk", reuse=False)
CONCURRENT = Method(name="concurrent", standby=False, shared=False, source="disk", reuse=False, beside=True)
METHODS = {method.name: method for method in (ELASTIC, COLD_RESTART, CONCURRENT)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Bytes of a transition.

    before_B_G, after_B_G  weights of each device before and after
    arriving_B_G           of those after, what the device lacks
    peers_B_GG             what devices send each other to bring it there
    lost_B_G               of what arrives, what no device holds any more
    once_B                 what arrives, every tensor counted once
    joins_G, uses_G        devices that held nothing before; devices in use after
    """

    before_B_G: Floats
    after_B_G: Floats
    arriving_B_G: Floats
    peers_B_GG: Floats
    lost_B_G: Floats
    once_B: float
    joins_G: Bools
    uses_G: Bools


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step of a transition; it starts when those named in `after` have ended."""

    name: str
    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """A change of size: its steps, and what users and devices feel of it.

    pause_s      no new request is taken; running ones go on
    down_s       nothing runs
    moved_B      bytes between devices; loaded_B: bytes from disk or host
    peak_B_G     most bytes each device holds at a time
    """

    method: str
    before: int
    after: int
    steps: tuple[Step, ...]
    pause_s: float
    down_s: float
    moved_B: float
    loaded_B: float
    peak_B_G: Floats
    notes: tuple[str, ...] = ()

    @property
    def keeps_cache(self) -> bool:
        """Requests under way go on; where nothing runs, the process that had them ends, and they begin again."""
        return not self.down_s

    @property
    def end_s(self) -> dict[str, float]:
        """When each step ends, from the command."""
        return ends(self.steps)

    @property
    def seconds(self) -> float:
        """From the command until the new size serves."""
        return max(self.end_s.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        end_s = self.end_s
        return {
            "method": self.method,
            "from": self.before,
            "to": self.after,
            "seconds": self.seconds,
            "pause_s": self.pause_s,
            "down_s": self.down_s,
            "moved_B": self.moved_B,
            "loaded_B": self.loaded_B,
            "peak_B": float(self.peak_B_G.sum()),
            "steps": [
                {"name": step.name, "start_s": end_s[step.name] - step.seconds, "seconds": step.seconds} for step in self.steps if step.seconds
            ],
            "notes": list(self.notes),
        }


def ends(steps: Sequence[Step]) -> dict[str, float]:
    """End of every step: its seconds after the last of those it waits for. InputError when one waits for a later one."""
    end_s: dict[str, float] = {}
    for step in steps:
        if missing := [name for name in step.after if name not in end_s]:
            raise InputError(f"step {step.name!r} waits for {', '.join(missing)}, which no step before it is; list steps in order")
        end_s[step.name] = max((end_s[name] for name in step.after), default=0.0) + step.seconds
    return end_s


def work_of(model: ModelSpec, before: Placement, after: Placement, cluster: Cluster, *, tp: int = 1, dead: Sequence[int] = ()) -> Work:
    """Bytes of going from one placement to another on the cluster's devices (those not in use own no slots).

    Experts travel as `Placement.diff` says; the rest of the model is split over `tp` devices and copied to every group of them
    that joins, from groups that stay, in turn. `dead` devices send nothing: what only they held is in `lost_B_G`.
    Raises InputError when a placement is not for this cluster or a device is both dead and in use.
    """
    if {before.devices, after.devices} != {cluster.size}:
        raise InputError(f"placements on {before.devices} and {after.devices} devices, cluster of {cluster.size}; number devices as the cluster does")
    gone_G = np.isin(np.arange(cluster.size), dead)
    had_G, uses_G = (before.slots_G > 0) & ~gone_G, after.slots_G > 0
    if (gone_G & uses_G).any():
        raise InputError(f"device {int(np.argmax(gone_G & uses_G))} is dead and in use; give it no slots")
    joins_G = uses_G & ~had_G
    expert_B, dense_B = model.expert_B, dense_parameters(model).whole(model) * model.weight_bits / 8
    peers_B_GG, lost_B_G, sent_G = np.zeros((cluster.size,) * 2), np.zeros(cluster.size), np.zeros(cluster.size)
    distinct: set[tuple[int, int]] = set()
    for layer, expert, source, target in before.diff(after, node_G=cluster.node_G).moves_M4.tolist():
        distinct.add((layer, expert))
        if gone_G[source]:
            holders = np.flatnonzero(before.holds_LGE[layer, :, expert] & ~gone_G)
            if not len(holders):
                lost_B_G[target] += expert_B
                continue
            near = holders[cluster.node_G[holders] == cluster.node_G[target]]
            choices = near if len(near) else holders
            source = int(choices[np.argmin(sent_G[choices])])
        sent_G[source] += 1
        peers_B_GG[source, target] += expert_B
    sources = np.flatnonzero(had_G)
    for turn, target in enumerate(np.flatnonzero(joins_G).tolist()):
        shard = np.flatnonzero(uses_G).tolist().index(target) % tp
        if len(alike := sources[np.arange(len(sources)) % tp == shard]):
            peers_B_GG[alike[turn // tp % len(alike)], target] += dense_B / tp
        else:
            lost_B_G[target] += dense_B / tp
    layers = len(after.layers)
    return Work(
        before_B_G=had_G * (before.slots_G * (layers * expert_B) + dense_B / tp),
        after_B_G=after.slots_G * (layers * expert_B) + uses_G * (dense_B / tp),
        arriving_B_G=peers_B_GG.sum(axis=0) + lost_B_G,
        peers_B_GG=peers_B_GG,
        lost_B_G=lost_B_G,
        once_B=len(distinct) * expert_B + min(1.0, joins_G.sum() / tp) * dense_B,
        joins_G=joins_G,
        uses_G=uses_G,
    )


def transition(
    model: ModelSpec,
    before: Placement,
    after: Placement,
    cluster: Cluster,
    *,
    method: Method = ELASTIC,
    tp: int = 1,
    cache_B_G: ArrayLike = 0.0,
    dead: Sequence[int] = (),
    rates: Rates = ASCEND,
) -> Transition:
    """The steps from one placement to another, and what they cost.

    `cache_B_G` is the key-value cache in use on each device: what devices that leave hold is handed to those that stay (elastic),
    or computed again. Copies take the time of the busiest link of the cluster's graph, or of `Rates.land_Bps` where that is longer.
    Raises InputError for placements of another cluster, ProfileError where weights come from a host the cluster does not describe.
    """
    work = work_of(model, before, after, cluster, tp=tp, dead=dead)
    cache_G = np.broadcast_to(np.asarray(cache_B_G, np.float64), (cluster.size,))
    ranks = int(work.uses_G.sum())
    boot = Step(name="boot", seconds=0.0 if method.standby else rates.boot_s(ranks))
    warm_up, notes = rates.warm_up_s(ranks), [f"software costs of transitions are those of {rates.source}"]
    loaded_B, moved_B, handed_s = 0.0, 0.0, 0.0
    if not method.reuse:
        steps = [boot, Step(name="reload", seconds=float(work.after_B_G.max()) / rates.reload_Bps, after=("boot",))]
        loaded_B = float(work.after_B_G.sum())
        steps.append(Step(name="warm up", seconds=warm_up, after=("reload",)))
        notes.append("weights are read again from the hosts' page caches; from a disk that takes longer")
    else:
        grown_B = 0.0 if method.shared else float(np.where(work.joins_G, work.arriving_B_G, 0.0).max())
        steps = [boot, Step(name="grow pools", seconds=grown_B / rates.pool_Bps)]
        if method.source == "peers":
            moved_B, loaded_B = float(work.peers_B_GG.sum()), float(work.lost_B_G.sum())
            landing_s = float(work.peers_B_GG.sum(axis=0).max()) / rates.land_Bps
            steps.append(Step(name="copy from peers", seconds=max(landing_s, links_s(cluster, work.peers_B_GG)), after=("grow pools",)))
            if loaded_B:
                steps.append(Step(name="load what is lost", seconds=loaded_B / rates.disk_Bps, after=("grow pools",)))
        else:
            loaded_B = work.once_B if method.source == "disk" else float(work.arriving_B_G.sum())
            load_s = loaded_B / rates.disk_Bps if method.source == "disk" else _from_host_s(cluster, work.arriving_B_G, rates)
            steps.append(Step(name=f"load from {method.source}", seconds=load_s, after=("grow pools",)))
        leaving_G = (before.slots_G > 0) & ~work.uses_G & ~np.isin(np.arange(cluster.size), dead)
        if (handed := handed_over(np.where(leaving_G, cache_G, 0.0), work.uses_G)).any():
            moved_B, handed_s = moved_B + float(handed.sum()), links_s(cluster, handed)
        copied = tuple(step.name for step in steps[2:])
        steps.append(Step(name="hand over caches", seconds=handed_s, after=copied))
        steps.append(Step(name="warm up", seconds=warm_up, after=("boot", "hand over caches")))
    seconds = max(ends(steps).values())
    stalls = not method.reuse and not (method.beside and not ((before.slots_G > 0) & work.uses_G).any())
    both = work.before_B_G + (work.after_B_G if method.beside else work.arriving_B_G * (1.0 if method.shared else 2.0))
    peak_G = np.maximum(work.before_B_G, work.after_B_G) if not (method.reuse or method.beside) else both
    capacity_G = np.asarray([main_memory(device).capacity_B for device in cluster.devices])
    if (over_G := peak_G + cache_G - capacity_G).max() > 0:
        g = int(over_G.argmax())
        notes.append(f"does not fit while it changes: device {g} would hold {human(float(over_G[g]), 'B')} more than it has")
    return Transition(
        method=method.name,
        before=int((before.slots_G > 0).sum()) - len(dead),
        after=ranks,
        steps=tuple(steps),
        pause_s=seconds if method.reuse else 0.0,
        down_s=seconds if stalls else 0.0,
        moved_B=moved_B,
        loaded_B=loaded_B,
        peak_B_G=peak_G + cache_G,
        notes=tuple(notes),
    )


def served_s(change: Transition, *, residence_s: float, until_s: float) -> tuple[float, float]:
    """Seconds' worth of service, at the old and at the new rate, in the `until_s` after the command, under full load.

    Without a stop, requests under way finish while none is taken: batches and with them the rate fall evenly to 0 over the
    `residence_s` a request spends; the new size takes over when it is ready and the old one is empty (ElasticMoE, section 5.2).
    """
    if change.down_s:
        return 0.0, max(0.0, until_s - change.seconds)
    if not change.pause_s:
        return min(change.seconds, until_s), max(0.0, until_s - change.seconds)
    t = min(until_s, residence_s)
    drained = t - t * t / (2 * residence_s) if residence_s else 0.0
    return drained, max(0.0, until_s - max(change.seconds, residence_s))


def links_s(cluster: Cluster, bytes_GG: Floats) -> float:
    """Seconds until the busiest link of the cluster's graph has carried its part of these bytes, all sent at once."""
    from moesim.sim.fabric import Wiring

    if not bytes_GG.any():
        return 0.0
    wiring = Wiring.of(cluster)
    latency_s: float = max(data["latency_s"] for *_, data in cluster.graph.edges(data=True)) * 2
    return float((wiring.loads(bytes_GG) / wiring.capacity_K).max()) + latency_s


def handed_over(leaving_B_G: Floats, uses_G: Bools) -> Floats:
    """Traffic [G, G] of what leaving devices hold, spread evenly over those in use."""
    return np.outer(leaving_B_G, uses_G / max(int(uses_G.sum()), 1))


def without(method: Method, **off: Any) -> Method:
    """The method with some mechanisms set otherwise, named after them."""
    return replace(method, name=", ".join([method.name, *(f"{name}={value}" for name, value in off.items())]), **off)


def _from_host_s(cluster: Cluster, arriving_B_G: Floats, rates: Rates) -> float:
    sharing = max(1, int((arriving_B_G > 0).sum()))
    paths = {g: host_path(cluster, int(g), sharing=sharing) for g in np.flatnonzero(arriving_B_G)}
    return max((max(float(path.time_s(arriving_B_G[g])), float(arriving_B_G[g]) / rates.land_Bps) for g, path in paths.items()), default=0.0)
