"""Headlines of systems about where weights live and how they come: D2MoE, Edge-MoE, M3ViT, SN40L, Fiddler.

One function per system returns a `Section`. Every verdict is computed from the figures beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.copies import PINNED_SHARE, ping_pong_s
from moesim.cost.offload import Fetching, crossover, fetching, on_chip_B
from moesim.hardware import Cluster, load_device, load_hosts
from moesim.replay import All
from moesim.sim.residency import one_expert_s
from moesim.studies.caching import hosted, kept, sequence_ids
from moesim.studies.cases import Bench, Ids, cluster_of, model_of, step_gain, zipf_ids
from moesim.studies.claims import Section, agrees, band, headline, structure, times
from moesim.studies.published import D2MOE_RATES
from moesim.systems import Planes, Residency, d2moe, fiddler, sn40l
from moesim.systems.fiddler import HOST
from moesim.trace import Trace


def best_order_s(chains: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Shortest time of pieces (load, compute) in any order of loads, and of computations, that keeps the order inside each chain.

    Exact: whatever set of pieces has been taken, its loads end at their sum, and the earliest end of its computations is the one
    to go on from. O(chains x product of (length + 1)). With chains of one it is Johnson's rule (S. M. Johnson 1954).
    """
    loaded = [[0.0, *itertools.accumulate(load for load, _ in chain)] for chain in chains]
    ends: dict[tuple[int, ...], float] = {}
    for taken in itertools.product(*(range(len(chain) + 1) for chain in chains)):
        come_s = sum(sums[n] for sums, n in zip(loaded, taken, strict=True))
        last = [(i, n - 1) for i, n in enumerate(taken) if n]
        ends[taken] = min((max(ends[(*taken[:i], n, *taken[i + 1 :])], come_s) + chains[i][n][1] for i, n in last), default=0.0)
    return ends[tuple(map(len, chains))]


def planes_of(cost: CostModel, device: str, tokens_E: NDArray[np.float64], planes: Planes, way: Fetching) -> list[list[tuple[float, float]]]:
    """(load, compute) of every plane that a layer's experts want, when none is in place; tokens_E are theirs."""
    tokens_A = tokens_E[tokens_E > 0]
    wanted_A, parameters = planes.wanted(tokens_A), cost.model.expert_parameters
    spent_A = one_expert_s(cost, device, tokens_A / wanted_A) + planes.unpack_B * parameters / cost.peaks[device].memory_Bps
    loads = [float(way.demand_s(parameters * bits / 8)) for bits in planes.bits]
    return [[(load, float(spent)) for load in loads[:wanted]] for spent, wanted in zip(spent_A, wanted_A, strict=True)]


def hot_pairs(tokens: int, skew: float) -> Ids:
    """Pairs of eight experts in four layers, popularity 1/rank^skew, in another order in every layer."""
    heat = np.random.default_rng(0).gumbel(size=(tokens, 4, 8)) - skew * np.log(np.arange(1, 9))
    orders = np.stack([np.random.default_rng(layer).permutation(8) for layer in range(4)])
    return np.take_along_axis(orders[None], np.argsort(-heat, axis=2)[:, :, :2], axis=2)


def over_best_order(bench: Bench, trace: Trace, cluster: Cluster, **run: Any) -> list[float]:
    """Time of layers over that of the best order of their planes: hottest first, by id, and whole experts by id."""
    way, found = Fetching(alone_Bps=3.5e9, beside_Bps=3.5e9), []
    cost, device = CostModel.of(cluster, trace.model, transport="nccl"), cluster.devices[0].name
    for hottest, progressive in ((True, True), (False, True), (False, False)):
        planned = d2moe.make(share=None, hottest_first=hottest, progressive=progressive).residency
        residency = replace(planned or Residency(), tier="ddr", way=way)
        event = bench.run(trace, cluster, system=kept(residency), **run)
        assert residency.planes
        for layer in range(4):  # of the first step
            tokens = np.bincount(trace.experts()[: run["tokens_per_device"], layer].ravel(), minlength=8).astype(float)
            found.append(float(event.layer_s_SL[0, layer]) / best_order_s(planes_of(cost, device, tokens, residency.planes, way)))
    return found


