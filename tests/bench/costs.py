"""Cost and simulation at the size of DeepSeek-V3 on 64 devices."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.cost import CostModel, route
from moesim.cost.statistics import score_statistics
from moesim.hardware import Cluster, load_cluster
from moesim.model import load_model
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim import simulate
from moesim.trace import TraceStats, TraceWriter, load_trace
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


def cluster() -> Cluster:
    """8 nodes x 8 devices."""
    base = load_cluster("h100-4x8")
    return replace(base, devices=base.devices * 2, node_G=np.arange(64) // 8, intra_G=base.intra_G * 2, host_G=())


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
    where = placement()
    traffic = route(routing(4096), where, cluster().node_G, tokens_per_step=64 * 4096)
    cost = CostModel.of(cluster(), MODEL)
    return Measured(value=best_of(lambda: cost.layer_times(traffic, where)), unit="s")


@bench
def lockstep_simulate() -> Measured:
    """Tokens per second from Parquet to times, 1,024 tokens a device and step, against reading the ids alone."""
    where, on = placement(), cluster()
    plan = Plan(name="linear", model=MODEL.name, model_digest=MODEL.digest, placement=where)
    cost = CostModel.of(on, MODEL)
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(Path(folder) / "t", MODEL, weights=False) as writer:
            for _ in range(4):
                writer.append(routing(65_536))
        trace = load_trace(Path(folder) / "t")
        tokens = trace.tokens
        seconds = best_of(lambda: simulate(trace, plan, on, cost=cost, tokens_per_device=1024), repeats=3)
        peer = best_of(lambda: sum(len(batch) for batch in trace.batches()), repeats=3)
    return Measured(value=tokens / seconds, unit="tokens/s", peer="reading the trace", peer_value=tokens / peer)


@bench
def score_from_statistics() -> Measured:
    """Seconds to score a random placement from statistics, against routing 16,384 tokens and costing them."""
    ids, on = routing(16_384), cluster()
    stats = sum((TraceStats.from_experts(ids[i : i + 4096], MODEL) for i in range(0, len(ids), 4096)), TraceStats.empty(MODEL))
    cost, rng = CostModel.of(on, MODEL), np.random.default_rng(0)
    slots = np.stack([rng.permutation(MODEL.experts) for _ in MODEL.moe_layers])
    where = Placement(slots_LP=slots, slots_G=slots_per_device(MODEL.experts, 64), experts=MODEL.experts, layers=MODEL.moe_layers)
    seconds = best_of(lambda: score_statistics(stats, where, cost), repeats=30)
    peer = best_of(lambda: cost.layer_times(route(ids, where, on.node_G, tokens_per_step=64 * 4096), where), repeats=3)
    return Measured(value=seconds, unit="s", peer="routing 16,384 tokens", peer_value=peer)


@bench
def evaluate_a_kernel_table() -> Measured:
    """Rows per second of predicting a fused-MoE table whose token counts must be drawn."""
    import pandas as pd

    from moesim.calibrate.kernel_tables import check_table, sample_counts
    from moesim.calibrate.kernels import predict_kernel
    from moesim.cost.experts import ExpertKernel
    from moesim.cost.fitted import device_peak
    from moesim.hardware import load_device

    device = load_device("h200")
    kernel = ExpertKernel.from_profile(next(fit for fit in device.kernels if fit.attributes["dtype"] == "bf16"))
    peak, _ = device_peak(device, "bf16")
    base = {"kernel_source": "triton", "moe_dtype": "bfloat16", "hidden_size": 4096, "inter_size": 1536, "topk": 8, "distribution": "power_law_1.2"}
    rows = [base | {"num_tokens": 2**n, "num_experts": experts, "latency_ms": 1.0} for n in range(15) for experts in (64, 128, 256, 384)]
    table = check_table(pd.DataFrame(rows))

    def cold() -> None:
        sample_counts.cache_clear()
        predict_kernel(table, peak, kernel)

    peer = best_of(lambda: predict_kernel(table, peak, kernel))
    return Measured(value=len(table) / best_of(cold), unit="rows/s", peer="counts already drawn", peer_value=len(table) / peer)
