"""Headlines of systems that change what runs beside what, modelled as far as public facts go.

One function per system returns a `Section`. Every verdict is computed from the figures beside it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.hardware import load_cluster, load_links
from moesim.model import load_model
from moesim.plan import Placement
from moesim.sim import simulate
from moesim.sim.dense import dense_times
from moesim.studies.cases import Bench, cluster_of, even_ids, layer_gain, model_of, placed, plan_of, step_gain, with_messages, zipf_ids
from moesim.studies.claims import Section, band, structure, times
from moesim.systems import SYSTEMS, Exchange, Schedule, Sliced, semoe, tutel
from moesim.systems.pipelining import MOST_PARTS, LinearStage, Stage, best_degree, pipeline_span
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
            structure("all-to-all gains nothing on one node", abs(alone - 1) < 1e-9, times(alone)),
            structure("a shared expert beside the dispatch saves the shorter of the two", max(saved) < 1e-6, "at 64, 512 and 8,192 tokens"),
            band("latency over expert parallelism with dense masks", "7.3x", f"{times(gains[best])} at most", gains[best] >= 7.3),
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
            band("one layer on 16 A100 over fairseq's dense masks, up to 16,384 tokens a device", "4.96x", f"{times(usual)} at most", usual >= 4.96),
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


def _best(grid: list[list[LinearStage]], gaps_s_N: NDArray[np.float64] | float = 0.0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Degree and span of each layer by exhaustive search over all degrees; the lowest of equals.

    `gaps_s_N` seconds more go over the network wherever it is idle, so that a layer ends no earlier than all that goes over it.
    """
    spans_RN = np.stack([np.maximum(_spans(grid, r), _network_s(grid, r) + gaps_s_N) for r in range(1, MOST_PARTS + 1)])
    return spans_RN.argmin(axis=0) + 1, spans_RN.min(axis=0)


def _network_s(grid: list[list[LinearStage]], parts: int) -> NDArray[np.float64]:
    """Seconds the network between nodes works for every layer at one degree."""
    return np.asarray([sum(stage.alpha_s * parts + stage.beta_s for stage in stages if stage.stream == "inter") for stages in grid])


def _spans(grid: list[list[LinearStage]], parts: int) -> NDArray[np.float64]:
    """Span of every layer at one degree."""
    stages = []
    for same in zip(*grid, strict=True):
        time_N = np.asarray([stage.alpha_s + stage.beta_s / parts for stage in same])
        stages.append(Stage(stream=same[0].stream, time_s=time_N[:, None] if same[0].stream == "compute" else time_N))
    return pipeline_span(stages, parts)


_SHAPES = tuple(itertools.product((2, 4, 8), (512, 1024, 2048), (1024, 2048, 4096), (2, 3, 4), (1, 2)))


def _fsmoe_grid(nic_Bps: float, link_Bps: float, flops: float, alpha_s: float) -> tuple[list[list[LinearStage]], ...]:
    """Stages of 162 layers: three-stage forward and backward, two-stage forward and backward."""
    found: tuple[list[list[LinearStage]], ...] = ([], [], [], [])
    for batch, length, hidden, ratio, k in _SHAPES:
        selections = batch * length * k * 1.2
        inter_s, intra_s = selections * hidden * 2 * 7 / 8 / nic_Bps, selections * hidden * 2 * 3 / 4 / link_Bps
        inter = LinearStage(stream="inter", alpha_s=alpha_s, beta_s=inter_s)
        intra = LinearStage(stream="intra", alpha_s=alpha_s, beta_s=intra_s)
        both = LinearStage(stream="exchange", alpha_s=2 * alpha_s, beta_s=inter_s + intra_s)
        for backward in (False, True):
            experts = LinearStage(stream="compute", alpha_s=alpha_s, beta_s=(1 + backward) * 4 * selections * hidden**2 * ratio / flops)
            found[backward].append([inter, intra, experts, intra, inter])
            found[2 + backward].append([both, experts, both])
    return found


