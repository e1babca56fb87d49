"""Headlines of systems that copy experts ahead or keep some: ExpertFlow, Read-ME, MoE-Infinity, M2R2.

One function per system returns a `Section`. Every verdict is computed from the figures beside it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.cost.offload import Fetching
from moesim.hardware import Cluster, load_hosts
from moesim.model import ModelSpec
from moesim.replay import All, Events, Residual, replay
from moesim.replay.policy import Lookahead
from moesim.sim.event import EventResult
from moesim.studies.cases import Bench, Ids, cluster_of, model_of, step_gain, zipf_ids
from moesim.studies.claims import Claim, Section, agrees, band, headline, structure, times
from moesim.studies.published import EXPERTFLOW, EXPERTFLOW_REGROUPED, MOE_INFINITY, READ_ME, READ_ME_BATCH
from moesim.systems import SYSTEMS, Residency, System, expertflow, moe_infinity
from moesim.systems.batching import by_queue, needed


def hosted(device: str, *, devices: int = 1, host: str = "workstation") -> Cluster:
    """Devices of one node with a host to copy experts from."""
    return replace(cluster_of(device, 1, devices), host_G=(load_hosts()[host],) * devices)


def kept(residency: Residency, name: str = "plain") -> System:
    """A system with another residency."""
    return replace(SYSTEMS[name], residency=residency)


def _in_place(event: EventResult) -> tuple[float, float]:
    """Shares of experts in place or foretold, and of those that were there in time."""
    assert event.copies is not None
    return (event.copies.hits + event.copies.known) / event.copies.asked, (event.copies.hits + event.copies.timely) / event.copies.asked


def sequence_ids(steps: int, batch: int, model: ModelSpec, *, own: int = 3, loyal: float = 0.9, length: int = 64, seed: int = 0) -> Ids:
    """Decode of `batch` sequences at a time, `length` steps each; a sequence takes `loyal` of its choices from `own` experts of its own."""
    rng = np.random.default_rng(seed)
    rounds = -(-steps // length)
    prefers = rng.integers(0, model.experts, (rounds, batch, model.layers, own))
    at = np.arange(steps) // length
    pick = rng.integers(0, own, (steps, batch, model.layers))
    ids = np.take_along_axis(prefers[at], pick[..., None], axis=3)[..., 0]
    astray = rng.random(ids.shape) >= loyal
    return np.where(astray, rng.integers(0, model.experts, ids.shape), ids).reshape(steps * batch, model.layers, 1)


def expertflow_study(bench: Bench) -> Section:
    """Planned caches against LRU by batch, and regrouping by experts."""
    model, cluster = model_of(layers=6, experts=32, hidden=768, intermediate=3072), hosted("a40")
    shares: dict[int, tuple[float, float]] = {}
    timely = {}
    for batch in EXPERTFLOW:
        trace = bench.trace(model, sequence_ids(256, batch, model, loyal=0.69))
        run: dict[str, Any] = {"tokens_per_device": batch, "mode": "decode", "context": 512}
        planned = bench.run(trace, cluster, system=replace(expertflow.make(share=0.5), routing=SYSTEMS["plain"].routing), **run)
        lru = bench.run(trace, cluster, system=kept(Residency(share=0.5)), **run)
        shares[batch], timely[batch] = (_in_place(planned)[0], _in_place(lru)[0]), _in_place(planned)[1]
    gains: dict[int, list[float]] = {16: [], 20: []}  # slots: gain by experts
    for experts in EXPERTFLOW_REGROUPED:
        wide = replace(model, experts=experts)
        routed = bench.trace(wide, sequence_ids(128, 32, wide, own=1, length=2))
        run = {"tokens_per_device": 32, "mode": "decode", "context": 512}
        for slots, of in gains.items():
            ways = [replace(expertflow.make(share=slots / experts), routing=SYSTEMS[name].routing) for name in ("plain", "expertflow")]
            of.append(step_gain(*(bench.run(routed, cluster, system=way, **run) for way in ways)))
    few, many = gains.values()
    published = [after / before for before, after in EXPERTFLOW_REGROUPED.values()]

    def falls(what: str, i: int) -> Claim:
        """The fall from batch 4 to 16 against the published one."""
        theirs, ours = (of[4][i] - of[16][i] for of in (EXPERTFLOW, shares))
        they, we = (f"{of[4][i]:.1%} -> {of[16][i]:.1%}, -{100 * fall:.1f} points" for of, fall in ((EXPERTFLOW, theirs), (shares, ours)))
        return agrees(f"{what}, batch 4 to 16, one number fitted at 4, within 2 points", they, we, abs(ours - theirs) <= 0.02)

    return Section(
        name="expertflow",
        published="SwitchTransformer on an A40 of 48 GB: shares in place with 16 slots at batch 4 and 16; tokens/s with and "
        "without regrouping two batches.",
        modelled="6 MoE layers of Switch-base size in decode. In place: slots for half of 32 experts, each sequence takes 69 % of its choices from "
        "three experts of its own, a share fitted to LRU at batch 4; the predictor names 80 % of what is needed, fitted to the plan at batch 4, and "
        "5 % of what it names in vain (assumed). Regrouping: 16 and 20 slots, 32 to 128 experts, 32 sequences that take nine of ten choices from one "
        "expert of their own for two steps (assumed); copies over PCIe 4.0.",
        claims=[
            falls("in place under LRU", 1),
            falls("in place or foretold, as planned", 0),
            band(
                "regrouping two batches gains more with more experts, 32, 64 and 128",
                "/".join(f"{x - 1:+.0%}" for x in published),
                "/".join(f"{x - 1:+.1%}" for x in many) + " with 20 slots",
                1 < many[0] < many[1] < many[2] and many[2] >= 1.1,
            ),
        ],
        conditions=f"routes known before the step. Of the planned shares {timely[4]:.1%} and {timely[16]:.1%} are there in time "
        "over PCIe 4.0, and only those save time. Regrouping needs tokens of like routes in both batches, and gains more with more experts only "
        "where slots hold much of what a batch asks of few experts anyway: with 16 slots "
        f"{'/'.join(f'{x - 1:+.1%}' for x in few)}. How many slots theirs had is not said in what we read.",
        differs="their routing and predictor are not public: two numbers stand for them, one for LRU and one for the plan; the plan's slots "
        "follow a cache's policy with foretold experts first, not their quota per layer. Regrouping gains by other routes than those of the shares "
        "in place: with those it gains next to nothing. Memory (-93.72 %) is the slots' share and was not simulated; nor was the speed over SE-MoE.",
    )


def read_me_study(bench: Bench) -> Section:
    """Shares in place of six experts under requests that interleave, and batches by queue."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 6, (40_000, 1, 1))
    events = Events.from_experts(ids, experts=6)
    lru = {slots: replay(events, "lru", slots).hit_ratio for slots in READ_ME}
    belady = {slots: replay(events, "belady", slots).hit_ratio for slots in READ_ME}
    ahead = {window: [replay(events, Lookahead(window=window), slots).hit_ratio for slots in READ_ME] for window in (1, 2, 3, 8)}
    apart = {window: max(abs(row[2] - found) for row, found in zip(READ_ME.values(), of, strict=True)) for window, of in ahead.items()}
    batch = round(math.log(1 - READ_ME_BATCH[0] / 6) / math.log(5 / 6))
    sizes = [batch] * 2
    pairs = [ids[i : i + 2 * batch].astype(np.uint16) for i in range(0, 4000, 2 * batch)]
    before, after = (
        np.mean([needed(part[by_queue(part, sizes, 6)] if queued else part, sizes, 6) / 2 for part in pairs]) for queued in (False, True)
    )
    model = model_of(layers=4, experts=6, hidden=1024, intermediate=1024)
    trace = bench.trace(model, zipf_ids(800, model, 0.5))
    run: dict[str, Any] = {"tokens_per_device": batch, "mode": "decode", "context": 512}
    cluster = hosted("a100-80")
    event = bench.run(trace, cluster, system="read-me", **run)
    loads = event.tokens_SLG
    one = bool((event.fanout_devices_L == event.fanout_devices_L[0]).all() and (np.abs(loads - loads[:, :1]) < 1e-9).all())
    own = kept(replace(SYSTEMS["read-me"].residency or Residency(), policy="lru"))
    gain = step_gain(bench.run(trace, cluster, system=own, **run), event)
    theirs = [row[1] for row in READ_ME.values()]
    return Section(
        name="read-me",
        published="A100-80, chat requests replayed: hits with 2 to 5 slots under random eviction, LRU and Belady's rule over queued requests; "
        "experts of a batch 5.08-5.21 -> 3.51; mean latency -5.0..6.1 %, p95 -9.5..10.0 %.",
        modelled="six experts (what their random hits say: slots/6), chosen evenly and independently, which is what interleaved "
        "requests look like; batches of "
        f"{batch} tokens, so that a batch needs {READ_ME_BATCH[0]} experts; two batches queue. Latency: 4 layers, 3 of 6 slots, PCIe 4.0.",
        claims=[
            structure("one route for all layers: layers see the same", one, "tokens and devices of every layer equal"),
            structure(
                "a longer queue is worth more, between LRU and Belady's whole future",
                all(list(lru.values())[i] < ahead[1][i] < ahead[2][i] < ahead[3][i] < ahead[8][i] <= list(belady.values())[i] for i in range(4)),
                "2 to 5 slots, 1 to 8 requests known ahead",
            ),
            agrees(
                "Belady of the queue above LRU, 2 to 5 slots of 6",
                "+" + "/".join(f"{100 * (row[2] - row[1]):.1f}" for row in READ_ME.values()) + " points",
                "+" + "/".join(f"{100 * (x - y):.1f}" for x, y in zip(ahead[2], lru.values(), strict=True)),
                all(x > y for x, y in zip(ahead[2], lru.values(), strict=True)),
            ),
            headline(
                "LRU, 2 to 5 slots of 6, within 3 points",
                "/".join(f"{x:.1%}" for x in theirs),
                "/".join(f"{x:.1%}" for x in lru.values()),
                max(abs(a - b) for a, b in zip(theirs, lru.values(), strict=True)) <= 0.03,
            ),
            agrees(
                "LRU within 2.3 points of random, whose share in place is slots/6",
                f"{100 * max(abs(row[1] - row[0]) for row in READ_ME.values()):.1f} points off at most",
                f"{100 * max(abs(lru[s] - s / 6) for s in lru):.1f} points",
                max(abs(lru[s] - s / 6) for s in lru) <= 0.023,
            ),
            headline(
                "Belady of two queued requests, 2 to 5 slots of 6, within 3 points",
                "/".join(f"{row[2]:.1%}" for row in READ_ME.values()),
                "/".join(f"{x:.1%}" for x in ahead[2]) + f", {100 * apart[2]:.1f} points off at most",
                apart[2] <= 0.03,
            ),
            headline(
                "experts of a batch, two batches queued, within 10 %",
                f"{READ_ME_BATCH[0]} -> {READ_ME_BATCH[1]}",
                f"{before:.2f} -> {after:.2f}",
                abs(float(after) / READ_ME_BATCH[1] - 1) <= 0.1,
            ),
            headline("latency against LRU in order of arrival", "-5 % mean", f"{1 / gain - 1:+.1%} per step", gain > 1.05),
        ],
        conditions="requests of even and independent choice; with skew LRU rises above random. A queue of one, two, three and eight requests is "
        f"{', '.join(f'{100 * x:.1f}' for x in apart.values())} points off at most; two is what their smaller batches take, too. The whole future "
        f"gives {'/'.join(f'{x:.1%}' for x in belady.values())}, the bound.",
        differs="how long their queue was is not in what we read, nor whether it varied: theirs lies below a queue of two where slots are few and "
        "above it where they are many. The router outside the model is taken as given; its quality is not asked.",
    )


