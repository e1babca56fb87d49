"""Cases the tests of systems share: clusters of a kind, planted routing, traces in a folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.hardware import Cluster, load_device
from moesim.hardware.profile import load_links
from moesim.model import ModelSpec
from moesim.plan import Placement, Plan, slots_per_device
from moesim.trace import Trace, TraceWriter, load_trace

Writer = Callable[[ModelSpec, NDArray[np.integer]], Trace]


def writer_in(folder: Path) -> Writer:
    """Writes routing to new traces in a folder."""
    numbers = itertools.count()

    def write(model: ModelSpec, ids_TLK: NDArray[np.integer]) -> Trace:
        path = folder / f"trace{next(numbers)}"
        with TraceWriter(path, model, top_k=ids_TLK.shape[2], weights=False) as writer:
            writer.append(ids_TLK.astype(np.uint16))
        return load_trace(path)

    return write


def plan_of(model: ModelSpec, placement: Placement | int) -> Plan:
    """A plan of a placement, or of experts in order on some devices."""
    if isinstance(placement, int):
        rows = np.tile(np.arange(model.experts), (len(model.moe_layers), 1))
        placement = Placement(slots_LP=rows, slots_G=slots_per_device(model.experts, placement), experts=model.experts, layers=model.moe_layers)
    return Plan(name="p", model=model.name, model_digest=model.digest, placement=placement)


def cluster_of(device: str, nodes: int, local: int, *, nic_Bps: float = 12.5e9, link: str = "nvlink3") -> Cluster:
    """Equal nodes of uncalibrated devices, whose links are latency + bytes/bandwidth."""
    links = load_links()
    one = replace(load_device(device), kernels=(), collectives=())
    return Cluster(
        name="case",
        title="case",
        devices=(one,) * (nodes * local),
        node_G=np.repeat(np.arange(nodes), local).astype(np.int32),
        intra_G=(replace(links[link], name="wire"),) * (nodes * local),
        network=replace(links["ib-hdr"], name="net", bandwidth_Bps=nic_Bps) if nodes > 1 else None,
    )


def zipf_ids(tokens: int, layers: int, experts: int, skew: float, *, seed: int = 0) -> NDArray[np.int64]:
    """One expert per token, popularity 1/rank^skew, in another order in every layer."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, experts + 1) ** skew
    ends = np.cumsum(share / share.sum())
    columns = [
        np.random.default_rng(layer).permutation(experts)[np.minimum(np.searchsorted(ends, rng.random(tokens)), experts - 1)]
        for layer in range(layers)
    ]
    return np.stack(columns, axis=1)[:, :, None]


def even_ids(steps: int, devices: int, per_device: int, layers: int, experts: int) -> NDArray[np.int64]:
    """Every device sends as many tokens to every expert, in every step: load and traffic are exactly even."""
    assert per_device % experts == 0
    return np.tile(np.arange(experts), steps * devices * per_device // experts)[:, None, None].repeat(layers, axis=1)


def chain_ids(tokens: int, layers: int, experts: int, loyalty: float, *, seed: int = 0) -> NDArray[np.int64]:
    """One expert per token; a share `loyalty` of the tokens goes on to the one follower of its last expert."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, layers, 1), np.int64)
    ids[:, 0, 0] = rng.integers(0, experts, tokens)
    for layer in range(1, layers):
        follower = np.random.default_rng(1000 + layer).permutation(experts)
        stays = rng.random(tokens) < loyalty
        ids[:, layer, 0] = np.where(stays, follower[ids[:, layer - 1, 0]], rng.integers(0, experts, tokens))
    return ids
