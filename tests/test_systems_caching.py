"""Caching systems against their structural checks and the public measurements: Pre-gated MoE to Fiddler, and their batching."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from systems_cases import Writer, cluster_of, plan_of, writer_in, zipf_ids

from moesim.cost import CostModel
from moesim.cost.copies import ping_pong_s
from moesim.cost.offload import Fetching, HostCompute, ahead_layer_s, crossover, fetching, on_demand_s, one_by_one_s
from moesim.errors import InputError
from moesim.hardware import Cluster, load_device, load_hosts
from moesim.model import ModelSpec
from moesim.replay import Events, Residual, replay
from moesim.sim.event import EventResult, simulate_event
from moesim.sim.residency import one_expert_s
from moesim.studies.published import CACHED, DISTINCT, EXPERT_B, READ_ME, SINGLE, SINGLE_LARGE, STORED
from moesim.studies.tiers import best_order_s
from moesim.systems import SYSTEMS, OneRoute, Regrouped, Residency, System, d2moe, expertflow, fiddler, pregated, readme, sn40l
from moesim.systems.batching import by_queue, by_route, needed, regroup
from moesim.trace import NO_EXPERT, Trace

MODEL = replace(tiny_model(layers=4, experts=16, top_k=1, hidden=512, intermediate=1024), layers=4, moe_layers=(0, 1, 2, 3))
COPYING = [name for name, system in SYSTEMS.items() if system.residency]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    return writer_in(tmp_path_factory.mktemp("traces"))


def hosted(device: str = "a100-80", devices: int = 1, host: str = "workstation") -> Cluster:
    return replace(cluster_of(device, 1, devices), host_G=(load_hosts()[host],) * devices)


def run(trace: Trace, system: System | str, cluster: Cluster | None = None, *, tokens: int = 16, **options: Any) -> EventResult:
    where = cluster or hosted()
    settings_: dict[str, Any] = {"mode": "decode", "context": 64} | options
    return simulate_event(trace, plan_of(trace.model, where.size), where, tokens_per_device=tokens, system=system, **settings_)


def test_ten_systems_copy_experts_and_run_on_several_devices(write: Writer) -> None:
    assert len(COPYING) == 10
    trace = write(MODEL, zipf_ids(128, 4, 16, 0.5))
    plain = run(trace, "plain", hosted(devices=2), tokens=8)
    for name in COPYING:
        event = run(trace, name, hosted(devices=2), tokens=8)
        found = event.copies
        assert found is not None
        assert found.asked == found.hits + found.demanded + found.known + found.on_host
        assert sum(event.critical_path_s.values()) == pytest.approx(event.step_s_S.sum(), rel=1e-9)
        assert event.step_s_S.sum() >= plain.step_s_S.sum() * (1 - 1e-9) or name == "read-me", "nothing is faster than experts in place"
        with pytest.raises(InputError, match="inference only"):
            run(trace, name, hosted(devices=2), mode="training")


# Pre-gated MoE: the authors' raw data, see moesim.studies.published


def within(found_ms: float, published_ms: float, tolerance: float) -> None:
    assert found_ms == pytest.approx(published_ms, rel=tolerance)


def test_blocks_on_demand_are_the_published_ones() -> None:
    large_B, base_B = EXPERT_B["large"], EXPERT_B["base"]
    for hit, demand_ms, _ in CACHED:
        within(1e3 * float(on_demand_s(pregated.LARGE_BLOCK_S, 1 - hit, large_B, pregated.WAY)), demand_ms, 0.025)
    for n, block_ms, _, demand_ms in DISTINCT:
        within(1e3 * float(on_demand_s(block_ms * 1e-3, n, base_B, pregated.WAY)), demand_ms, 0.05)
    for block_ms, _, demand_ms, _ in SINGLE.values():
        within(1e3 * float(on_demand_s(block_ms * 1e-3, 1, base_B, pregated.WAY)), demand_ms, 0.07)
    within(1e3 * float(on_demand_s(pregated.LARGE_BLOCK_S, 1, large_B, pregated.WAY)), SINGLE_LARGE[1], 0.025)
    ssd = replace(pregated.WAY, storage_Bps=pregated.STORAGE_BPS)
    for hit, stored_ms in STORED:
        within(1e3 * float(on_demand_s(pregated.LARGE_BLOCK_S, 1 - hit, large_B, ssd, stored=True)), stored_ms, 0.12)


def test_pre_gated_blocks_are_the_published_ones() -> None:
    base: dict[str, Any] = {"between_s": pregated.BASE_BETWEEN_S}
    large: dict[str, Any] = {"between_s": pregated.LARGE_BETWEEN_S}
    for n, block_ms, gated_ms, _ in DISTINCT:
        within(1e3 * float(ahead_layer_s(block_ms * 1e-3, n, EXPERT_B["base"], pregated.WAY, **base)), gated_ms, 0.10)
    for experts, (block_ms, gated_ms, _, whole_ms) in SINGLE.items():
        within(1e3 * float(ahead_layer_s(block_ms * 1e-3, 1, EXPERT_B["base"], pregated.WAY, **base)), gated_ms, 0.05)
        within(1e3 * float(ahead_layer_s(block_ms * 1e-3, experts, EXPERT_B["base"], pregated.WAY, bulk=True, **base)), whole_ms, 0.07)
    in_place, missing = (1e3 * float(ahead_layer_s(pregated.LARGE_BLOCK_S, n, EXPERT_B["large"], pregated.WAY, **large)) for n in (0, 1))
    for hit, _, gated_ms in CACHED:
        within(hit * in_place + (1 - hit) * missing, gated_ms, 0.025)
    within(missing, SINGLE_LARGE[0], 0.025)
    within(1e3 * float(ahead_layer_s(pregated.LARGE_BLOCK_S, 128, EXPERT_B["large"], pregated.WAY, bulk=True, **large)), SINGLE_LARGE[2], 0.05)


def test_pre_gating_lies_between_all_resident_and_on_demand(write: Writer) -> None:
    model = replace(MODEL, hidden=768, intermediate=3072, gated=False)
    trace = write(model, np.zeros((48, 4, 1), int))
    plain, demand = (run(trace, s) for s in ("plain", replace(SYSTEMS["plain"], residency=Residency())))
    gated = run(trace, "pre-gated")
    assert plain.step_s_S.sum() < gated.step_s_S.sum() < demand.step_s_S.sum()
    assert gated.copies is not None
    assert gated.copies.demanded == 3, "the first layer of each step"
    assert not any("EPYC" in note for note in gated.notes)
    assert any("EPYC" in note for note in run(trace, pregated.make(way=pregated.WAY)).notes)


def test_the_command_line_says_what_was_copied_and_what_host_is_missing(
    moesim: Callable[..., tuple[int, str, str]], tmp_path: Path, write: Writer
) -> None:
    trace, plan, bare = write(MODEL, zipf_ids(64, 4, 16, 0.4)), tmp_path / "plan.json", tmp_path / "bare.toml"
    bare.write_text('name = "bare"\ntitle = "No host"\n[[nodes]]\ndevice = "a100-80"\ndevices = 8\nlink = "nvlink3"\n')
    assert moesim("place", trace.path, "--cluster", "a100x8", "--solver", "linear", "-o", plan)[0] == 0
    simulate = ("simulate", trace.path, plan, "--system", "pre-gated", "--mode", "decode", "--tokens-per-device", "2")
    code, out, _ = moesim(*simulate, "--cluster", "a100x8")
    assert code == 0
    assert "experts in place 0.0% of" in out
    assert "in time" in out
    copies = json.loads(moesim(*simulate, "--cluster", "a100x8", "--json")[1])["event"]["copies"]
    assert copies["recall"] > 0.5
    assert copies["demanded"] + copies["known"] == copies["asked"]
    code, _, problem = moesim(*simulate, "--cluster", bare)
    assert code == 2
    assert "device 0 has no host; name one in its [[nodes]] table" in " ".join(problem.split())


# Batching

ROUTES = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(0, 10**6))


@given(shape=ROUTES, steps=st.integers(1, 6), window=st.integers(1, 4))
def test_regrouping_moves_tokens_and_needs_no_more_experts(shape: tuple[int, ...], steps: int, window: int) -> None:
    tokens, layers, selections, experts, seed = shape
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, experts, (tokens, layers, selections)).astype(np.uint16)
    ids[rng.random(ids.shape) < 0.1] = NO_EXPERT
    ends = np.sort(rng.choice(np.arange(1, tokens + 1), min(steps, tokens), replace=False))
    ends[-1] = tokens
    sizes = np.diff(ends, prepend=0).tolist()
    for order in (by_queue, by_route):
        moved = regroup(ids, ends, experts, window=window, order=order)
        assert sorted(moved.tolist()) == list(range(tokens))
        assert needed(ids[moved], sizes, experts) <= needed(ids, sizes, experts)
        for first in range(0, len(ends), window):  # nobody leaves the window
            begin, end = (ends[first - 1] if first else 0), ends[min(first + window, len(ends)) - 1]
            assert set(moved[begin:end].tolist()) == set(range(begin, end))
    assert regroup(ids, ends, experts, window=1, order=by_route).tolist() == list(range(tokens))


def test_regrouping_parts_two_kinds_of_tokens_and_queues_the_longest_first() -> None:
    kinds = np.asarray([0, 1] * 8)
    ids = np.stack([kinds, kinds + 2], axis=1)[:, :, None].astype(np.uint16)
    assert needed(ids, [8, 8], 4) == 8
    assert needed(ids[regroup(ids, np.asarray([8, 16]), 4, window=2, order=by_route)], [8, 8], 4) == 4
    queue = np.asarray([2, 0, 1, 0, 2, 0])[:, None, None].astype(np.uint16)
    assert by_queue(queue, [3, 3], 3).tolist() == [1, 3, 5, 0, 4, 2]
    with pytest.raises(InputError, match="by='size'"):
        Regrouped(by="size")  # type: ignore[arg-type]


def test_one_route_makes_layers_identical(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(64, 4, 16, 0.3))
    event = run(trace, replace(SYSTEMS["plain"], routing=OneRoute()), hosted(devices=4))
    assert (event.tokens_SLG == event.tokens_SLG[:, :1]).all()
    assert event.layer_s_SL == pytest.approx(event.layer_s_SL[:, :1].repeat(4, axis=1))


def test_read_me_lru_is_random_under_interleaved_requests_and_belady_above_it() -> None:
    events = Events.from_experts(np.random.default_rng(0).integers(0, 6, (20_000, 1, 1)), experts=6)
    for slots, (random, lru, belady) in READ_ME.items():
        found = replay(events, "lru", slots).hit_ratio
        assert found == pytest.approx(slots / 6, abs=0.023)
        assert found == pytest.approx(lru, abs=0.03)
        assert found == pytest.approx(random, abs=0.03)
        assert replay(events, "belady", slots).hit_ratio >= belady > lru, "the whole future is worth more than a queue"


def test_read_me_batches_need_fewer_experts(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(320, 4, 16, 0.2))
    queued, apart = (run(trace, replace(readme.make(), routing=routing)) for routing in (SYSTEMS["read-me"].routing, OneRoute()))
    assert queued.copies is not None
    assert apart.copies is not None
    assert queued.copies.asked < 0.8 * apart.copies.asked
    assert queued.step_s_S.sum() < apart.step_s_S.sum()


def test_expertflow_copies_what_is_foretold_and_regroups(write: Writer) -> None:
    kinds = np.random.default_rng(0).integers(0, 4, (400, 1)) * 4 + np.arange(4)
    trace = write(MODEL, (kinds % 16)[:, :, None])
    none, some, full = (run(trace, expertflow.make(recall=r, false=0.0, window=1)).copies for r in (0.0, 0.5, 1.0))
    assert none is not None
    assert some is not None
    assert full is not None
    assert none.known == 0
    assert 0 < some.known < full.known
    assert full.demanded < some.demanded < none.demanded
    grouped, apart = (run(trace, expertflow.make(window=w)).copies for w in (2, 1))
    assert grouped is not None
    assert apart is not None
    assert grouped.asked < apart.asked


# M2R2


def test_a_longer_distance_helps_until_copies_are_hidden_and_recall_decides_the_rest(write: Writer) -> None:
    model = replace(MODEL, layers=8, moe_layers=tuple(range(8)))
    trace = write(model, zipf_ids(240, 8, 16, 0.0))
    block_s = float(run(trace, "plain", tokens=2).step_s_S.mean()) / 8

    def time_s(distance: int, recall: float, copies: float) -> float:
        way = Fetching(alone_Bps=model.expert_B / (copies * block_s), beside_Bps=model.expert_B / (copies * block_s))
        residency = Residency(way=way, prefetch=Residual(distance=distance, recall=recall))
        return float(run(trace, replace(SYSTEMS["plain"], residency=residency), tokens=2).step_s_S.sum())

    for copies in (0.2, 0.45):  # two copies of a layer fit beside it: one layer of notice hides all but the first
        assert time_s(1, 1.0, copies) <= time_s(2, 1.0, copies) * (1 + 1e-9)
    recalls = [time_s(1, recall, 0.45) for recall in (0.0, 0.5, 1.0)]
    assert recalls == sorted(recalls, reverse=True)
    assert time_s(1, 1.0, 0.45) >= 0.5 * time_s(1, 0.0, 0.45), "hiding at most halves"


# D2MoE


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
@settings(max_examples=15)
def test_no_order_of_loads_and_computations_beats_johnsons(pairs: list[tuple[float, float]]) -> None:
    best = min(one_by_one_s(*zip(*order, strict=True), buffers=None) for order in itertools.permutations(pairs))
    assert best_order_s(*zip(*pairs, strict=True)) == pytest.approx(best)


def test_d2moe_gains_from_memory_and_nesting(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(256, 4, 16, 0.8))
    times = [run(trace, d2moe.make(share=share), tokens=64).step_s_S.sum() for share in (None, 0.25, 0.5, 1.0)]
    assert times == sorted(times, reverse=True)
    nested, apart = (run(trace, d2moe.make(nested=nested), tokens=64).step_s_S.sum() for nested in (True, False))
    assert 1 < apart / nested < 9 / 4, "9 bits against 4 for an expert that wants all planes"


# Edge-MoE and M3ViT on an FPGA


def fpga() -> tuple[Cluster, ModelSpec]:
    model = replace(tiny_model(layers=2, experts=16, top_k=1, hidden=192, intermediate=768, gated=False), layers=2, moe_layers=(0, 1))
    return replace(cluster_of("a100-80", 1, 1), devices=(load_device("zcu104"),)), model


@pytest.mark.parametrize("name", ["edge-moe", "m3vit"])
def test_fpga_layers_load_each_expert_once_and_hide_loads(write: Writer, name: str) -> None:
    cluster, model = fpga()
    way, cost = fetching(cluster, 0, "ddr"), CostModel.of(cluster, model)
    for tokens in (32, 512):
        trace = write(model, zipf_ids(tokens, 2, 16, 0.4))
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
    socket = replace(cluster_of("a100-80", 1, 1), devices=(load_device("sn40l"),))
    own = fetching(socket, 0, "ddr")
    plain, switched, queued = (run(trace, s, socket, tokens=1) for s in ("plain", sn40l.make(share=0.5), sn40l.make(share=0.5, queued=True)))
    np.testing.assert_allclose(switched.step_s_S - plain.step_s_S, model.expert_B / own.alone_Bps, rtol=1e-9)
    assert [name for name in switched.stream_use if name.startswith("memory")] == ["memory g0"]
    np.testing.assert_allclose(queued.step_s_S[2:], max(plain.step_s_S[0], own.migrate_s + model.expert_B / own.beside_Bps), rtol=1e-6)
    host = run(trace, sn40l.make(share=0.5), hosted("a100-80"), tokens=1)
    ratio = (host.step_s_S - run(trace, "plain", hosted("a100-80"), tokens=1).step_s_S).mean() / (switched.step_s_S - plain.step_s_S).mean()
    assert ratio == pytest.approx(own.alone_Bps / fetching(hosted("a100-80"), 0, "ddr").alone_Bps, rel=1e-9)


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
    trace = write(replace(MODEL, hidden=2048, intermediate=4096), zipf_ids(256, 4, 16, 1.2))
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