def d2moe_rate(
    bench: Bench, size_B: float, *, bits: tuple[float, ...] = (2.0, 1.0, 1.0), hot: float = 0.25, unpack_B: float = d2moe.UNPACK_B
) -> float:
    """Tokens/s of 32 requests of LLaMA-MoE, of whose 32 layers four are run, with so many bytes for experts."""
    model = model_of(layers=4, experts=8, top_k=2, hidden=4096, intermediate=1376, gated=True)
    share = min(1.0, size_B / (32 * model.experts * model.expert_parameters * sum(bits) / 8))
    system, trace = d2moe.make(share=share, bits=bits, hot=hot, unpack_B=unpack_B), bench.trace(model, hot_pairs(512, 0.7))
    event = bench.run(trace, hosted("rtx-3060", host="edge"), system=system, tokens_per_device=32, mode="decode", context=512)
    return 32 / (8 * float(event.step_s_S.mean()))


def d2moe_study(bench: Bench) -> Section:
    """Bit planes from an SSD: order, nesting and memory."""
    model, cluster = model_of(layers=4, experts=8, top_k=2, hidden=4096, intermediate=3584, gated=True), hosted("rtx-3060", host="edge")
    trace = bench.trace(model, hot_pairs(256, 0.7))
    run: dict[str, Any] = {"tokens_per_device": 32, "mode": "decode", "context": 512}
    ours, apart = (
        {share: bench.run(trace, cluster, system=d2moe.make(share=share, nested=nested), **run).step_s_S.sum() for share in shares}
        for nested, shares in ((True, (None, 0.125, 0.25, 0.5, 0.75)), (False, (0.25, 0.5, 0.75)))
    )
    rising = list(ours.values()) == sorted(ours.values(), reverse=True)
    nesting = [float(apart[share] / ours[share]) for share in apart]
    in_order = d2moe.make(share=None, hottest_first=False, progressive=False)
    first = {}
    for skew, tokens in itertools.product((0.7, 1.2), (32, 256, 512, 1024, 1536)):
        wide: dict[str, Any] = {"tokens_per_device": tokens, "mode": "decode" if tokens == 32 else "prefill", "context": 512}
        batch = bench.trace(model, hot_pairs(4 * tokens, skew))
        first[skew, tokens] = step_gain(*(bench.run(batch, cluster, system=system, **wide) for system in (in_order, d2moe.make(share=None))))
    best = max(first, key=lambda at: first[at])
    over = over_best_order(bench, trace, cluster, **run)
    sizes = (2e8, 1.6e9)
    rates = [d2moe_rate(bench, size_B) for size_B in sizes]
    free, wide_free = ([d2moe_rate(bench, size_B, bits=bits, unpack_B=0.0) for size_B in sizes] for bits in ((2.0, 1.0, 1.0), (4.0, 2.0, 2.0)))
    half = d2moe_rate(bench, 2e8, hot=0.5)
    same = Planes(bits=(4.0,), unpack_B=d2moe.UNPACK_B)
    peer = kept(Residency(share=0.25, order="one-by-one", buffers=None, bits=4.0, tier="nvme", planes=same))
    four = float(bench.run(trace, cluster, system=peer, **run).step_s_S.sum() / ours[0.25])
    return Section(
        name="d2moe",
        published="RTX 3060 of 6 GB and Jetson Orin over an SSD of 3.5 GB/s: 1.14-1.39x over EdgeMoE; hottest first 1.11-1.21x, nested planes "
        "1.91-4.95x; 66.45 -> 83.14 tokens/s from 200 to 1,600 MB at 32 requests.",
        modelled="4 MoE layers of half Mixtral's width, 32 requests in decode on an RTX 3060 over PCIe 3.0 and an SSD of 3.5 "
        "GB/s; planes of 2, 1 and 1 bits, a quarter of a layer's experts wants all, popularity 1/rank^0.7 (assumed). The order also in prefill "
        "of 256 to 1,536 tokens, and with popularity 1/rank^1.2; tokens/s with the width of LLaMA-MoE, whose 32 layers take eight times these four "
        "(of the two models they name, Mixtral's experts would take that SSD 100 ms a layer). Unpacking a plane moves "
        f"{d2moe.UNPACK_B:g} bytes of the device's memory per weight: the one number that is fitted, to the tokens/s with 1,600 MB.",
        claims=[
            structure(
                "no schedule of planes beats the best one",
                min(over) >= 1 - 1e-9,
                f"{len(over)} layers, hottest first, by id and whole: {min(over):.3f} to {max(over):.3f} of the exact optimum",
            ),
            structure(
                "more slots are never slower", rising, " / ".join(f"{256 / s:.1f}" for s in ours.values()) + " tokens/s at 0 to 75 % of the experts"
            ),
            *(
                agrees(
                    f"tokens/s of 32 requests with {memory} for experts, {how}within 10 %",
                    f"{theirs:g}",
                    f"{found:.1f} ({found / theirs - 1:+.0%})",
                    abs(found / theirs - 1) <= 0.1,
                )
                for memory, how, theirs, found in zip(
                    ("200 MB", "1,600 MB"), ("nothing fitted to it, ", "one number fitted to it, "), D2MOE_RATES, rates, strict=True
                )
            ),
            headline(
                "nested planes over separate copies in the same memory",
                "1.91-4.95x",
                times(*nesting) + " with 25, 50 and 75 % of the experts",
                max(nesting) >= 1.91,
            ),
            headline("hottest first and plane by plane over whole experts by id", "1.11-1.21x", f"{times(first[best])} at most", first[best] >= 1.11),
            headline("planes over four bits for every expert", "1.14-1.39x", times(four), four >= 1.14),
        ],
        conditions="nesting pays by the precisions asked, 9 bits against 4, and by the experts that their memory then holds. An order of loads pays "
        f"where they take as long as computation: {times(first[best])} is a prefill of {best[1]:,} tokens with popularity 1/rank^{best[0]:g} and no "
        f"experts in place; in decode, where loads take most of a step, {times(first[0.7, 32])}. With 200 MB the SSD sets the pace, so that point "
        f"says little about unpacking; if it cost nothing, tokens/s were {free[0]:.1f} and {free[1]:.1f}. "
        "Three passes over a plane, to int8, to 16 bits and scaled, would move 8 bytes per weight. Both figures need experts of about three bits on "
        f"the mean: where half of them want all planes, 200 MB give {half:.1f}, and planes of 4, 2 and 2 bits {wide_free[0]:.1f} and "
        f"{wide_free[1]:.1f} at most.",
        differs="EdgeMoE itself is not modelled, all experts at four bits, unpacked alike, stand for it; which tokens want which bits is an input. "
        "Which model, device and bits the published tokens/s are of, and how planes are unpacked, is not in what we read.",
    )


