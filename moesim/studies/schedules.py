"""Headlines of systems that change what runs beside what, modelled as far as public facts go.

One function per system returns a `Section`. Every verdict is computed from the figures beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.cost import CostModel
from moesim.errors import TraceError
from moesim.hardware import load_cluster, load_links
from moesim.model import load_model
from moesim.plan import Placement
from moesim.sim import simulate
from moesim.sim.dense import dense_times
from moesim.studies.cases import (
    Bench,
    cluster_of,
    even_ids,
    layer_gain,
    model_of,
    placed,
    plan_of,
    proportional,
    step_gain,
    with_messages,
    zipf_ids,
)
from moesim.studies.claims import Section, band, headline, structure, times
from moesim.systems import SYSTEMS, Exchange, Schedule, Sliced, semoe, tutel
from moesim.testing import clustered_routing


def plain_study(bench: Bench) -> Section:
    """The baseline, against the lockstep engine."""
    model, worst = load_model("deepseek-v2-lite"), 0.0
    trace = bench.trace(model, clustered_routing(model, 1000))
    for name, tokens in itertools.product(("h100x8", "h100-4x8"), (64, 4096)):
        cluster = load_cluster(name)
        placement = placed(model, cluster.size)
        for transport in ("nccl", "hierarchical"):
            cost = CostModel.of(cluster, model, transport=transport)
            event = bench.run(trace, cluster, placement=placement, cost=cost, tokens_per_device=tokens)
            lockstep = simulate(trace, plan_of(model, placement), cluster, tokens_per_device=tokens, cost=cost)
            worst = max(worst, float(np.abs(event.layer_s_SL / lockstep.layer_s_SL - 1).max()))
    return Section(
        name="plain",
        published="none: it is what the others are measured against.",
        modelled="DeepSeek-V2-Lite with clustered routing on h100x8 and h100-4x8, 64 and 4,096 tokens per device, NCCL direct and hierarchical.",
        claims=[
            structure(
                "layer times equal those of the lockstep engine",
                worst < 1e-9,
                f"largest relative difference {'below 1e-9' if worst < 1e-9 else f'{worst:.1e}'}",
            )
        ],
        conditions="no contention, no overlap.",
        differs="nothing known.",
    )


def _pyramid(bench: Bench) -> tuple[bool, str]:
    """Whether a first layer of 8 experts under one of 32 is accepted by trace, placement, memory and engine, each as 8 and 32."""
    model, narrow, cluster = model_of(pyramid=(8, 32)), model_of(experts=8), cluster_of("a100-80", 2, 4)
    ids = zipf_ids(4096, narrow, 0.5)
    try:
        bench.trace(model, ids + 8)
        refused = False
    except TraceError:
        refused = True
    both = np.concatenate([ids[:, :1], zipf_ids(4096, model_of(), 0.5)[:, 1:]], axis=1)
    where = placed(model, 8, turns=True)
    cost, alone = (proportional(CostModel.of(cluster, each, transport="nccl")) for each in (model, narrow))
    wide = bench.run(bench.trace(model, both), cluster, placement=where, cost=cost, tokens_per_device=256)
    eight = bench.run(bench.trace(narrow, ids), cluster, cost=alone, tokens_per_device=256)
    held_B = float(cost.memory(where, tokens_per_device=256).experts_B_G.sum())
    same = bool(np.allclose(wide.layer_s_SL[:, 0], eight.layer_s_SL[:, 0], rtol=1e-9))
    return refused and same and held_B == 40 * model.expert_B, f"{held_B / model.expert_B:g} experts in memory for two layers of 8 and 32"


def deepspeed_moe_study(bench: Bench) -> Section:
    """Hierarchical all-to-all and the shared expert beside the dispatch, on 128 devices."""
    model = model_of(experts=128, intermediate=8192, shared_intermediate=8192)
    trace = bench.trace(model, zipf_ids(128 * 16, model, 0.3))
    gains, indexed = {}, []  # over masks, as the MoE layer of DeepSpeed's training has them, and over tokens gathered by index
    for nodes, message_us, tokens in itertools.product((1, 4, 16), (0, 5, 20), (1, 16, 256)):
        cluster = cluster_of("a100-80", nodes, 128 // nodes)
        cost = with_messages(CostModel.of(cluster, model, transport="nccl"), message_us * 1e-6)
        run: dict[str, Any] = {"cost": cost, "tokens_per_device": tokens, "mode": "decode"}
        base, deep = (bench.run(trace, cluster, system=system, **run) for system in (tutel.FAIRSEQ, "deepspeed-moe"))
        gains[nodes, message_us, tokens] = step_gain(base, deep)
        indexed.append(step_gain(bench.run(trace, cluster, **run), deep))
    lone = replace(model, shared_intermediate=0)
    island, one = cluster_of("a100-80", 1, 8), bench.trace(lone, zipf_ids(128 * 16, lone, 0.3))
    alone = layer_gain(*(bench.run(one, island, system=name, tokens_per_device=64) for name in ("plain", "deepspeed-moe")))
    hops = {}
    for nodes in (16, 4, 1):
        cluster = cluster_of("a100-80", nodes, 128 // nodes)
        run = {"cost": with_messages(CostModel.of(cluster, lone, transport="nccl"), 20e-6), "tokens_per_device": 16, "mode": "decode"}
        hops[nodes] = step_gain(*(bench.run(one, cluster, system=name, **run) for name in ("plain", "deepspeed-moe")))
    pyramid, held = _pyramid(bench)
    pair = cluster_of("a100-80", 2, 4)
    cost, saved = CostModel.of(pair, model, transport="nccl"), []
    for tokens in (64, 512, 8192):
        kinds = [replace(SYSTEMS["plain"], schedule=Schedule(shared_beside=beside)) for beside in (False, True)]
        before, beside = (bench.run(trace, pair, system=system, cost=cost, tokens_per_device=tokens) for system in kinds)
        shared_s = dense_times(cost, tokens=tokens, context=4096, mode="prefill").shared_G.max()
        least_s = np.minimum(shared_s, beside.dispatch_s_SL).sum()
        saved.append(abs(float((before.step_s_S.sum() - beside.step_s_S.sum()) / least_s) - 1))
    half = replace(model, experts=64)
    few, rows, sliced = bench.trace(half, zipf_ids(128 * 16, half, 0.3)), np.tile(np.arange(128, dtype=np.int32) % 64, (2, 1)), []
    twice = Placement(slots_LP=rows, slots_G=np.ones(128, np.int32), experts=64, layers=half.moe_layers)
    once = replace(twice, slots_LP=np.sort(rows[:, :64]), slots_G=np.tile([1, 0], 64).astype(np.int32))
    for message_us, tokens in itertools.product((0, 20), (1, 16, 256)):
        cluster = cluster_of("a100-80", 4, 32)
        run = {"cost": with_messages(CostModel.of(cluster, half, transport="nccl"), message_us * 1e-6), "tokens_per_device": tokens, "mode": "decode"}
        pairs = replace(SYSTEMS["deepspeed-moe"], routing=Sliced(slices=2))
        replicated = bench.run(few, cluster, system="deepspeed-moe", placement=twice, **run)
        sliced.append(step_gain(replicated, bench.run(few, cluster, system=pairs, placement=once, **run)))
    best = max(gains, key=lambda case: gains[case])
    usual = max(gain for (_, message_us, _), gain in gains.items() if message_us <= 5)
    free = max(gain for (_, message_us, _), gain in gains.items() if message_us == 0)
    return Section(
        name="deepspeed-moe",
        published="MoE inference against the best MoE inference before it; the abstract gives neither machine nor model (GPT-like models on "
        "up to 256 A100 "
        "are remembered, not checked).",
        modelled="decode of 2 MoE layers (128 plain experts and one shared, hidden 2,048, width 8,192, top-1) on 128 A100 in 1, 4 or 16 "
        "nodes with HDR, 1, 16 "
        "or 256 tokens per device, 0, 5 or 20 us per message between nodes (assumed).",
        claims=[
            structure("experts per layer may differ, in trace, placement, memory and time", pyramid, held),
            structure("all-to-all gains nothing on one node", abs(alone - 1) < 1e-9, times(alone)),
            structure("a shared expert beside the dispatch saves the shorter of the two", max(saved) < 1e-6, "at 64, 512 and 8,192 tokens"),
            band(
                "latency gains by fewer hops, so about 1 on one node: 128 GPUs in 16, 4 and 1 nodes",
                "gain, gain, about 1",
                times(*hops.values()),
                min(hops[16], hops[4]) > 1.2 and abs(hops[1] - 1) < 0.01,
            ),
            headline("latency over expert parallelism with dense masks", "7.3x", f"{times(gains[best])} at most", gains[best] >= 7.3),
        ],
        conditions=f"messages must cost: at most {times(free)} when they are free, {times(usual)} at 5 us; the best case is {best[0]} "
        f"nodes, {best[1]} us and "
        f"{best[2]} tokens per device. Over a baseline that gathers tokens by index it is "
        f"{times(max(indexed))} at most. With half as many experts as GPUs, expert slicing over pairs instead of two replicas changes a step by "
        f"{times(min(sliced))} to {times(max(sliced))} (4 nodes).",
        differs="of the published system the hierarchical all-to-all, the hidden shared expert, expert slicing and dispatch by index are "
        "modelled; its other kernels "
        "and the parallelism of dense parts are not (remembered, not checked). Model size /3.7 is a property of the model, not of the system.",
    )


def tutel_study(bench: Bench) -> Section:
    """Adaptive pipelining of one layer on 16 A100."""
    cluster, worst, even = cluster_of("a100-80", 2, 8), 0.0, 0.0
    gains, whole = {}, {}  # over plain, and over fairseq
    for width, tokens in itertools.product((1024, 4096), (64, 1024, 4096, 16384, 65536)):
        model = model_of(layers=1, intermediate=width)
        trace = bench.trace(model, even_ids(512, model))
        base, masks, adaptive = (bench.run(trace, cluster, system=s, tokens_per_device=tokens) for s in ("plain", tutel.FAIRSEQ, "tutel"))
        gains[width, tokens], whole[width, tokens] = layer_gain(base, adaptive), layer_gain(masks, adaptive)
        if tokens in (1024, 16384):
            choices = itertools.product(tutel.TRANSPORTS, tutel.DEGREES)
            fixed = [bench.run(trace, cluster, system=tutel.fixed(*choice), tokens_per_device=tokens).layer_s_SL for choice in choices]
            worst = max(worst, float((adaptive.layer_s_SL / np.min(fixed, axis=0)).max()))
            best_static = min(float(one.sum()) for one in fixed)
            even = max(even, abs(float(adaptive.layer_s_SL.sum()) / best_static - 1))
    best = max(gains, key=lambda case: gains[case])
    usual = max(gain for (_, tokens), gain in whole.items() if tokens <= 16384)
    over_masks = "; ".join(f"{tokens:,} tokens {times(whole[1024, tokens], whole[4096, tokens])}" for tokens in (64, 1024, 4096, 16384))
    return Section(
        name="tutel",
        published="one MoE layer on 16 A100 (4.96x) and on 2,048 A100 (5.75x), against Fairseq; SwinV2-MoE 1.55x training, 2.11x inference.",
        modelled="one MoE layer (32 plain experts, hidden 2,048, width 1,024 or 4,096, top-1, even load) on 2 x 8 A100 with NVLink 3 and "
        "HDR, 64 to 65,536 tokens "
        "per device; sizes are assumed. Degrees 1, 2, 4, 8; NCCL direct or hierarchical.",
        claims=[
            structure("never slower than any fixed choice, in any step", worst <= 1 + 1e-9, "in all cases tried"),
            structure("equals the best fixed choice under constant load", even < 1e-9, "in all cases tried"),
            headline("one layer on 16 A100 over fairseq's masks, up to 16,384 tokens a device", "4.96x", f"{times(usual)} at most", usual >= 4.96),
            structure("overlap and transport alone never double a layer", gains[best] < 2, f"{times(gains[best])} at most over plain"),
        ],
        conditions=f"overlap alone cannot double a layer: its cap is (all-to-alls + experts) / the longer of the two. {times(gains[best])} "
        f"is at width {best[0]:,} and "
        f"{best[1]:,} tokens per device, {times(gains[best[0], 64])} at 64 tokens. What is above it comes from fairseq's masks, whose products "
        f"grow with the square of the tokens: at width 1,024 / 4,096 {over_masks}.",
        differs="their tokens, widths and capacity factor are not public as far as we know, so the size of the gain is one of a range; masks "
        "here have capacity factor 1 and half precision. Tokens that Tutel gathers by index cost nothing here. The switch between expert and "
        "data parallelism is not modelled. 2,048 devices and SwinV2-MoE were not simulated.",
    )


def se_moe_study(bench: Bench) -> Section:
    """A ring of layers' experts refilled from the host, and hierarchical all-to-all."""
    model = model_of(layers=6, hidden=1024, intermediate=1024, gated=True)
    cluster, link = cluster_of("a100-80", 1, 4), load_links()["pcie4-x16"]
    trace = bench.trace(model, even_ids(16, model))
    copy_s = link.latency_s + 8 * model.expert_B / link.bandwidth_Bps

    def layer_s(tokens: int) -> float:
        return float(bench.run(trace, cluster, tokens_per_device=tokens).step_s_S[0]) / model.layers

    low, high = 128, 1 << 20
    while high - low > 1:  # tokens at which a layer takes as long as its copy
        middle = (low + high) // 2
        low, high = (middle, high) if layer_s(middle) < copy_s else (low, middle)
    ring = semoe.make(layers=4, link="pcie4-x16", hierarchical=False)
    times_s = [float(bench.run(trace, cluster, system=s, tokens_per_device=high).step_s_S.sum()) for s in ("plain", ring)]
    steady, whole = True, bench.trace(model, even_ids(4 * 128 // 32 * 4, model))
    for slots, name in itertools.product((1, 2, 3), ("pcie3-x16", "pcie5-x16")):
        wire = load_links()[name]
        fetch_s = wire.latency_s + 8 * model.expert_B / wire.bandwidth_Bps
        base, event = (
            bench.run(whole, cluster, system=s, tokens_per_device=128) for s in ("plain", semoe.make(layers=slots, link=name, hierarchical=False))
        )
        one_s, experts_s = float(base.step_s_S[0]) / model.layers, float(base.compute_s_SLG[0, 0, 0])
        expected_s = model.layers * max(one_s, fetch_s, (fetch_s + experts_s) / slots)
        steady &= bool(np.isclose(event.step_s_S[-1], expected_s, rtol=1e-6))
    wide = model_of(experts=64, intermediate=8192)
    many, big = cluster_of("a100-80", 8, 8), bench.trace(wide, zipf_ids(64 * 64, wide, 0.3))
    tree = replace(SYSTEMS["plain"], exchange=Exchange(transports=("hierarchical",)))
    hops = {}
    for message_us, tokens in itertools.product((0, 5, 20), (256, 4096)):
        cost = with_messages(CostModel.of(many, wide, transport="nccl"), message_us * 1e-6)
        flat, deep = (bench.run(big, many, system=s, cost=cost, tokens_per_device=tokens, mode="training") for s in ("plain", tree))
        hops[message_us, tokens] = 1 - 1 / step_gain(flat, deep)
    best = max(hops, key=lambda case: hops[case])
    equal = times_s[1] <= times_s[0] * (1 + 1e-9)
    return Section(
        name="se-moe",
        published="+33 % training and +13 % inference throughput over DeepSpeed (104.1 B parameters on 64 A100); hierarchical all-to-all: "
        "communication -15.5 %, step -10.3 %.",
        modelled="inference of 6 MoE layers on 4 A100 with a ring of 1 to 4 layers over PCIe; hierarchical all-to-all in training of 2 MoE "
        "layers (64 plain experts, width 8,192) on "
        "8 x 8 A100 with HDR, 256 or 4,096 tokens per device, 0, 5 or 20 us per message between nodes (assumed).",
        claims=[
            structure("a step in steady state is the closed form of a K-ring", steady, "rings of 1, 2 and 3 layers over PCIe 3 and 5"),
            band(
                "experts' memory saved at equal time, copy as long as a layer",
                ">= 30 %",
                f"{1 - 4 / 6:.0%} with 4 layers of 6" if equal else f"a ring of 4 layers of 6 takes {times(times_s[1] / times_s[0])} the time",
                equal,
            ),
            headline("step cut by hierarchical all-to-all", "-10.3 %", f"{-hops[best]:+.1%} at most", hops[best] >= 0.103),
        ],
        conditions=f"the ring needs copy(layer) <= time(layer), {high:,} tokens per device here. Hierarchical all-to-all pays only where "
        f"messages cost: " + ", ".join(f"{-cut:+.1%} ({us} us, {tokens:,} tokens)" for (us, tokens), cut in hops.items()) + ".",
        differs="+33 % and +13 % over DeepSpeed include its cache of experts over SSDs and its kernels, which are not modelled, so these "
        "figures were not simulated; neither was the "
        "assignment of nodes to tasks by load (+64 %).",
    )


def two_batch_study(bench: Bench) -> Section:
    """Two halves of every step against the whole, and against one half alone, on even routing."""
    model, cluster = model_of(layers=4, experts=32, intermediate=8192), cluster_of("a100-80", 4, 8)
    trace = bench.trace(model, even_ids(32, model))  # one step, that of half the tokens too
    gains, slower, quicker = {}, 0.0, 0.0
    for mode, tokens in (("decode", 64), ("decode", 256), ("prefill", 512), ("prefill", 4096), ("prefill", 16384)):
        run: dict[str, Any] = {"mode": mode, "context": 1024}
        whole, both = (bench.run(trace, cluster, system=name, tokens_per_device=tokens, **run) for name in ("plain", "two-batch"))
        half = bench.run(trace, cluster, tokens_per_device=tokens // 2, **run)  # steps of half the tokens, all alike
        least_s = 2 * float(half.step_s_S[0]) * max(half.stream_use["compute g0"], half.stream_use["exchange"])
        step_s = float(both.step_s_S[0])
        slower, quicker = max(slower, step_s / (2 * float(half.step_s_S[0]))), max(quicker, least_s / step_s)
        gains[mode, tokens] = float(whole.step_s_S[0]) / step_s
    return Section(
        name="two-batch",
        published="none: the report describes the overlap in prefill and gives no figure for what it saves; for decode it was being explored.",
        modelled="four layers of 32 experts (2048 -> 8192), top-1, even routing, 4 nodes of 8 A100 with NCCL and InfiniBand of 25 GB/s; halves are "
        "equal and cost what half of the tokens cost; a step ends for both.",
        claims=[
            structure(
                "never slower than one half after the other",
                slower <= 1 + 1e-9,
                f"at most {slower:.3f} of it",
            ),
            structure(
                "never quicker than the busier of computation and all-to-alls", quicker <= 1 + 1e-9, f"which is at most {quicker:.3f} of a step"
            ),
            structure(
                "gains over one batch where tokens are many, loses where weights are read twice",
                gains["prefill", 16384] > 1 > gains["decode", 64],
                "; ".join(f"{mode} of {tokens:,} tokens {times(gain)}" for (mode, tokens), gain in gains.items()),
                "-",
            ),
        ],
        conditions="all-to-alls long beside computation, and halves large enough not to be bound by reading weights.",
        differs="halves are equal in every layer; compute that the communication kernels take is `Exchange.sm_share`, 0 here.",
    )
