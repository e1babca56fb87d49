"""Routing with planted structure, and problems made of it: what the suites and a stranger's tests run on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.hardware import Cluster, load_cluster
from moesim.model import ModelSpec
from moesim.optimize import Problem
from moesim.plan import slots_per_device
from moesim.trace import TraceStats


def clustered_routing(model: ModelSpec, tokens: int, *, clusters: int = 4, loyalty: float = 0.8, seed: int = 0) -> NDArray[np.uint16]:
    """experts_TLK of tokens that mostly choose experts of one hidden cluster per layer: there is locality to find, and skew."""
    rng = np.random.default_rng(seed)
    layers, experts, width = len(model.moe_layers), model.experts, model.top_k
    structure = np.random.default_rng(1234)
    group_LE = np.stack([structure.permutation(np.arange(experts) % clusters) for _ in range(layers)])
    topic_T = rng.choice(clusters, tokens, p=np.arange(1, clusters + 1) / (clusters * (clusters + 1) / 2))
    chosen = np.empty((tokens, layers, width), np.uint16)
    for layer in range(layers):
        score = rng.random((tokens, experts)) - loyalty * (group_LE[layer][None] == topic_T[:, None])
        chosen[:, layer] = np.argsort(score, axis=1)[:, :width]
    return chosen


def problem_of(
    experts_TLK: NDArray[np.uint16], model: ModelSpec, cluster: Cluster | str = "h100x8", *, slots: int | None = None, tokens_per_device: int = 4096
) -> Problem:
    """A placement problem from tokens in memory."""
    where = load_cluster(cluster) if isinstance(cluster, str) else cluster
    return Problem(
        model=model,
        cluster=where,
        cost=CostModel.of(where, model),
        stats=TraceStats.from_experts(experts_TLK, model),
        experts_TLK=experts_TLK,
        slots_G=slots_per_device(model.experts if slots is None else slots, where.size),
        tokens_per_device=tokens_per_device,
    )


MODEL = ModelSpec(name="conformance", layers=3, moe_layers=(0, 1, 2), hidden=2048, intermediate=1408, experts=16, top_k=4)