def _fpga(experts: int) -> tuple[Cluster, Any]:
    """A ZCU104 with a model whose experts fit its chip twice."""
    model = model_of(layers=2, experts=experts, top_k=2, hidden=192, intermediate=768)
    return replace(cluster_of("a100-80", 1, 1), devices=(load_device("zcu104"),)), model


def _pair_ids(tokens: int, experts: int, layers: int, *, seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(experts), (tokens * layers, 1)), axis=1)[:, :2].reshape(tokens, layers, 2)


def edge_moe_study(bench: Bench) -> Section:
    """Expert by expert on an FPGA: bytes, the closed form, and the sign of the energy."""
    cluster, model = _fpga(16)
    cost, worst, bytes_B = CostModel.of(cluster, model), 0.0, {}
    way = fetching(cluster, 0, "ddr")
    for tokens in (64, 256):
        trace = bench.trace(model, _pair_ids(tokens, 16, 2))
        event = bench.run(trace, cluster, system="edge-moe", tokens_per_device=tokens)
        assert event.copies is not None
        bytes_B[tokens] = event.copies.demand_B / 2
        for layer in range(2):
            loads = np.bincount(trace.experts()[:, layer].ravel(), minlength=16).astype(float)
            computes = one_expert_s(cost, "zcu104", loads, on_chip=True)
            worst = max(worst, abs(float(event.layer_s_SL[0, layer]) / ping_pong_s(np.full(16, model.expert_B / way.alone_Bps), computes) - 1))
    naive_B, operations = 256 * 2 * model.expert_B, 256 * 2 * 2 * model.expert_parameters
    energy = [(naive_B * byte + operations) / (bytes_B[256] * byte + operations) for byte in (1, 10, 100)]  # in operations
    return Section(
        name="edge-moe",
        published="energy efficiency 2.24x of a GPU and 4.90x of a CPU.",
        modelled="2 MoE layers of ViT-tiny size (16 plain experts, hidden 192, width 768, top-2) on a ZCU104, experts in its "
        "DDR, two buffers on the chip.",
        claims=[
            structure(
                "bytes of a layer are its distinct experts'",
                bytes_B[64] == bytes_B[256] == 16 * model.expert_B,
                f"{bytes_B[256] / 1e6:.2f} MB at 64 and 256 tokens",
            ),
            structure("a layer is load_1 + sum max(compute, next load)", worst < 1e-9, "two layers, 64 and 256 tokens"),
            band(
                "sign of the energy, bytes x pJ + operations x pJ, against token by token",
                "less",
                f"{times(*energy)} less at 256 tokens if a byte takes as much as 1, 10 and 100 operations",
                min(energy) > 1,
            ),
        ],
        conditions="tokens known for the whole layer before its first expert, so that they can queue.",
        differs="no energy per byte or operation of the boards is in the profiles, so 2.24x over a GPU and 4.90x over a CPU were not simulated: the "
        "sign is that of reading every expert once, whatever both energies are.",
    )


