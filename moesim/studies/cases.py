"""Cases of a study: clusters as published set-ups describe them, planted routing, and runs of systems on them.

Suffixes: T tokens, L MoE layers, K selections. Everything is a function of its arguments: same case, same figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.collectives import LinearPort
from moesim.cost.experts import ExpertKernel
from moesim.errors import InputError
from moesim.hardware import Cluster, load_device, load_links
from moesim.model import ModelSpec
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim.event import EventResult, simulate_event
from moesim.systems import SYSTEMS, System
from moesim.trace import Trace, TraceWriter, load_trace

Ids = NDArray[np.int64]
Writer = Callable[[ModelSpec, NDArray[np.integer]], Trace]  # what `Bench.trace` is


def model_of(**sizes: Any) -> ModelSpec:
    """A model whose every layer is a MoE layer; two layers of 32 plain experts with one expert per token unless said otherwise."""
    given = {"layers": 2, "hidden": 2048, "intermediate": 2048, "experts": 32, "top_k": 1, "gated": False} | sizes
    return ModelSpec(name="case", moe_layers=tuple(range(given["layers"])), **given)


def cluster_of(device: str, nodes: int, local: int, *, link: str = "nvlink3", nic_Bps: float = 25e9, fitted: bool = True) -> Cluster:
    """Equal nodes; every device has a port `link` and, between nodes, InfiniBand of `nic_Bps`.

    Not `fitted`: without measured kernels and curves, so that a link is its latency plus bytes over bandwidth.
    """
    links = load_links()
    if link not in links:
        raise InputError(f"link {link!r} is not known; known: {', '.join(sorted(links))}")
    one, wire = load_device(device), links[link]
    if not fitted:
        one, wire = replace(one, kernels=(), collectives=()), replace(wire, name="unmeasured")
    return Cluster(
        name="case",
        title=f"{nodes} x {local} {device}",
        devices=(one,) * (nodes * local),
        node_G=np.repeat(np.arange(nodes), local).astype(np.int32),
        intra_G=(wire,) * (nodes * local),
        network=replace(links["ib-hdr"], bandwidth_Bps=nic_Bps) if nodes > 1 else None,
    )


def zipf_ids(tokens: int, model: ModelSpec, skew: float, *, seed: int = 0) -> Ids:
    """One expert per token, popularity 1/rank^skew, in another order in every layer."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, model.experts + 1) ** skew
    ends = np.cumsum(share / share.sum())
    columns = [
        np.random.default_rng(layer).permutation(model.experts)[np.minimum(np.searchsorted(ends, rng.random(tokens)), model.experts - 1)]
        for layer in range(len(model.moe_layers))
    ]
    return np.stack(columns, axis=1)[:, :, None]


def even_ids(rounds: int, model: ModelSpec, experts: int | None = None) -> Ids:
    """Tokens take `experts` experts in turn: load and traffic are exactly even over the devices that hold them."""
    return np.tile(np.arange(experts or model.experts), rounds)[:, None, None].repeat(len(model.moe_layers), axis=1)


