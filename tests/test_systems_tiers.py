"""Systems about where weights live and how they come, against their structural checks: D2MoE, Edge-MoE, M3ViT, SN40L, Fiddler."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost import CostModel
from moesim.cost.copies import PINNED_SHARE, ping_pong_s
from moesim.cost.offload import Fetching, HostCompute, crossover, fetching, one_by_one_s, shared_with_host
from moesim.errors import InputError
from moesim.hardware import Cluster, load_device, load_hosts
from moesim.model import ModelSpec
from moesim.sim.event import EventResult, simulate_event
from moesim.sim.residency import one_expert_s
from moesim.studies.cases import Bench, Writer, cluster_of, plan_of, zipf_ids
from moesim.studies.published import D2MOE_RATES
from moesim.studies.tiers import best_order_s, d2moe_rate, planes_of
from moesim.systems import SYSTEMS, Residency, System, d2moe, fiddler, sn40l
from moesim.trace import Trace

MODEL = replace(tiny_model(layers=4, experts=16, top_k=1, hidden=512, intermediate=1024), layers=4, moe_layers=(0, 1, 2, 3))


@pytest.fixture(scope="module")
def write() -> Iterator[Writer]:
    with Bench() as bench:
        yield bench.trace


def hosted(device: str = "a100-80", devices: int = 1, host: str = "workstation") -> Cluster:
    return replace(cluster_of(device, 1, devices, fitted=False), host_G=(load_hosts()[host],) * devices)


def run(trace: Trace, system: System | str, cluster: Cluster | None = None, *, tokens: int = 16, **options: Any) -> EventResult:
    where = cluster or hosted()
    settings_: dict[str, Any] = {"mode": "decode", "context": 64} | options
    return simulate_event(trace, plan_of(trace.model, where.size), where, tokens_per_device=tokens, system=system, **settings_)


# D2MoE


PIECE = st.tuples(st.floats(0, 1), st.floats(0, 1))


@given(st.lists(PIECE, min_size=1, max_size=5))
@settings(max_examples=15)
def test_the_best_order_of_single_pieces_is_johnsons(pairs: list[tuple[float, float]]) -> None:
    early = sorted((p for p in pairs if p[0] <= p[1]), key=lambda p: p[0])
    late = sorted((p for p in pairs if p[0] > p[1]), key=lambda p: -p[1])
    best = min(one_by_one_s(*zip(*order, strict=True), buffers=None) for order in itertools.permutations(pairs))
    assert best_order_s([[piece] for piece in pairs]) == pytest.approx(best)
    assert one_by_one_s(*zip(*early, *late, strict=True), buffers=None) == pytest.approx(best)


@given(st.lists(st.lists(PIECE, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=15)
def test_the_best_order_of_planes_is_that_of_all_interleavings(chains: list[list[tuple[float, float]]]) -> None:
    """An expert's lower planes come first: brute force over every order that keeps them so."""
    slots = [i for i, chain in enumerate(chains) for _ in chain]
    best = np.inf
    for order in set(itertools.permutations(slots)) if len(slots) <= 6 else ():
        left = [iter(chain) for chain in chains]
        best = min(best, one_by_one_s(*zip(*(next(left[i]) for i in order), strict=True), buffers=None))
    whole = [piece for chain in chains for piece in chain]
    assert best_order_s(chains) >= best_order_s([[piece] for piece in whole]) - 1e-12, "an order to keep never helps"
    assert best_order_s(chains) == pytest.approx(best) or len(slots) > 6


def test_no_schedule_of_the_engine_beats_the_best_order_of_planes(write: Writer) -> None:
    model = replace(MODEL, experts=8, hidden=1024, intermediate=2048)
    trace, cluster = write(model, zipf_ids(128, model, 0.7)), hosted("rtx-3060", host="edge")
    over = [run_over for bandwidth in (1e9, 2e10) for run_over in over_best(trace, cluster, bandwidth)]
    assert min(over) >= 1 - 1e-9
    assert min(over) < 1.01, "and it is met"


def over_best(trace: Trace, cluster: Cluster, bandwidth_Bps: float) -> Iterator[float]:
    """Layers of three schedules over the best order of their planes."""
    way, cost = Fetching(alone_Bps=bandwidth_Bps, beside_Bps=bandwidth_Bps), CostModel.of(cluster, trace.model)
    for hottest, progressive in ((True, True), (False, True), (False, False)):
        planned = d2moe.make(share=None, hottest_first=hottest, progressive=progressive).residency
        residency = replace(planned or Residency(), way=way, tier="ddr")
        event = run(trace, replace(SYSTEMS["plain"], residency=residency), cluster, tokens=64)
        assert residency.planes
        for step, layer in itertools.product(range(2), range(4)):
            loads = np.bincount(trace.experts()[64 * step : 64 * step + 64, layer].ravel(), minlength=8).astype(float)
            yield float(event.layer_s_SL[step, layer]) / best_order_s(planes_of(cost, "rtx-3060", loads, residency.planes, way))


