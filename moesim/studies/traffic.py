"""Headlines of systems that change what travels or where it goes, modelled as far as public facts go.

One function per system returns a `Section`. Every verdict is computed from the figures beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.cost import CostModel
from moesim.studies.cases import (
    Bench,
    chain_ids,
    cluster_of,
    even_ids,
    exchange_share,
    layer_gain,
    model_of,
    placed,
    proportional,
    slowed_to,
    step_gain,
    zipf_ids,
)
from moesim.studies.claims import Section, band, headline, structure, times
from moesim.systems import Materialised, bigmac, exflow, hecate, lsh, moepp, ted
from moesim.trace import TraceStats


def exflow_study(bench: Bench) -> Section:
    """Context coherence and affinity placement on planted chains of experts."""
    model, devices = model_of(layers=6, intermediate=1024), 8
    found, cuts, kept = {}, {}, True
    for loyalty in (1.0, 0.67, 0.0):
        learnt, held = (bench.trace(model, chain_ids(20_000, model, loyalty, seed=seed)) for seed in (0, 1))
        affine = exflow.affinity_placement(TraceStats.of(learnt), devices)
        for nic_Bps in (25e9, 12.5e9, 3.125e9, 1e9):
            cluster = cluster_of("a100-80", 2, 4, nic_Bps=nic_Bps)
            deep, still, moved = (
                bench.run(held, cluster, system=name, placement=where, tokens_per_device=2500)
                for name, where in (("deepspeed-moe", None), ("exflow", None), ("exflow", affine))
            )
            found[loyalty, nic_Bps] = step_gain(deep, moved)
        cuts[loyalty] = 1 - float(moved.traffic_B_LGG[1:].sum() / still.traffic_B_LGG[1:].sum())
        before, after = (
            bench.run(learnt, cluster, system="exflow", placement=where, tokens_per_device=2500).traffic_B_LGG[1:].sum(axis=(1, 2))
            for where in (None, affine)
        )
        kept &= bool((after <= before).all())
    usual = bench.run(held, cluster, tokens_per_device=2500)
    gains = ", ".join(f"{times(found[0.67, nic])} at {nic / 1e9:g} GB/s" for nic in (25e9, 12.5e9, 3.125e9, 1e9))
    whole = ", ".join(f"{times(found[1.0, nic])} at {nic / 1e9:g} GB/s" for nic in (25e9, 12.5e9, 3.125e9))
    return Section(
        name="exflow",
        published="GPT MoE models with 8 to 64 experts against DeepSpeed-MoE; up to 67 % less cross-GPU routing latency, up to 2.2x "
        "throughput. The abstract names no machine.",
        modelled="6 MoE layers (32 plain experts, hidden 2,048, width 1,024, top-1), prefill of 2,500 tokens per device on 2 x 4 A100 with "
        "NVLink 3 and HDR. Routing: a share of "
        "the tokens follows its last expert's one follower (1, 0.67 and 0 of them); learnt on one sample, judged on another.",
        claims=[
            structure(
                "all-to-alls of a layer with one expert per token",
                still.exchanges * 2 == usual.exchanges,
                f"{usual.exchanges:.0f} -> {still.exchanges:.0f} in a step",
            ),
            structure("affinity moves no more tokens, in any layer it learnt from", kept, "at every affinity"),
            band("tokens that change GPU, with 67 % planted affinity", "-67 %", f"{-cuts[0.67]:.0%}", abs(cuts[0.67] - 0.67) < 0.02),
            band("the same without affinity", "about 0", f"{abs(cuts[0.0]):.1%} at most", abs(cuts[0.0]) < 0.02),
            headline("throughput over DeepSpeed-MoE, HDR for every GPU", "2.2x", f"{times(found[1.0, 25e9])} at most", found[1.0, 25e9] >= 2.2),
        ],
        conditions=f"affinity and a slow network: with 67 % affinity {gains}; with all tokens loyal {whole}. Without affinity the saved "
        f"combine alone gives "
        f"{times(found[0.0, 25e9])} at 25 GB/s.",
        differs="the routing of their GPT models is not public as far as we know; our placement goes layer by layer, theirs solves all layers as one "
        "integer program. Of their baseline "
        "only the hierarchical all-to-all is modelled.",
    )


def ted_study(bench: Bench) -> Section:
    """Experts cut over 1 to 8 devices, with even and with skewed load."""
    model, cluster, tokens = model_of(intermediate=8192), cluster_of("a100-80", 4, 8), 1024
    across = np.not_equal.outer(cluster.node_G, cluster.node_G)
    even, skewed = bench.trace(model, even_ids(32 * tokens // 32, model)), bench.trace(model, zipf_ids(32 * tokens, model, 0.7))
    crossing, exact, work, gains = {}, True, [], {}
    for trace in (even, skewed):
        base = bench.run(trace, cluster, tokens_per_device=tokens)
        for slices in (1, 2, 4, 8):
            event = bench.run(trace, cluster, system=ted.make(slices=slices), tokens_per_device=tokens)
            gains[trace is even, slices] = layer_gain(base, event)
            crossing[trace is even, slices] = float(event.traffic_B_LGG[:, across].sum() / base.traffic_B_LGG[:, across].sum())
            exact &= slices > 1 or bool(np.array_equal(event.layer_s_SL, base.layer_s_SL))
            work.append(abs(float(event.tokens_SLG.sum() / base.tokens_SLG.sum()) - 1))
    return Section(
        name="deepspeed-ted",
        published="training of 40 B parameters (a base of 6.7 B with 16 experts) on 128 V100: 26 % over the same without its "
        "communication optimisations; 4-8 times larger base models.",
        modelled="prefill of 2 MoE layers (32 plain experts, hidden 2,048, width 8,192, top-1, even load and popularity 1/rank^0.7), 1,024 tokens "
        "per device on 4 x 8 A100 with HDR, NCCL; experts cut over 1, 2, 4 and 8 devices of a node.",
        claims=[
            structure("one slice is plain expert parallelism", exact, "to the bit"),
            structure(
                "bytes between nodes do not depend on the slices (top-1)",
                all(abs(share - 1) < 1e-9 for share in crossing.values()),
                "one copy crosses for 1, 2, 4 and 8 slices",
            ),
            structure("computation is conserved", max(work) < 1e-9, "whole experts' tokens at every number of slices"),
        ],
        conditions="slices share a hot expert's work, and pay for it inside the node: layer time over plain with 2 / 4 / 8 slices is "
        f"{times(*(gains[True, s] for s in (2, 4, 8)))} with even load, {times(*(gains[False, s] for s in (2, 4, 8)))} with skew.",
        differs="attention is data parallel here, so there are no duplicate activations to drop, which is what the 26 % come from: they were "
        "not simulated. Nor were activation checkpointing and the tiled optimizer.",
    )


def hecate_study(bench: Bench) -> Section:
    """Hot experts gathered on every device, on slow and fast networks."""
    model = model_of(hidden=1024, intermediate=4096, experts=64)
    traces = {skew: bench.trace(model, zipf_ids(32 * 16384 * 3, model, skew)) for skew in (0.3, 0.5, 0.7)}
    straggler = {}

    def gain(device: str, gbits: int, *, per_node: bool = False, skew: float = 0.5) -> float:
        """Over expert parallelism on 4 x 8 devices with this network per device or per node."""
        cluster = cluster_of(device, 4, 8, nic_Bps=gbits / 8 * 1e9 / (8 if per_node else 1))
        run: dict[str, Any] = {"tokens_per_device": 16384, "context": 2048, "mode": "training"}
        base, other = (bench.run(traces[skew], cluster, system=s, **run) for s in ("plain", hecate.make(slots=8)))
        straggler[skew] = float(base.load_ratio_L.max())
        return step_gain(base, other, first=1)

    links = {device: [gain(device, gbits) for gbits in (100, 200, 400)] for device in ("v100", "a100-80")}
    nodes = {device: [gain(device, gbits, per_node=True) for gbits in (100, 400)] for device in ("v100", "a100-80")}
    machines = {skew: (gain("v100", 100, skew=skew), gain("a100-80", 400, skew=skew)) for skew in traces}
    ratio = max(slow / fast for slow, fast in machines.values())
    cluster, even = cluster_of("v100", 4, 8, nic_Bps=12.5e9), bench.trace(model, even_ids(32 * 16 * 3, model))
    flat = step_gain(*(bench.run(even, cluster, system=s, tokens_per_device=1024, mode="training") for s in ("plain", hecate.make(slots=8))))
    small = model_of(intermediate=1024)
    trace, hidden, most = bench.trace(small, zipf_ids(8 * 512 * 6, small, 1.0)), True, 0.0
    for nic_Bps in (1e9, 4e9, 12.5e9, 50e9):
        event = bench.run(trace, cluster_of("a100-80", 2, 4, nic_Bps=nic_Bps), system=hecate.make(slots=5), tokens_per_device=512, context=16384)
        hidden &= "gather" not in event.critical_path_s
        most = max(most, event.gathered)
    free = Materialised(slots=5).chosen(np.arange(32.0)[None], gatherable=32)
    reached = any(slow >= 2.05 for slow, _ in machines.values()) and any(fast >= 1.26 for _, fast in machines.values())
    return Section(
        name="hecate",
        published="training on 32 V100 with 100 Gbit/s (2.05x over expert parallelism, geometric mean) and on 32 A100 with 400 Gbit/s "
        "(1.26x); straggler up to 5.18x.",
        modelled="training of 2 MoE layers (64 plain experts, hidden 1,024, width 4,096, top-1, popularity 1/rank^0.5 unless said otherwise) on "
        "4 x 8 GPUs, 16,384 tokens per device, memory for 8 gathered experts; NVLink 3 in both (assumed), the network per GPU and, read the "
        "other way, per node of 8.",
        claims=[
            structure("even load gains nothing", abs(flat - 1) < 1e-9, times(flat)),
            structure(
                "forward gathers fit memory and hide behind attention", hidden and most <= 5 and len(free[0]) == 5, f"{most:.1f} experts of 5 at most"
            ),
            band(
                "a slower link gains more: the same GPUs, 100, 200 and 400 Gbit/s for each",
                "slow > fast",
                "; ".join(f"{device.upper()} {times(*of)}" for device, of in links.items()),
                all(of[0] > of[1] > of[2] for of in links.values()),
            ),
            band(
                "the slow machine gains more, and both as much as published",
                "2.05x > 1.26x",
                "; ".join(f"{slow:.2f}x > {fast:.2f}x at 1/rank^{skew:g}" for skew, (slow, fast) in machines.items()),
                reached and all(slow > fast for slow, fast in machines.values()),
            ),
            headline(
                "the slow machine gains more, network shared by a node",
                "2.05x > 1.26x",
                f"{nodes['v100'][0]:.2f}x, {nodes['a100-80'][1]:.2f}x",
                nodes["v100"][0] > nodes["a100-80"][1],
            ),
            headline("ratio of the two gains", "1.63", f"{ratio:.2f} at most", ratio >= 1.5),
        ],
        conditions=f"skew: the busiest device has {', '.join(f'{straggler[skew]:.2f}' for skew in traces)} times the mean load at the three. "
        "Attention must be long enough to gather behind, so the order turns round once a link is so slow that too few experts come in that "
        f"time: it does where a node shares its network, on the same GPUs too (V100 {times(*nodes['v100'])}, A100 {times(*nodes['a100-80'])} with "
        "100 and 400 Gbit/s per node).",
        differs="loads of their models over training are not public, so no one skew gives both sizes; heterogeneous sharding and "
        "topology-aware dispatch are not modelled, nor is the memory of re-gathering. Whether 100 and 400 Gbit/s are per GPU or per node is not said "
        "in what we read.",
    )


def bigmac_study(bench: Bench) -> Section:
    """Narrower token copies, at several shares of all-to-alls."""
    model = model_of(intermediate=1024)
    run: dict[str, Any] = {"tokens_per_device": 16384, "mode": "training"}
    trace = bench.trace(model, zipf_ids(8 * 512, model, 0.3))
    pair, exact = cluster_of("a100-80", 2, 4), True
    wide = bench.run(trace, pair)
    for width in (0.125, 0.25, 0.5):
        exact &= bool(np.array_equal(bench.run(trace, pair, system=bigmac.make(width=width)).traffic_B_LGG, wide.traffic_B_LGG * width))
    gains, bounded = {}, True
    for share in (0.45, 0.6, 0.676, 0.8):
        cluster = slowed_to(bench, trace, share, nodes=2, local=4, **run)
        base, other = (bench.run(trace, cluster, system=s, **run) for s in ("plain", bigmac.make(width=0.125)))
        gains[share], true = step_gain(base, other), exchange_share(base)
        bounded &= gains[share] <= 1 / (1 - true + true * 0.125) * (1 + 1e-9)
    island = cluster_of("a100-80", 1, 8)
    base, other = (bench.run(trace, island, system=s, **run) for s in ("plain", bigmac.make(width=0.125)))
    alone = step_gain(base, other)
    found = ", ".join(f"{times(gain)} at {share:.1%}" for share, gain in gains.items())
    return Section(
        name="bigmac",
        published="up to 3.09x training latency and 3.11x inference throughput against Megatron, Tutel and DeepSpeed-Inference; the "
        "abstract gives no set-up.",
        modelled="training of 2 MoE layers (32 plain experts, hidden 2,048, width 1,024, top-1) on 2 x 4 A100, 16,384 tokens per device, "
        "with NICs slowed until all-to-alls take "
        "a given share of the plain step; tokens sent at 1/8 of their width (assumed).",
        claims=[
            structure("bytes scale exactly with the width", exact, "at 1/8, 1/4 and 1/2"),
            structure("never above the bound 1/(1-s+s/8) at share s", bounded, "at four shares"),
            band("training gain reachable", "3.09x", f"{times(max(gains.values()))} at most", max(gains.values()) >= 3.09),
            band(
                "the gain vanishes on one NVLink island",
                "small share, small gain",
                f"{times(alone)} at a share of {exchange_share(base):.1%}",
                alone < 1.05,
            ),
        ],
        conditions=f"a share of at least 67.6 % of the step in all-to-alls at any width, more at a real one: {found}.",
        differs="their model also narrows the experts, which changes compute; the width they send is not in the abstract. Inference was not "
        "simulated.",
    )


def lsh_moe_study(bench: Bench) -> Section:
    """Centroids instead of tokens, at the published share of all-to-alls."""
    model = model_of(intermediate=1024)
    run: dict[str, Any] = {"tokens_per_device": 16384, "mode": "training"}
    trace = bench.trace(model, zipf_ids(8 * 512, model, 0.3))

    def gains_at(share: float, *ratios: float) -> list[float]:
        cluster = slowed_to(bench, trace, share, nodes=2, local=4, **run)
        base = bench.run(trace, cluster, **run)
        return [step_gain(base, bench.run(trace, cluster, system=lsh.make(ratio=ratio), **run)) for ratio in ratios]

    half, most = gains_at(0.45, 0.51, 0.0)
    (beyond,) = gains_at(0.60, 0.0)
    return Section(
        name="lsh-moe",
        published="1.28-2.2x on RoBERTa, GPT, T5 and Swin; all-to-alls take 45 % of the time on average.",
        modelled="as for bigmac; centroids are 51 % of the tokens, or none at all to find the limit (how similar tokens are is a property "
        "of their models).",
        claims=[
            structure(
                "never above 1/(1-s) at the published share", most <= 1 / 0.55 * 1.01, f"{times(most)} with nothing sent, bound {times(1 / 0.55)}"
            ),
            band("lower end at a share of 45 %", "1.28x", f"{times(half)} with 51 % sent", abs(half - 1.28) < 0.05),
            band("upper end at a share of 45 %, which must not be reached", "2.2x needs 54.5 %", f"{times(most)} at most", most < 2.2),
            band("upper end at a share of 60 %", "2.2x", f"{times(beyond)} at most", beyond >= 2.2),
        ],
        conditions="2.2x needs a model that spends at least 54.5 % in all-to-alls, above the published average; at 45 % it must "
        "not come out, and does not.",
        differs="the ratio is an input here, not found by hashing; the cost of hashing is assumed (2 % of a square projection).",
    )


def moepp_study(bench: Bench) -> Section:
    """Experts that cost nothing, in even load."""
    model, cluster = model_of(intermediate=1024), cluster_of("a100-80", 2, 4)
    spread, exact, gains, linear = placed(model, cluster.size, turns=True), True, {}, proportional(CostModel.of(cluster, model))
    trace = bench.trace(model, even_ids(2048, model, experts=25))
    for tokens in (8192, 65536, 1 << 18):
        base = bench.run(trace, cluster, placement=spread, tokens_per_device=tokens)
        for zeros in (3, 6, 13):
            system = moepp.make(experts=tuple(range(25 - zeros, 25)))
            free = bench.run(trace, cluster, system=system, placement=spread, tokens_per_device=tokens)
            exact &= bool(np.allclose(free.tokens_SLG.sum(axis=2), base.tokens_SLG.sum(axis=2) * (25 - zeros) / 25, rtol=1e-12))
            gains[tokens, zeros] = float(base.compute_s_SLG.sum() / free.compute_s_SLG.sum())
    run: dict[str, Any] = {"placement": spread, "cost": linear, "tokens_per_device": 1600}
    whole, half = (bench.run(trace, cluster, system=s, **run) for s in ("plain", moepp.make(experts=tuple(range(12, 25)))))
    ideal = float(whole.compute_s_SLG.sum() / half.compute_s_SLG.sum())
    found = "; ".join(f"z = {zeros / 25:.2f}: {times(*(gains[tokens, zeros] for tokens in (8192, 65536, 1 << 18)))}" for zeros in (3, 6, 13))
    low, high = (max(gain for (_, zeros), gain in gains.items() if zeros == wanted) for wanted in (3, 13))
    return Section(
        name="moe++",
        published="1.1-2.1x expert forward throughput over a plain MoE model of the same size.",
        modelled="2 MoE layers with 25 experts in use (hidden 2,048, width 1,024, top-1), of which 3, 6 or 13 cost nothing, even load, "
        "8,192 to 262,144 tokens per device on 2 x 4 A100.",
        claims=[
            structure("a share z of free selections leaves 1-z of the work", exact, "at z = 0.12, 0.24 and 0.52"),
            structure(
                "throughput is 1/(1-z) where time goes by tokens, so 2.1x needs z = 0.52", abs(ideal * 0.48 - 1) < 1e-9, f"{times(ideal)} at z = 0.52"
            ),
            headline("expert throughput at z = 0.12", "1.1x", f"{times(low)} at most", low >= 1.1),
            headline("expert throughput at z = 0.52", "2.1x", f"{times(high)} at most", round(high, 1) >= 2.1),
        ],
        conditions=f"throughput is 1/(1-z), {times(1 / 0.48)} at z = 0.52, less what launches and half-filled tiles keep: {found} at 8,192 "
        f"/ 65,536 / 262,144 tokens.",
        differs="z is an input: their router decides it, and its gating residual from the layer before costs nothing here.",
    )