def moe_infinity_study(bench: Bench) -> Section:
    """Experts kept and foretold against whole layers and against copies on demand, by how few of them a token takes."""
    cluster = hosted("rtx-a5000")
    shapes = {  # with the MoE layers of the whole model, and those that a new token passes
        "Switch-large-128": (model_of(layers=4, experts=128, top_k=1, hidden=1024, intermediate=4096), 24, 12),
        "NLLB-MoE-54B": (model_of(layers=4, experts=128, top_k=2, hidden=2048, intermediate=8192), 12, 6),
        "DeepSeek-V2-Lite": (model_of(layers=4, experts=64, top_k=6, hidden=2048, intermediate=1408, gated=True), 26, 26),
        "Mixtral-8x7B": (model_of(layers=4, experts=8, top_k=2, hidden=4096, intermediate=14336, gated=True), 32, 32),
    }
    gains: dict[str, dict[str, float]] = {"whole": {}, "demand": {}, "lru": {}}
    token_s = {}
    for name, (model, layers, passed) in shapes.items():
        rng = np.random.default_rng(1)
        pick = rng.permuted(np.tile(np.arange(model.experts), (96 * model.layers, 1)), axis=1)[:, : model.top_k]
        own = np.repeat(np.arange(6), 16)[:, None, None]  # six requests, each of which prefers an eighth of the experts
        few = max(model.top_k, model.experts // 8)
        near = (pick.reshape(96, model.layers, -1) % few + own * few) % model.experts
        trace = bench.trace(model, np.where(rng.random((96, model.layers, 1)) < 0.8, near, pick.reshape(96, model.layers, -1)))
        run: dict[str, Any] = {"tokens_per_device": 1, "mode": "decode", "context": 512}
        share = round(22e9 / (layers * model.expert_B)) / model.experts  # of 24 GB, two are left for all else
        ours = bench.run(trace, cluster, system=moe_infinity.make(share=share), **run)
        peers = {"whole": Residency(prefetch=All(), bulk=True), "demand": Residency(), "lru": Residency(share=share)}
        for peer, residency in peers.items():
            gains[peer][name] = step_gain(bench.run(trace, cluster, system=kept(residency), **run), ours)
        token_s[name] = float(ours.step_s_S.mean()) / model.layers * passed
    theirs, demand = ({name: row[i] / row[0] for name, row in MOE_INFINITY.items()} for i in (2, 1))
    ranked = [sorted(of, key=lambda name: of[name]) for of in (gains["whole"], theirs)]
    sparse = sorted(shapes, key=lambda name: -shapes[name][0].top_k / shapes[name][0].experts)
    slower = {name: MOE_INFINITY[name][0] / token_s[name] for name in MOE_INFINITY}
    return Section(
        name="moe-infinity",
        published="one A5000 of 24 GB, s/token against Accelerate, DeepSpeed, Ollama and vLLM, the best of which is taken here.",
        modelled="4 MoE layers of each model's size, one token a step, six requests that prefer an eighth of the experts each "
        "for 16 tokens (assumed); slots for as many as 22 GB hold of the whole model, 80 % foretold two layers ahead, a quarter of that in vain "
        "(assumed); PCIe 4.0. Whole layers are copied one ahead.",
        claims=[
            band(
                "gains on every model",
                "/".join(f"{x:.1f}x" for x in theirs.values()),
                "/".join(f"{gains['whole'][name]:.1f}x" for name in theirs) + " over whole layers",
                all(gains["whole"][name] >= gain for name, gain in theirs.items()),
            ),
            band("the sparser the activation, the larger the gain", "Mixtral least", " < ".join(ranked[0]), ranked[0] == sparse),
            headline("same order of models", " < ".join(ranked[1]), " < ".join(ranked[0]), ranked[0] == ranked[1]),
        ],
        conditions="requests that use few experts again and again. Against LRU on demand with as many slots, copies in vain on a full link cost what "
        f"foretelling gains: {times(*gains['lru'].values())}; against copies on demand with no slots {times(*gains['demand'].values())}, where "
        f"Accelerate, which copies so, leaves {times(*demand.values())}.",
        differs="a token takes "
        f"{', '.join(f'{x:.1f}' for x in slower.values())} times as long in theirs as copies and rooflines say here: the order of models is one of "
        "software, theirs and their peers', which is not modelled. Nor are their collection of activations and their eviction by ratio per request, "
        "in whose place are an assumed recall and counts over all requests.",
    )


def m2r2_study(bench: Bench) -> Section:
    """Distances of prediction, and recall."""
    model, cluster = model_of(layers=12, experts=32, top_k=2, hidden=1024, intermediate=1024), hosted("a100-80")
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(32), (400 * 12, 1)), axis=1)[:, :2].reshape(400, 12, 2)
    trace = bench.trace(model, ids)
    run: dict[str, Any] = {"tokens_per_device": 2, "mode": "decode", "context": 512}
    block_s = float(bench.run(trace, cluster, **run).step_s_S.mean()) / 12

    def way(copies: float) -> Fetching:
        """Copies of the two experts that a layer misses on the mean take `copies` times the layer."""
        speed = 2 * model.expert_B / (copies * block_s)
        return Fetching(alone_Bps=speed, beside_Bps=speed)

    kinds: dict[float, dict[int, float]] = {}
    for copies in (3.4, 0.85):
        demand = bench.run(trace, cluster, system=kept(Residency(share=0.5, way=way(copies))), **run)
        ahead = {j: kept(Residency(share=0.5, way=way(copies), prefetch=Residual(distance=j, recall=1.0))) for j in (1, 2, 3, 4, 6)}
        kinds[copies] = {j: step_gain(demand, bench.run(trace, cluster, system=system, **run)) for j, system in ahead.items()}
    bare = {}
    for share in (0.5, 0.75):
        slots = kept(Residency(share=share, way=way(3.4), prefetch=Residual(distance=3, recall=1.0)))
        bare[share] = step_gain(*(bench.run(trace, cluster, system=system, **run) for system in (kept(Residency(way=way(3.4))), slots)))
    partly = {}
    for recall in (0.0, 0.5, 0.9, 1.0):
        event = bench.run(trace, cluster, system=kept(Residency(share=0.5, way=way(3.4), prefetch=Residual(distance=1, recall=recall))), **run)
        assert event.copies is not None
        partly[recall] = event.copies.demanded
    quick = kinds[0.85]
    series = ", ".join(f"{times(gain)} at {distance}" for distance, gain in quick.items())
    rising = quick[2] > quick[1] and min(quick[j] for j in (2, 3, 4, 6)) >= 0.98 * max(quick.values())
    most = max(gain for found in kinds.values() for gain in found.values())
    return Section(
        name="m2r2",
        published="2.9x MoE decode, 2.8x self-speculative decode; the abstract gives neither machine nor model.",
        modelled="12 MoE layers, 2 tokens a step, slots for half of 32 experts, even routing, copies slowed until those of a "
        "layer take 3.4 and 0.85 times the layer. A step's first layer is on demand; those nearer than the distance are foretold when it begins.",
        claims=[
            structure(
                "what is not named becomes misses",
                list(partly.values()) == sorted(partly.values(), reverse=True),
                "/".join(map(str, partly.values())) + " on demand",
            ),
            structure("hiding copies at most halves a step", most <= 2.0, f"{times(most)} at most over on demand with as many slots"),
            band("gain rises with the distance, then stays", "until copies are hidden", series, rising),
            headline("decode over on demand", "2.9x", f"{times(max(bare.values()))} over no slots", max(bare.values()) >= 2.9),
        ],
        conditions="hiding copies behind computation at most halves a step, when both are as long: 2.9x is a gain over copies on demand without "
        f"slots, with the slower ones {' and '.join(f'{times(gain)} with slots for {share:.0%} of the experts' for share, gain in bare.items())}. "
        "One engine carries all copies, so a longer distance evens out layers but adds no bandwidth.",
        differs="what they compare with is not in the abstract; nor is which layers the stream names when a step begins.",
    )