def chain_ids(tokens: int, model: ModelSpec, loyalty: float, *, seed: int = 0) -> Ids:
    """One expert per token; a share `loyalty` of the tokens goes on to the one follower of its last expert."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, len(model.moe_layers), 1), np.int64)
    ids[:, 0, 0] = rng.integers(0, model.experts, tokens)
    for layer in range(1, ids.shape[1]):
        follower = np.random.default_rng(1000 + layer).permutation(model.experts)
        stays = rng.random(tokens) < loyalty
        ids[:, layer, 0] = np.where(stays, follower[ids[:, layer - 1, 0]], rng.integers(0, model.experts, tokens))
    return ids


def placed(model: ModelSpec, devices: int, *, turns: bool = False) -> Placement:
    """Experts in order of their ids, as many on every device; with `turns`, one to each device in turn."""
    order = np.arange(model.experts)
    if turns:
        order = order.reshape(-1, devices).T.ravel()
    rows = np.tile(order.astype(np.int32), (len(model.moe_layers), 1))
    return Placement(slots_LP=rows, slots_G=slots_per_device(model.experts, devices), experts=model.experts, layers=model.moe_layers)


def plan_of(model: ModelSpec, placement: Placement | int) -> Plan:
    """A plan of a placement, or of experts in order on some devices."""
    where = placed(model, placement) if isinstance(placement, int) else placement
    return Plan(name="case", model=model.name, model_digest=model.digest, placement=where)


def with_messages(cost: CostModel, message_s: float) -> CostModel:
    """The cost model whose ports charge `message_s` for every message, which is what fewer hops save."""
    nic = cost.ports.nic
    if nic is None or not isinstance(nic, LinearPort):
        return cost
    return replace(cost, ports=replace(cost.ports, nic=replace(nic, message_s=message_s)))


def proportional(cost: CostModel) -> CostModel:
    """The cost model with experts whose time is proportional to their tokens and width: no launch, no tiles, no memory limit."""
    free: dict[str, Any] = dict.fromkeys(("launch_s", "token_s", "tile_overhead", "wave_tail", "reread"), 0.0)
    kernel = ExpertKernel(name="linear", style="fused", dtype="bf16", tile_rows=(1,), activation_efficiency=1e9, **free)
    return replace(cost, kernels=dict.fromkeys(cost.kernels, kernel), peaks={name: replace(p, memory_Bps=1e18) for name, p in cost.peaks.items()})


class Bench:
    """Writes routing to traces in a folder of its own, which goes away at the end, and runs systems on them."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="moesim-study-")
        self._made = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def trace(self, model: ModelSpec, ids_TLK: NDArray[np.integer]) -> Trace:
        """A trace of this routing."""
        self._made += 1
        path = Path(self._folder.name) / str(self._made)
        with TraceWriter(path, model, top_k=ids_TLK.shape[2], weights=False) as writer:
            writer.append(ids_TLK.astype(np.uint16))
        return load_trace(path)

    def run(
        self,
        trace: Trace,
        cluster: Cluster,
        *,
        system: System | str = "plain",
        placement: Placement | None = None,
        cost: CostModel | None = None,
        **options: Any,
    ) -> EventResult:
        """One run of the event engine over NCCL, with experts in order unless a placement is given."""
        model = trace.model
        plan = plan_of(model, placement or cluster.size)
        chosen = SYSTEMS[system] if isinstance(system, str) else system
        return simulate_event(trace, plan, cluster, system=chosen, cost=cost or CostModel.of(cluster, model, transport="nccl"), **options)


def step_gain(plain: EventResult, other: EventResult, *, first: int = 0) -> float:
    """Time of all steps from `first` on, of one over the other."""
    return float(plain.step_s_S[first:].sum() / other.step_s_S[first:].sum())


def layer_gain(plain: EventResult, other: EventResult) -> float:
    """Time of all MoE layers, of one over the other."""
    return float(plain.layer_s_SL.sum() / other.layer_s_SL.sum())


def exchange_share(event: EventResult) -> float:
    """Share of the steps in all-to-alls, of a system that hides none."""
    return float((event.dispatch_s_SL + event.combine_s_SL).sum() / event.step_s_S.sum())


def slowed_to(bench: Bench, trace: Trace, share: float, *, nodes: int, local: int, **options: Any) -> Cluster:
    """A100 nodes with the NIC that makes plain steps spend this share in all-to-alls, by bisection.

    Raises InputError where no NIC between 1 MB/s and 1 TB/s does.
    """
    low_Bps, high_Bps = 1e6, 1e12
    for _ in range(30):
        middle_Bps = float(np.sqrt(low_Bps * high_Bps))
        cluster = cluster_of("a100-80", nodes, local, nic_Bps=middle_Bps)
        found = exchange_share(bench.run(trace, cluster, **options))
        low_Bps, high_Bps = (middle_Bps, high_Bps) if found > share else (low_Bps, middle_Bps)
    if abs(found - share) > 1e-3:
        raise InputError(f"no NIC makes all-to-alls {share:.1%} of a step; the nearest gives {found:.1%}: change the case's tokens or sizes")
    return cluster