def test_d2moe_tokens_per_second_with_200_mb_follow_from_those_with_1600() -> None:
    """66.45 tokens/s published with 200 MB, 83.14 with 1,600 MB; one number, what unpacking moves, is solved from the latter."""
    with Bench() as bench:
        few, many = (d2moe_rate(bench, size_B) for size_B in (2e8, 1.6e9))
    assert many == pytest.approx(D2MOE_RATES[1], rel=0.005), "solved"
    assert few == pytest.approx(D2MOE_RATES[0], rel=0.1), "and judged"


def test_d2moe_gains_from_memory_and_nesting(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(256, MODEL, 0.8))
    times = [run(trace, d2moe.make(share=share), tokens=64).step_s_S.sum() for share in (None, 0.25, 0.5, 1.0)]
    assert times == sorted(times, reverse=True)
    same = replace(d2moe.make(nested=False).residency or Residency(), share=0.25)
    nested, slots, memory = (
        run(trace, system, tokens=64).step_s_S.sum() for system in (d2moe.make(), replace(SYSTEMS["d2moe"], residency=same), d2moe.make(nested=False))
    )
    assert 1 < slots / nested < 9 / 4, "9 bits against 4 for an expert that wants all planes"
    assert memory > slots, "and the same memory holds fewer experts"


def test_unpacking_costs_the_same_for_every_plane_that_is_computed(write: Writer) -> None:
    trace, cluster = write(MODEL, zipf_ids(64, MODEL, 0.3)), hosted()
    system = d2moe.make(share=None)
    assert system.residency
    assert system.residency.planes
    free = replace(system, residency=replace(system.residency, planes=replace(system.residency.planes, unpack_B=0.0)))
    spent, bare = (run(trace, each, cluster, tokens=64).compute_s_SLG for each in (system, free))
    each_s = d2moe.UNPACK_B * MODEL.expert_parameters / CostModel.of(cluster, MODEL).peaks["a100-80"].memory_Bps
    for layer in range(4):
        tokens = np.bincount(trace.experts()[:, layer].ravel(), minlength=16).astype(float)
        planes = system.residency.planes.wanted(tokens[tokens > 0]).sum()
        assert (spent - bare)[0, layer, 0] == pytest.approx(planes * each_s, rel=1e-9)


def test_hot_planes_first_pay_where_loads_take_as_long_as_computation(write: Writer) -> None:
    model = replace(MODEL, hidden=2048, intermediate=4096)
    trace = write(model, zipf_ids(4096, model, 1.0))

    def layers_s(bandwidth_Bps: float, **changes: bool) -> tuple[float, float]:
        """Of all layers: elapsed time, and seconds of computation per byte loaded."""
        way = Fetching(alone_Bps=bandwidth_Bps, beside_Bps=bandwidth_Bps)
        residency = replace(d2moe.make(share=None, **changes).residency or Residency(), way=way, tier="ddr")
        event = run(trace, replace(SYSTEMS["plain"], residency=residency), tokens=1024, mode="prefill")
        assert event.copies is not None
        return float(event.layer_s_SL.sum()), float(event.compute_s_SLG.sum()) / event.copies.demand_B

    even_Bps = 1 / layers_s(1e12)[1]
    gains = []
    for longer in (8.0, 1.0, 0.125):  # loads than computation
        hot, by_id, whole = (
            layers_s(even_Bps / longer, **changes)[0] for changes in ({}, {"hottest_first": False}, {"hottest_first": False, "progressive": False})
        )
        assert by_id <= whole * (1 + 1e-9), "an expert that computes plane by plane is never later"
        gains.append(whole / hot)
    assert gains[1] > max(gains[0], gains[2])
    assert gains[1] > 1.05


def test_the_ssd_reads_the_next_plane_while_the_link_copies_this_one(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(64, MODEL, 0.3))
    way = Fetching(alone_Bps=2e9, beside_Bps=2e9, storage_Bps=2e9)
    residency = Residency(way=way, tier="nvme", order="one-by-one", buffers=None)
    event = run(trace, replace(SYSTEMS["plain"], residency=residency), tokens=64)
    assert event.copies is not None
    experts, each_s = event.copies.asked / 4, MODEL.expert_B / 2e9
    assert event.copies.stored_B == event.copies.demand_B == event.copies.asked * MODEL.expert_B
    assert event.layer_s_SL.mean() == pytest.approx((experts + 1) * each_s, rel=0.02), "two stages of equal length, and a short computation"