def m3vit_study(bench: Bench) -> Section:
    """Ping-pong buffers and task gates on an FPGA."""
    cluster, model = _fpga(16)
    buffers = {experts: 2 * _fpga(experts)[1].expert_B for experts in (8, 16, 64)}
    way, cost = fetching(cluster, 0, "ddr"), CostModel.of(cluster, model)
    few = np.where(np.arange(64)[:, None, None] < 32, _pair_ids(64, 8, 2), 8 + _pair_ids(64, 8, 2))  # two tasks with experts of their own
    one, other = (bench.trace(model, part) for part in (few[:32], few[32:]))
    both = bench.trace(model, few)
    run: dict[str, Any] = {"tokens_per_device": 32, "system": "m3vit"}
    apart = [bench.run(part, cluster, **run).step_s_S for part in (one, other)]
    mixed = bench.run(both, cluster, **run)
    switch = float(np.abs(mixed.step_s_S - np.concatenate(apart)).max())
    loads = np.full(16, model.expert_B / way.alone_Bps)
    computes = one_expert_s(cost, "zcu104", np.full(16, 32.0), on_chip=True)
    trace = bench.trace(model, np.stack([np.arange(256) % 16, (np.arange(256) + 1) % 16], axis=1)[:, None, :].repeat(2, axis=1))
    even = bench.run(trace, cluster, system="m3vit", tokens_per_device=256)
    worst = abs(float(even.layer_s_SL[0, 0]) / ping_pong_s(loads, computes) - 1)
    hidden = ping_pong_s(loads, computes) / (loads.sum() + computes.sum())
    return Section(
        name="m3vit",
        published="ZCU104: memory /2.4, up to 9.23x energy efficiency over a comparable FPGA design, 88 % fewer FLOPs.",
        modelled="2 MoE layers of ViT-tiny size (16 plain experts, hidden 192, width 768, top-2) on a ZCU104; two tasks with eight experts each.",
        claims=[
            structure("a layer is load_1 + sum max(compute, next load)", worst < 1e-9, f"{1 - hidden:.0%} of loads and computation hidden"),
            structure("a task's switch adds nothing", switch < 1e-12, "steps of both tasks as alone"),
            structure(
                "buffers do not grow with the experts",
                len(set(buffers.values())) == 1 and buffers[8] <= on_chip_B(cluster.devices[0]),
                f"{buffers[8] / 1e6:.2f} MB for 8, 16 and 64 experts",
            ),
        ],
        conditions="experts that fit the chip twice.",
        differs="memory /2.4, 9.23x and -88 % are about their network against others and were not simulated.",
    )