def _fsmoe_gain(*facts: float) -> tuple[float, float, float]:
    """Mean gain of three stages with two degrees over two stages with one, and the share of layers whose degrees differ: without
    gradients, and with those of attention's four matrices reduced in the gaps of the backward pass, a quarter by each GPU of a node."""
    forward, backward, *two = _fsmoe_grid(*facts)
    (there_N, there_s_N), (back_N, back_s_N) = _best(forward), _best(backward)
    single_s_RN = np.stack([_spans(two[0], r) + _spans(two[1], r) for r in range(1, MOST_PARTS + 1)])
    gradients_s_N = np.asarray([2 * 4 * hidden**2 * 2 / 4 * 7 / 8 / facts[0] for _, _, hidden, _, _ in _SHAPES])
    busy_N, _ = _best(backward, gradients_s_N)
    return float((single_s_RN.min(axis=0) / (there_s_N + back_s_N)).mean()), float((there_N != back_N).mean()), float((there_N != busy_N).mean())


def fsmoe_study(bench: Bench) -> Section:
    """Three-stage pipelines on a grid of layers by linear stage models, and its second tier in the engine."""
    facts = (12.5e9 / 4, 6e9, 40e12, 1e-4)
    mean, bare, share = _fsmoe_gain(*facts)
    exact = all([best_degree(stages) for stages in grid] == _best(grid)[0].tolist() for grid in _fsmoe_grid(*facts)[:2])
    changed = [[value * (factor if i == j else 1) for j, value in enumerate(facts)] for i in range(len(facts)) for factor in (0.5, 2.0)]
    means, _, shares = zip(*(_fsmoe_gain(*values) for values in changed), strict=True)
    model = model_of(intermediate=512)
    trace = bench.trace(model, zipf_ids(16 * 512, model, 0.2))
    degrees = (1, 2, 3, 4, 6, 8)
    two = replace(SYSTEMS["tutel"], exchange=Exchange(transports=("hierarchical",)), schedule=Schedule(forward=degrees, backward=degrees))
    three = replace(SYSTEMS["fsmoe"], schedule=replace(SYSTEMS["fsmoe"].schedule, gradients_in_gaps=False))
    tiers = {}
    for nodes, local in ((2, 8), (1, 16)):
        cluster = cluster_of("a100-80", nodes, local, link="pcie4-x16")
        tiers[nodes] = layer_gain(*(bench.run(trace, cluster, system=s, tokens_per_device=8192, mode="training") for s in (two, three)))
    return Section(
        name="fsmoe",
        published="1,458 MoE layers on two GPU clusters, against DeepSpeed-MoE and Tutel; 912 of the layers (63 %) want different degrees "
        "forward and backward; "
        "1.19-3.01x on models.",
        modelled="162 layers (batch 2-8, length 512-2,048, hidden 1,024-4,096, width 2-4 times it, top-1 and top-2) on 8 nodes of 4 GPUs by "
        "linear stage models: one "
        "100 Gbit/s NIC per node, 6 GB/s between PCIe cards, 40 TFLOP/s, 100 us per part (all assumed). Two-stage pipelines with one degree "
        "against "
        "three-stage ones with two, both at their best; degrees backward with the gradients of attention reduced in the gaps (four bf16 "
        "matrices of hidden x hidden). In the engine: 2 x 8 and 1 x 16 A100 on PCIe 4.",
        claims=[
            structure("the optimiser's degree is that of an exhaustive search", exact, "on all 162 layers, both passes"),
            structure("no gain without a second tier", abs(tiers[1] - 1) < 1e-9, f"{times(tiers[1])} on one node ({times(tiers[2])} on two)"),
            band("mean gain over the layers", "1.18-1.22x", times(mean), 1.18 <= mean <= 1.22),
            band("layers that want other degrees backward", "63 %", f"{share:.0%}", 0.58 <= share <= 0.68),
        ],
        conditions=f"a second tier. Halving or doubling one assumed figure moves the mean over "
        f"{times(min(means))}-"
        f"{times(max(means))} and the share over {min(shares):.0%}-{max(shares):.0%}. Without gradients in the gaps it is {bare:.0%}.",
        differs="the shapes of the 1,458 layers and the measured stage models are not public here; gaps are taken to be filled without loss. "
        "Gradients are left out of the mean gain, on both sides. Gains on whole models were not simulated.",
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
            band("step cut by hierarchical all-to-all", "-10.3 %", f"{-hops[best]:+.1%} at most", hops[best] >= 0.103),
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