def test_bytes_are_those_of_the_planes_that_were_wanted(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(64, MODEL, 0.3))
    found = run(trace, d2moe.make(share=None, bits=(2.0, 1.0, 1.0), hot=0.0), tokens=64).copies
    every = run(trace, d2moe.make(share=None, bits=(2.0, 1.0, 1.0), hot=1.0), tokens=64).copies
    assert found is not None
    assert every is not None
    assert every.demand_B == every.demanded * MODEL.expert_parameters * 4 / 8
    assert 0.5 * every.demand_B < found.demand_B < every.demand_B


# Edge-MoE and M3ViT on an FPGA


def fpga() -> tuple[Cluster, ModelSpec]:
    model = replace(tiny_model(layers=2, experts=16, top_k=1, hidden=192, intermediate=768, gated=False), layers=2, moe_layers=(0, 1))
    return replace(cluster_of("a100-80", 1, 1, fitted=False), devices=(load_device("zcu104"),)), model


@pytest.mark.parametrize("name", ["edge-moe", "m3vit"])
def test_fpga_layers_load_each_expert_once_and_hide_loads(write: Writer, name: str) -> None:
    cluster, model = fpga()
    way, cost = fetching(cluster, 0, "ddr"), CostModel.of(cluster, model)
    for tokens in (32, 512):
        trace = write(model, zipf_ids(tokens, model, 0.4))
        event = run(trace, name, cluster, tokens=tokens)
        assert event.copies is not None
        assert [stream for stream in event.stream_use if stream != "compute g0"] == ["exchange", "memory g0"]
        asked = 0
        for layer in range(2):
            loads = np.bincount(trace.experts()[:, layer].ravel(), minlength=16).astype(float)
            loads = loads[loads > 0]
            asked += len(loads)
            spent = one_expert_s(cost, "zcu104", loads, on_chip=True)
            assert event.layer_s_SL[0, layer] == pytest.approx(ping_pong_s(np.full(len(loads), model.expert_B / way.alone_Bps), spent), rel=1e-9)
        assert event.copies.demand_B == asked * model.expert_B, "distinct experts, not tokens"
        assert event.copies.demand_B <= tokens * 2 * model.expert_B, "which is the sign of the energy: fewer bytes, the same operations"


def test_a_switch_of_task_costs_nothing_and_buffers_do_not_grow(write: Writer) -> None:
    cluster, model = fpga()
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 8, (32, 2, 1)), rng.integers(8, 16, (32, 2, 1))
    alone = [run(write(model, ids), "m3vit", cluster, tokens=32).step_s_S[0] for ids in (first, second)]
    both = run(write(model, np.concatenate([first, second])), "m3vit", cluster, tokens=32)
    np.testing.assert_allclose(both.step_s_S, alone, rtol=1e-9)
    wide = replace(model, experts=1024)
    run(write(wide, rng.integers(0, 1024, (32, 2, 1))), "m3vit", cluster, tokens=32)  # 1,024 experts pass the same two buffers


# SN40L


def test_a_switch_of_models_takes_bytes_over_ddr_and_a_queue_hides_it(write: Writer) -> None:
    model = replace(tiny_model(layers=1, experts=8, top_k=1, hidden=8192, intermediate=65536), layers=1, moe_layers=(0,))
    trace = write(model, np.arange(24)[:, None, None] % 8)
    socket = replace(cluster_of("a100-80", 1, 1, fitted=False), devices=(load_device("sn40l"),))
    own = fetching(socket, 0, "ddr")
    plain, switched, queued = (run(trace, s, socket, tokens=1) for s in ("plain", sn40l.make(share=0.5), sn40l.make(share=0.5, queued=True)))
    np.testing.assert_allclose(switched.step_s_S - plain.step_s_S, model.expert_B / own.alone_Bps, rtol=1e-9)
    assert [name for name in switched.stream_use if name.startswith("memory")] == ["memory g0"]
    np.testing.assert_allclose(queued.step_s_S[2:], max(plain.step_s_S[0], own.migrate_s + model.expert_B / own.beside_Bps), rtol=1e-6)
    host = run(trace, sn40l.make(share=0.5), hosted("a100-80"), tokens=1)
    ratio = (host.step_s_S - run(trace, "plain", hosted("a100-80"), tokens=1).step_s_S).mean() / (switched.step_s_S - plain.step_s_S).mean()
    assert ratio == pytest.approx(own.alone_Bps / fetching(hosted("a100-80"), 0, "ddr").alone_Bps, rel=1e-9)
    sockets = [8 * own.alone_Bps / (PINNED_SHARE * link_Bps) for link_Bps in (64e9, 32e9)]
    assert sockets == pytest.approx([15, 31], rel=0.03), "the published 15-31x of eight sockets: the profile's bandwidth is derived from it"


# Fiddler