def sn40l_study(bench: Bench) -> Section:
    """Switching models between three tiers."""
    socket = replace(cluster_of("a100-80", 1, 1), devices=(load_device("sn40l"),), name="sn40l")
    dgx = replace(cluster_of("a100-80", 1, 8), host_G=(load_hosts()["dgx-a100"],) * 8)
    model = model_of(layers=1, experts=8, hidden=8192, intermediate=64 * 1024, gated=True)  # an "expert" of 3.2 GB
    own, host = fetching(socket, 0, "ddr"), fetching(dgx, 0, "ddr")
    rounds = bench.trace(model, np.arange(32)[:, None, None] % 8)
    plain, event, queued = (
        bench.run(rounds, socket, system=system, tokens_per_device=1, mode="decode", context=4096)
        for system in ("plain", sn40l.make(share=0.5), sn40l.make(share=0.5, queued=True))
    )
    switch_s = float(event.step_s_S.mean() - plain.step_s_S.mean())
    exact = abs(switch_s / (model.expert_B / own.alone_Bps) - 1)
    shorter = float(event.step_s_S[1:].mean() / queued.step_s_S[1:].mean())
    bound_s = max(float(plain.step_s_S.mean()), float(own.ahead_s(model.expert_B, 1)))
    hides = abs(float(queued.step_s_S[2:].mean()) / bound_s - 1) < 1e-6
    links = [8 * own.alone_Bps / (speed * PINNED_SHARE) for speed in (32e9, 64e9)]
    return Section(
        name="sn40l",
        published="model switches 15-31x faster than on a DGX, 8 sockets; footprint /19; 150 experts.",
        modelled="models of 3.2 GB for requests in turn, half of eight in HBM under LRU, on one SN40L socket; a DGX A100's host beside it.",
        claims=[
            structure("a switch takes bytes / DDR bandwidth", exact < 1e-9, f"{switch_s * 1e3:.1f} ms at {own.alone_Bps / 1e9:.0f} GB/s"),
            structure("a queued request's model comes beside the current one", hides, f"{times(shorter)}: the longer of copy and request"),
            band("switch against a host behind 64 and 32 GB/s, 8 sockets", "15x / 31x", times(*links[::-1]), links[1] >= 15 and links[0] >= 30),
        ],
        conditions="the profile's DDR bandwidth is derived from the published ratios, so the last line only says that they are "
        "ratios of bandwidths. Against the "
        f"shipped DGX A100's one slot at what pinned copies reach, a socket's switch is {own.alone_Bps / host.alone_Bps:.1f}x faster.",
        differs="an expert of the trace stands for a whole model; tensor parallelism over sockets is bandwidth times eight. "
        "Faster operations and the footprint were "
        "not simulated.",
    )


