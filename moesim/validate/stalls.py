"""What the event engine expects of a cache plan that is executed on one device: what is copied for each event, and how long it waits.

The engine's residency and copies run around computation whose seconds are given: no attention, no exchange, as in the
execution. N events (one layer of one step), T tokens, L layers, K selections, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import simpy
import torch
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.experts import ComputePeak
from moesim.cost.offload import Fetching
from moesim.model import ModelSpec
from moesim.plan import Placement
from moesim.replay import Events, Prefetcher, Prefetches
from moesim.sim.copies import Fetcher
from moesim.sim.fabric import Fabric
from moesim.sim.residency import Stay, settle
from moesim.sim.streams import Runner
from moesim.sim.tasks import Block, Task
from moesim.systems.residency import Residency
from moesim.systems.routing import Plain
from moesim.validate.ceilings import fit_copies
from moesim.validate.engines import stand_in
from moesim.validate.layer import slots_layer
from moesim.validate.machine import on_device
from moesim.validate.streams import Side
from moesim.validate.timing import one_thread
from moesim.validate.weights import ExpertWeights

_ANY = ComputePeak(flops=1.0, memory_Bps=1.0, cache_B=1.0, units=1)  # of a device whose computation is given
UNKNOWN = Fetching(alone_Bps=1.0, beside_Bps=1.0)  # where only what is copied is asked


@dataclass(frozen=True)
class OneAhead:
    """A prefetcher whose copies are asked for one event before they are needed, as they are executed."""

    of: Prefetcher

    @property
    def name(self) -> str:
        """As reports call it."""
        return self.of.name

    def predict(self, events: Events, *, seed: int = 0) -> Prefetches:
        """The same experts."""
        found = self.of.predict(events, seed=seed)
        return replace(found, lead_N=np.minimum(found.lead_N, 1))


def measure_way(like: ExpertWeights, device: str, *, total_B: float, repeats: int = 24) -> Fetching:
    """How experts come to a device now, alone and beside a layer that computes: from copies of narrower and wider experts
    of `like`'s kind.

    Every tensor of an expert is a copy of its own, from pinned memory where there is pinning. Copies go around pools of
    `total_B` bytes, at most 256 MiB, so that caches and page tables hold as much of them as of the weights to be served.
    """
    hidden, width, cuda = like.up.shape[2], like.down.shape[2], device.startswith("cuda")
    rows: list[dict[str, Any]] = []
    for share in (0.75, 1.5):  # on both sides: larger copies go another way through the caches
        small = ExpertWeights.random(
            experts=1, hidden=hidden, intermediate=max(16, round(width * share / 16) * 16), gated=like.gated, dtype=like.up.dtype
        )
        count = max(2, min(4096, round(min(total_B, 2**28) / small.expert_B)))
        host, slots, here = small.like(count, pinned=cuda), small.like(count, device=device), small.like(4, device=device)
        for pool in (host, slots, here):
            for expert in range(len(pool.up)):
                pool.put(expert, small, 0)
        chosen = torch.arange(4, device=device)[None, :]
        tokens = torch.zeros(1, hidden, dtype=host.activations, device=device)
        layer = partial(slots_layer, tokens, chosen, torch.ones(1, 4, device=device), here)
        for name in ("alone", "beside"):
            with on_device(device, "copies of experts"), one_thread(device), Side(device) as side:
                tickets = []
                for turn in range(repeats):
                    expert = turn * 7 % count
                    tickets.append(side.submit(partial(slots.put, count - 1 - expert, host, expert, non_blocking=True)))
                    if name == "beside":
                        layer()
                    side.wait(tickets[-1])
                    if name == "alone":
                        layer()  # between copies, as in a run, for what it leaves in the caches
            rows.append({"way": name, "bytes": host.expert_B, "seconds": float(np.median([ticket.seconds for ticket in tickets]))})
    fits = fit_copies(rows)
    alone_s = fits["alone"]["latency_s"] + like.expert_B / fits["alone"]["bandwidth_Bps"]
    return Fetching(alone_Bps=like.expert_B / alone_s, beside_Bps=fits["beside"]["bandwidth_Bps"], migrate_s=fits["beside"]["latency_s"])


def settle_one(
    ids_TLK: NDArray[np.uint16],
    weights: ExpertWeights,
    way: Fetching,
    *,
    policy: str,
    slots_L: NDArray[np.integer],
    tokens_per_step: int,
    prefetcher: Prefetcher | None,
    pinned_LE: NDArray[np.bool_] | None,
    seed: int,
) -> tuple[Stay, CostModel]:
    """The engine's replay of one device that owns all experts, and the cost model it runs with."""
    experts, wide, hidden = weights.up.shape
    tokens, layers, top_k = ids_TLK.shape
    model = ModelSpec(
        name="executed", layers=layers, moe_layers=tuple(range(layers)), hidden=hidden, intermediate=wide // 2 if weights.gated else wide,
        experts=experts, top_k=min(top_k, experts), gated=weights.gated,
    )  # fmt: skip
    placement = Placement(
        slots_LP=np.tile(np.arange(experts, dtype=np.int32), (layers, 1)), slots_G=np.array([experts]), experts=experts, layers=model.moe_layers
    )
    residency = Residency(
        slots_LG=np.asarray(slots_L, np.int64)[:, None], policy=policy, pinned_LE=pinned_LE, prefetch=prefetcher and OneAhead(prefetcher),
        bits=8 * weights.expert_B / model.expert_parameters, way=way, seed=seed,
    )  # fmt: skip
    cost = CostModel.of(stand_in(_ANY, 1, kind="cpu", dtype="fp32"), model)
    ends_S = np.append(np.arange(tokens_per_step, tokens, tokens_per_step), tokens)
    routed = Plain().router(placement, cost.cluster.node_G, gatherable=0)(ids_TLK, ends_S, float(tokens_per_step))
    return settle(residency, cost, [routed]), cost


def expected_stalls(stay: Stay, cost: CostModel, compute_s_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds that each event waits for experts when its own work takes `compute_s_N`: what ends a gate to what begins its experts."""
    layers = stay.copies.asked_SLG.shape[1]
    fetcher = Fetcher(stay, cost)
    stall_N = np.zeros(len(compute_s_N))

    def blocks() -> Iterator[Block]:
        before: tuple[Task, ...] = ()
        for n, seconds in enumerate(compute_s_N.tolist()):
            label = divmod(n, layers)
            gate = Task("gate", "compute", 0.0, before, device=0, label=label)
            tasks = [gate]
            (waits,) = fetcher.asked(tasks, label, [[gate]])
            work = Task("experts", "compute", seconds, waits, device=0, label=label)
            tasks.append(work)
            before = (work,)
            yield Block(label=label, tasks=tasks, span=((gate,), (work,)), last=label[1] == layers - 1)

    def ended(block: Block) -> None:
        (gate,), (work,) = block.span
        stall_N[block.label[0] * layers + block.label[1]] = work.start - gate.end

    Runner(Fabric(simpy.Environment(), np.zeros(0)), blocks(), on_block=ended).run()
    return stall_N