@given(
    flops=st.floats(1e11, 1e13), memory=st.floats(1e10, 5e11), launch=st.floats(0, 1e-4), link=st.floats(1e9, 1e11), device_s=st.floats(1e-6, 1e-3)
)
def test_one_crossover_that_falls_with_the_links_speed(flops: float, memory: float, launch: float, link: float, device_s: float) -> None:
    host = HostCompute(flops=flops, memory_Bps=memory, launch_s=launch)
    tokens = np.arange(1, 2001)
    size = {"parameters": 1e7, "expert_B": 2e7, "moved_B": 8e3}
    points = []
    for faster in (1.0, 2.0, 8.0):
        host_s = host.expert_s(tokens, link_Bps=link * faster, **size)
        copied_s = np.full(2000, 2e7 / (link * faster) + device_s)
        points.append(crossover(host_s, copied_s))
        assert (host_s[: points[-1] - 1] < copied_s[: points[-1] - 1]).all()
        assert (host_s[points[-1] - 1 :] >= copied_s[points[-1] - 1 :]).all()
    compute_each_s, moved_s = 2e7 / flops, 8e3 / link
    if compute_each_s > moved_s:  # else a faster link helps the host's way more
        assert points == sorted(points, reverse=True)


def test_the_host_computes_what_it_computes_sooner_and_never_slows_a_layer(write: Writer) -> None:
    trace = write(replace(MODEL, hidden=2048, intermediate=4096), zipf_ids(256, MODEL, 1.2))
    still = replace(SYSTEMS["plain"], residency=Residency(share=0.25, policy="static"))
    slow = fiddler.make(host=HostCompute(flops=1e9, memory_Bps=1e8))
    for tokens in (2, 32):
        copied, mixed, never = (run(trace, s, tokens=tokens) for s in (still, "fiddler", slow))
        assert mixed.copies is not None
        assert never.copies is not None
        assert mixed.copies.on_host > 0
        assert (mixed.layer_s_SL <= copied.layer_s_SL * (1 + 1e-9)).all()
        assert mixed.step_s_S.sum() < copied.step_s_S.sum()
        assert never.copies.on_host == 0
        np.testing.assert_allclose(never.step_s_S, copied.step_s_S, rtol=1e-12)
        assert {"d2h g0", "host g0"} <= set(mixed.stream_use)
        np.testing.assert_allclose(mixed.tokens_SLG, copied.tokens_SLG, err_msg="tokens count wherever they are computed")
    with pytest.raises(InputError, match="moves none"):
        Residency(policy="lru", host=HostCompute(flops=1e12, memory_Bps=1e11))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 2)), min_size=1, max_size=8), st.floats(0, 1))
def test_host_and_device_beside_each_other_end_no_later_than_each_for_itself(experts: list[tuple[float, float, int]], resident_s: float) -> None:
    host, device, event = (np.asarray(column) for column in zip(*experts, strict=True))
    ours = shared_with_host(host, device, event, np.full(3, resident_s))
    for n in range(3):
        mine = event == n

        def ends_s(on_host: Any, mine: Any = mine) -> float:
            return max(float(host[mine][on_host].sum()), resident_s + float(device[mine][~on_host].sum()))

        found = ends_s(ours[mine])
        assert found <= ends_s(host[mine] < device[mine]) + 1e-12
        assert found <= ends_s(np.zeros(mine.sum(), bool)) + 1e-12
        best = min(ends_s(np.asarray(choice, bool)) for choice in itertools.product((0, 1), repeat=int(mine.sum())))
        assert found <= best + max([0.0, *np.minimum(host, device)[mine]]) + 1e-12, "an expert less than perfect at most"


def test_the_host_does_not_wait_for_copies_and_prefill_gains_what_is_in_place(write: Writer) -> None:
    """Mixtral's share of experts per token; every expert is asked for, a quarter is in place: at most 4/3 over copying all."""
    model = replace(MODEL, experts=8, hidden=2048, intermediate=8192)
    trace = write(model, zipf_ids(1024, model, 0.0))
    bare = replace(SYSTEMS["plain"], residency=Residency())
    whole, each, beside = (
        run(trace, system, tokens=512, mode="prefill")
        for system in (bare, "fiddler", fiddler.make(host=replace(fiddler.HOST, flops=4e12, beside=True)))
    )
    assert each.copies is not None
    assert beside.copies is not None
    assert each.copies.on_host == 0
    assert 1.2 < whole.step_s_S.sum() / each.step_s_S.sum() <= 4 / 3
    assert 0 < beside.copies.on_host < each.copies.demanded
    assert beside.step_s_S.sum() < each.step_s_S.sum()
    busy = beside.stream_use
    assert busy["host g0"] + busy["h2d g0"] > 1, "at the same time"