def fiddler_study(bench: Bench) -> Section:
    """Missing experts on the host's cores."""
    model, cluster = model_of(layers=4, experts=8, top_k=2, hidden=4096, intermediate=14336, gated=True), hosted("rtx-a5000")
    cost, points = CostModel.of(cluster, model), {}
    tokens_N = np.arange(1, 4097).astype(float)
    alone = True
    for factor in (0.5, 1.0, 2.0, 4.0):
        link_Bps = fetching(cluster, 0, "ddr").alone_Bps * factor
        host_s = HOST.expert_s(tokens_N, parameters=model.expert_parameters, expert_B=model.expert_B, moved_B=4 * model.hidden, link_Bps=link_Bps)
        device_s = model.expert_B / link_Bps + one_expert_s(cost, "rtx-a5000", tokens_N)
        points[factor] = crossover(host_s, device_s)
        alone &= bool((device_s[points[factor] - 1 :] <= host_s[points[factor] - 1 :]).all())
    falling = list(points.values()) == sorted(points.values(), reverse=True)

    def routed(ids: Ids) -> Trace:
        """Every token's expert and another one."""
        return bench.trace(model, np.concatenate([ids, (ids + 1 + np.arange(len(ids))[:, None, None] % 7) % 8], axis=2))

    first = np.where(np.arange(4) < 1, model.experts, 0)[:, None]  # slots of a device that holds one whole layer of four
    by_layer = kept(Residency(slots_LG=first, policy="static", host=HOST))
    step: dict[str, Any] = {"mode": "decode", "context": 512}
    one = routed(sequence_ids(64, 1, model))
    single = step_gain(*(bench.run(one, cluster, system=s, tokens_per_device=1, **step) for s in (by_layer, "fiddler")))
    prompt = routed(zipf_ids(1024, model, 0.3))
    prefill_s = {
        name: float(bench.run(prompt, cluster, system=system, tokens_per_device=512, mode="prefill").step_s_S.sum())
        for name, system in (
            ("each", "fiddler"),
            ("beside", fiddler.make(host=replace(HOST, beside=True))),
            ("demand", kept(Residency())),
            ("layers", kept(Residency(prefetch=All(), bulk=True))),
        )
    }
    prefill, beside = (prefill_s["demand"] / prefill_s[name] for name in ("each", "beside"))
    beams = routed(sequence_ids(16, 16, model))
    together_s = float(bench.run(beams, cluster, system="fiddler", tokens_per_device=16, **step).step_s_S.mean())
    again = {
        tokens: 16 * float(bench.run(beams, cluster, system=by_layer, tokens_per_device=tokens, **step).step_s_S.mean()) / together_s
        for tokens in (1, 4, 8)
    }
    return Section(
        name="fiddler",
        published="1.26x for a single request, 1.30x in prefill, 11.57x with beam search, against the best offloading system for each: llama.cpp, "
        "DeepSpeed-MII and llama.cpp (remembered, not checked).",
        modelled="4 MoE layers of Mixtral's size on an RTX A5000 over PCIe 4.0, the hottest quarter of the experts on it; the "
        f"host reaches {HOST.flops / 1e12:g} TFLOP/s and {HOST.memory_Bps / 1e9:g} GB/s (assumed). Single request: against one whole layer of four "
        "on the device and the others' experts on the host. Prefill of 512 tokens: against copies on demand with no expert in place. Beam search of "
        "16: against the single request's peer, one beam after the other, each with its last 1, 4 or 8 tokens again.",
        claims=[
            structure(
                "one number of tokens from which the copy is worth it",
                alone,
                " / ".join(map(str, points.values())) + " tokens at 0.5 to 4 times the link",
            ),
            structure("it falls as the link gets faster", falling and points[0.5] > points[4.0], "at four speeds"),
            headline("single request", "1.26x", times(single), single >= 1.26),
            headline("prefill", "1.30x", f"{times(prefill)}, {times(beside)} with the host beside the device", max(prefill, beside) >= 1.30),
            headline("beam search", "11.57x", times(*again.values()), max(again.values()) >= 11.57),
        ],
        conditions="a host whose memory feeds its cores faster than the link feeds the device, and few tokens an expert. In prefill no expert alone "
        "is sooner on the host, so the gain is what is in place, at most 1/(1-1/4), unless the host computes some of the missing ones beside the "
        "copies of the others: a comment in their code asks for that, its search for the least sum. A peer that streams whole layers one ahead "
        f"leaves {times(prefill_s['layers'] / prefill_s['each'])} and {times(prefill_s['layers'] / prefill_s['beside'])}. "
        f"Beams gain by sharing reads of weights, {times(again[1])} for 16; beyond that the peer must compute tokens again, as llama.cpp's beams do "
        "since they last agreed (its pull request 2267).",
        differs="of the peers only what they copy, keep and compute is modelled, not their kernels; the hottest experts are those of the run itself. "
        "Resident experts and copies do not overlap in prefill.",
    )
