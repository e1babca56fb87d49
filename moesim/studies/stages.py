"""FSMoE's headline on linear stage models of a grid of layers, and its second tier in the engine.

Suffixes: N layers, R pipeline degrees.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.studies.cases import Bench, cluster_of, layer_gain, model_of, zipf_ids
from moesim.studies.claims import Section, band, structure, times
from moesim.systems import SYSTEMS, Exchange, Schedule
from moesim.systems.pipelining import MOST_PARTS, LinearStage, Stage, best_degree, pipeline_span


def best_of(grid: list[list[LinearStage]], gaps_s_N: NDArray[np.float64] | float = 0.0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Degree and span of each layer by exhaustive search over all degrees; the lowest of equals.

    `gaps_s_N` seconds more go over the network wherever it is idle, so that a layer ends no earlier than all that goes over it.
    """
    spans_RN = np.stack([np.maximum(spans_of(grid, r), network_s(grid, r) + gaps_s_N) for r in range(1, MOST_PARTS + 1)])
    return spans_RN.argmin(axis=0) + 1, spans_RN.min(axis=0)


def network_s(grid: list[list[LinearStage]], parts: int) -> NDArray[np.float64]:
    """Seconds the network between nodes works for every layer at one degree."""
    return np.asarray([sum(stage.alpha_s * parts + stage.beta_s for stage in stages if stage.stream == "inter") for stages in grid])


def spans_of(grid: list[list[LinearStage]], parts: int) -> NDArray[np.float64]:
    """Span of every layer at one degree."""
    stages = []
    for same in zip(*grid, strict=True):
        time_N = np.asarray([stage.alpha_s + stage.beta_s / parts for stage in same])
        stages.append(Stage(stream=same[0].stream, time_s=time_N[:, None] if same[0].stream == "compute" else time_N))
    return pipeline_span(stages, parts)


_SHAPES = tuple(itertools.product((2, 4, 8), (512, 1024, 2048), (1024, 2048, 4096), (2, 3, 4), (1, 2)))


def stage_grid(nic_Bps: float, link_Bps: float, flops: float, alpha_s: float) -> tuple[list[list[LinearStage]], ...]:
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


def gain_of(*facts: float) -> tuple[float, float, float]:
    """Mean gain of three stages with two degrees over two stages with one, and the share of layers whose degrees differ: without
    gradients, and with those of attention's four matrices reduced in the gaps of the backward pass, a quarter by each GPU of a node."""
    forward, backward, *two = stage_grid(*facts)
    (there_N, there_s_N), (back_N, back_s_N) = best_of(forward), best_of(backward)
    single_s_RN = np.stack([spans_of(two[0], r) + spans_of(two[1], r) for r in range(1, MOST_PARTS + 1)])
    gradients_s_N = np.asarray([2 * 4 * hidden**2 * 2 / 4 * 7 / 8 / facts[0] for _, _, hidden, _, _ in _SHAPES])
    busy_N, _ = best_of(backward, gradients_s_N)
    return float((single_s_RN.min(axis=0) / (there_s_N + back_s_N)).mean()), float((there_N != back_N).mean()), float((there_N != busy_N).mean())


def fsmoe_study(bench: Bench) -> Section:
    """Three-stage pipelines on a grid of layers by linear stage models, and its second tier in the engine."""
    facts = (12.5e9 / 4, 6e9, 40e12, 1e-4)
    mean, bare, _ = gain_of(*facts)
    exact = all([best_degree(stages) for stages in grid] == best_of(grid)[0].tolist() for grid in stage_grid(*facts)[:2])
    changed = [[value * (factor if i == j else 1) for j, value in enumerate(facts)] for i in range(len(facts)) for factor in (0.5, 2.0)]
    means, _, shares = zip(*(gain_of(*values) for values in changed), strict=True)
    near = {part_us: gain_of(*facts[:3], part_us * 1e-6)[::2] for part_us in (80, 90, 100, 110)}
    inside = all(1.18 <= gain <= 1.22 for gain, _ in near.values())
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
            band(
                "layers that want other degrees backward, at that gain",
                "63 %",
                " / ".join(f"{found:.0%}" for _, found in near.values()) + " at 80 / 90 / 100 / 110 us a part",
                inside and min(found for _, found in near.values()) <= 0.63 <= max(found for _, found in near.values()),
            ),
        ],
        conditions=f"a second tier. Halving or doubling one assumed figure moves the mean over "
        f"{times(min(means))}-"
        f"{times(max(means))} and the share over {min(shares):.0%}-{max(shares):.0%}. Without gradients in the gaps it is {bare:.0%}. 63 % lies "
        "between 80 and 90 us a part, where the mean is within the published one: the size is reachable, and not explained, since their "
        "stage models are not public.",
        differs="the shapes of the 1,458 layers and the measured stage models are not public here; gaps are taken to be filled without loss. "
        "Gradients are left out of the mean gain, on both sides. Gains on whole models were not simulated.",
    )
