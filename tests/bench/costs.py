"""Cost and simulation at the size of DeepSeek-V3 on 64 devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.cost import CostModel, route
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.plan import Placement, slots_per_device
from tests.bench.registry import Measured, bench, best_of

MODEL = load_model("deepseek-v3")


def placement() -> Placement:
    """Linear on 64 devices."""
    slots = np.tile(np.arange(MODEL.experts), (len(MODEL.moe_layers), 1))
    return Placement(slots_LP=slots, slots_G=slots_per_device(MODEL.experts, 64), experts=MODEL.experts, layers=MODEL.moe_layers)


def routing(tokens: int) -> np.ndarray:
    """Top-8 of 256, without repeats inside a token."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (tokens, len(MODEL.moe_layers), 1))
    steps = rng.integers(1, 32, (tokens, len(MODEL.moe_layers), 7)).cumsum(axis=2)
    return (np.concatenate([first, first + steps], axis=2) % 256).astype(np.uint16)


@bench
def lockstep_route() -> Measured:
    """Routed tokens per second (a token = its 58 layers x 8 selections) into loads and traffic, against numpy.bincount of the loads alone."""
    ids, where = routing(16_384), placement()
    nodes = np.arange(64) // 8
    seconds = best_of(lambda: route(ids, where, nodes))
    layers = len(MODEL.moe_layers)
    offset = np.arange(layers)[:, None] * MODEL.experts
    peer = best_of(lambda: np.bincount((ids + offset).ravel(), minlength=layers * MODEL.experts), repeats=2)
    return Measured(value=len(ids) / seconds, unit="tokens/s", peer="numpy.bincount, loads only", peer_value=len(ids) / peer)


@bench
def cost_of_a_step() -> Measured:
    """Seconds to cost one step of 58 layers on 8 nodes x 8 devices from its traffic."""
    base = load_cluster("h100-4x8")
    cluster = replace(base, devices=base.devices * 2, node_G=np.arange(64) // 8, intra_G=base.intra_G * 2)
    where = placement()
    traffic = route(routing(4096), where, cluster.node_G, tokens_per_step=64 * 4096)
    cost = CostModel.of(cluster, MODEL)
    return Measured(value=best_of(lambda: cost.layer_times(traffic, where)), unit="s")
