"""Residency in the event engine: copies on demand, ahead and one by one take their closed forms, and nothing is lost or gained."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost import CostModel
from moesim.cost.copies import ping_pong_s
from moesim.cost.offload import Fetching, ahead_layer_s, fetching, on_demand_s, one_by_one_s
from moesim.errors import InputError, ProfileError, TraceError
from moesim.files import write_json
from moesim.hardware import Cluster, load_cluster, load_device, load_hosts
from moesim.model import ModelSpec
from moesim.plan import CachePlan, Placement
from moesim.replay import All, Oracle, PreGated, Residual
from moesim.replay import Path as WholePath
from moesim.sim.event import EventResult, simulate_event
from moesim.sim.residency import one_expert_s
from moesim.studies.cases import Bench, Writer, cluster_of, plan_of, zipf_ids
from moesim.systems import SYSTEMS, Planes, Residency
from moesim.systems.fiddler import HOST
from moesim.systems.residency import foreseeing
from moesim.trace import Trace

MODEL = replace(tiny_model(layers=4, experts=16, top_k=1, hidden=512, intermediate=1024), layers=4, moe_layers=(0, 1, 2, 3))
WAY = Fetching(alone_Bps=12e9, beside_Bps=10e9, migrate_s=20e-6, sync_s=50e-6)


@pytest.fixture(scope="module")
def write() -> Iterator[Writer]:
    with Bench() as bench:
        yield bench.trace


def hosted(devices: int = 1, host: str = "workstation") -> Cluster:
    return replace(cluster_of("a100-80", 1, devices, fitted=False), host_G=(load_hosts()[host],) * devices)


def run(trace: Trace, residency: Residency | None, *, cluster: Cluster | None = None, tokens: int = 16, **options: Any) -> EventResult:
    where = cluster or hosted()
    given_options: dict[str, Any] = {"mode": "decode", "context": 64} | options
    system = replace(SYSTEMS["plain"], residency=residency)
    return simulate_event(trace, plan_of(trace.model, where.size), where, tokens_per_device=tokens, system=system, **given_options)


def cycle(write: Writer, distinct: int, *, model: ModelSpec = MODEL, steps: int = 3, tokens: int = 16) -> Trace:
    """Every layer of every step needs the same `distinct` experts."""
    return write(model, (np.arange(steps * tokens) % distinct)[:, None, None].repeat(len(model.moe_layers), axis=1))


@given(
    distinct=st.integers(1, 16),
    alone=st.floats(1e8, 1e12),
    beside=st.floats(1e8, 1e12),
    migrate=st.sampled_from([0.0, 1e-5, 3e-4]),
    sync=st.sampled_from([0.0, 1e-5, 3e-4]),
    bulk=st.booleans(),
)
@settings(max_examples=15)
def test_layers_take_their_closed_forms_on_demand_and_ahead(
    write: Writer, distinct: int, alone: float, beside: float, migrate: float, sync: float, bulk: bool
) -> None:
    trace = cycle(write, distinct)
    way = Fetching(alone_Bps=alone, beside_Bps=beside, migrate_s=migrate, sync_s=sync)
    block_s = run(trace, None).step_s_S[0] / 4
    expert_B = MODEL.expert_B
    demand = run(trace, Residency(way=way))
    first_s = float(on_demand_s(block_s, distinct, expert_B, way))
    np.testing.assert_allclose(demand.step_s_S, 4 * first_s, rtol=1e-9)
    ahead = run(trace, Residency(way=way, prefetch=PreGated(), bulk=bulk))
    steady_s = float(ahead_layer_s(block_s, distinct, expert_B, way, bulk=bulk))
    np.testing.assert_allclose(ahead.step_s_S, first_s + 3 * steady_s, rtol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8), st.integers(1, 9))
def test_one_by_one_is_ping_pong_with_two_buffers_and_more_buffers_are_never_slower(pairs: list[tuple[float, float]], buffers: int) -> None:
    loads, computes = zip(*pairs, strict=True)
    assert one_by_one_s(loads, computes) == pytest.approx(ping_pong_s(loads, computes))
    assert one_by_one_s(loads, computes, buffers=1) == pytest.approx(sum(loads) + sum(computes))
    times = [one_by_one_s(loads, computes, buffers=b) for b in (buffers, buffers + 1, None)]
    assert times[0] >= times[1] - 1e-12 >= times[2] - 2e-12
    assert times[2] >= max(sum(loads) + computes[-1], loads[0] + sum(computes)) - 1e-9


@pytest.mark.parametrize("buffers", [1, 2, 3, None])
@pytest.mark.parametrize("bandwidth_Bps", [1e10, 3e11])
def test_the_engine_runs_experts_one_by_one_as_the_closed_form(write: Writer, buffers: int | None, bandwidth_Bps: float) -> None:
    trace = write(MODEL, zipf_ids(64, MODEL, 0.7))
    way = Fetching(alone_Bps=bandwidth_Bps, beside_Bps=bandwidth_Bps)
    event = run(trace, Residency(way=way, order="one-by-one", buffers=buffers), tokens=64)
    cost = CostModel.of(hosted(), MODEL)
    for layer in range(4):
        tokens = np.bincount(trace.experts()[:, layer].ravel(), minlength=16)
        tokens = tokens[tokens > 0].astype(float)
        computes = one_expert_s(cost, "a100-80", tokens).tolist()
        expected = one_by_one_s([MODEL.expert_B / bandwidth_Bps] * len(tokens), computes, buffers=buffers)
        assert event.layer_s_SL[0, layer] == pytest.approx(expected, rel=1e-9)
        assert event.compute_s_SLG[0, layer, 0] == pytest.approx(sum(computes), rel=1e-9)


def test_what_fits_is_plain_and_what_is_not_named_is_on_demand(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(200, MODEL, 0.5))
    plain = run(trace, None)
    whole = run(trace, Residency(share=1.0, warm=True, way=replace(WAY, sync_s=0.0)))
    np.testing.assert_array_equal(whole.step_s_S, plain.step_s_S)
    assert whole.copies is not None
    assert whole.copies.hit_ratio == 1
    none, blind = (run(trace, Residency(share=0.5, way=WAY, prefetch=p)) for p in (None, Oracle(recall=0.0)))
    np.testing.assert_array_equal(none.step_s_S, blind.step_s_S)
    assert none.copies == blind.copies


@given(seed=st.integers(0, 99), share=st.sampled_from([None, 0.25, 0.5, 0.75]), policy=st.sampled_from(["lru", "fifo", "belady"]))
@settings(max_examples=8)
def test_knowing_a_layer_ahead_moves_copies_in_time_and_makes_none(write: Writer, seed: int, share: float | None, policy: str) -> None:
    trace = write(MODEL, zipf_ids(60, MODEL, 0.4, seed=seed))
    demand, known = (run(trace, Residency(share=share, policy=policy, way=WAY, prefetch=p), tokens=3).copies for p in (None, Oracle()))
    assert demand is not None
    assert known is not None
    assert known.hits == demand.hits
    assert known.known + known.demanded == demand.demanded
    assert known.wrong_B == 0


@given(seed=st.integers(0, 99), share=st.sampled_from([None, 0.25, 0.5]), recall=st.floats(0, 1), false=st.floats(0, 0.9), distance=st.integers(1, 3))
@settings(max_examples=10)
def test_experts_are_conserved(write: Writer, seed: int, share: float | None, recall: float, false: float, distance: int) -> None:
    trace = write(MODEL, zipf_ids(100, MODEL, 0.6, seed=seed))
    for prefetch in (Oracle(recall=recall, false=false, distance=distance), WholePath(recall=recall, false=false), All()):
        event = run(trace, Residency(share=share, way=WAY, prefetch=prefetch, seed=seed))
        found = event.copies
        assert found is not None
        assert found.asked == found.hits + found.demanded + found.known + found.on_host
        assert 0 <= found.timely <= found.known <= found.ahead
        assert found.demand_B == pytest.approx(found.demanded * MODEL.expert_B)
        assert found.ahead_B == pytest.approx(found.ahead * MODEL.expert_B)
        assert found.wrong_B == pytest.approx((found.ahead - found.known) * MODEL.expert_B)
        assert 0 <= found.timely_recall <= found.recall <= 1
        assert sum(event.critical_path_s.values()) == pytest.approx(event.step_s_S.sum(), rel=1e-9)
        assert "nothing to do" not in event.critical_path_s
        json.dumps(event.to_dict(), allow_nan=False)


def test_faster_copies_and_more_slots_are_never_slower_and_recall_pays(write: Writer) -> None:
    trace = write(MODEL, zipf_ids(320, MODEL, 0.8))
    ways = [replace(WAY, alone_Bps=b, beside_Bps=b) for b in (1e9, 4e9, 1.6e10, 1e11)]
    for prefetch in (None, Oracle(recall=0.7, false=0.2)):
        times = [run(trace, Residency(share=0.5, way=way, prefetch=prefetch)).step_s_S.sum() for way in ways]
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1]
    shares = [run(trace, Residency(share=share, way=WAY)).step_s_S.sum() for share in (None, 0.125, 0.25, 0.5, 1.0)]
    assert shares == sorted(shares, reverse=True)
    quick = replace(WAY, migrate_s=0.0, alone_Bps=2e10, beside_Bps=2e10)
    recalls = [run(trace, Residency(way=quick, prefetch=Oracle(recall=r))).step_s_S.sum() for r in (0.0, 1.0)]
    assert recalls[1] < recalls[0]


def test_copies_ahead_come_in_time_iff_the_link_is_fast(write: Writer) -> None:
    trace = cycle(write, 4)
    for bandwidth_Bps, timely in ((1e12, 1.0), (1e8, 0.0)):
        way = Fetching(alone_Bps=bandwidth_Bps, beside_Bps=bandwidth_Bps)
        found = run(trace, Residency(way=way, prefetch=PreGated())).copies
        assert found is not None
        assert found.recall == pytest.approx(3 / 4), "all layers but the first"
        assert found.timely_recall == pytest.approx(timely * 3 / 4)


def test_what_a_layer_waits_for_goes_before_copies_for_later_layers(write: Writer) -> None:
    """Copies for a later layer delay a layer's own by one expert at most, not by all of them."""
    trace = cycle(write, 2, steps=1)
    way = Fetching(alone_Bps=1e9, beside_Bps=1e9)
    base = run(trace, Residency(way=way, prefetch=Oracle(recall=0.0, distance=3)))
    crowded = run(trace, Residency(way=way, prefetch=Oracle(recall=1.0, false=0.875, distance=3)))
    assert crowded.copies is not None
    assert (crowded.copies.known, crowded.copies.ahead) == (2, 16), "for the last layer, when the first has its gate"
    assert np.diff(base.layer_s_SL[0, :3]).max() < 1e-12
    late = crowded.layer_s_SL[0, :3] - base.layer_s_SL[0, :3]
    assert (late <= MODEL.expert_B / 1e9 * (1 + 1e-9)).all()
    assert (late >= -1e-12).all()
    assert crowded.layer_s_SL[0, 3] < base.layer_s_SL[0, 3], "and it waits for nothing that is in vain"


def test_a_share_is_whole_slots_and_at_least_one() -> None:
    held = np.asarray([[16, 8, 1, 0]])
    assert Residency(share=0.01).slots(held).tolist() == [[1, 1, 1, 0]]
    assert Residency(share=0.3).slots(held).tolist() == [[4, 2, 1, 0]]
    assert Residency().slots(held).tolist() == [[0, 0, 0, 0]]


def test_experts_on_an_ssd_are_read_first_and_a_node_shares_its_ssd(write: Writer) -> None:
    trace = cycle(write, 4)
    way = replace(WAY, storage_Bps=2e9)
    block_s = run(trace, None).step_s_S[0] / 4
    event = run(trace, Residency(way=way, tier="nvme"))
    np.testing.assert_allclose(event.step_s_S, 4 * float(on_demand_s(block_s, 4, MODEL.expert_B, way, stored=True)), rtol=1e-9)
    assert event.copies is not None
    assert event.copies.stored_B == event.copies.demand_B
    assert event.critical_path_s["read"] == pytest.approx(3 * 4 * 4 * MODEL.expert_B / 2e9)
    half = np.zeros((4, 16), bool)
    half[:, :2] = True
    some = run(trace, Residency(way=way, stored_LE=half)).copies
    assert some is not None
    assert some.stored_B == some.demand_B / 2
    pair = run(cycle(write, 16, tokens=64), Residency(tier="nvme"), cluster=hosted(2), tokens=32)
    reads = sum(share for name, share in pair.stream_use.items() if name.startswith("nvme"))
    assert [name for name in pair.stream_use if name.startswith("nvme")] == ["nvme g0"]
    assert reads * pair.step_s_S.sum() == pytest.approx(3 * 4 * 16 * MODEL.expert_B / 3.5e9)


def test_pinned_experts_never_move_and_a_cache_plan_is_a_residency(write: Writer) -> None:
    trace = cycle(write, 8)
    tier_LE = np.ones((4, 16), np.uint8)
    tier_LE[:, :2], tier_LE[:, 2:4] = 0, 2
    plan = CachePlan(
        name="c",
        model=MODEL.name,
        model_digest=MODEL.digest,
        layers=MODEL.moe_layers,
        slots_LG=np.full((4, 1), 3),
        tier_LE=tier_LE,
        bits_LE=np.full((4, 16), 8.0),
        policy="lru",
        prefetcher="oracle",
        distance=2,
        recall=0.5,
    )
    residency = Residency.of(plan, way=replace(WAY, storage_Bps=3e9))
    assert residency.prefetch == Oracle(distance=2, recall=0.5)
    event = run(trace, residency)
    assert event.copies is not None
    assert event.copies.hits >= 3 * 4 * 2
    assert event.copies.demand_B == event.copies.demanded * MODEL.expert_B / 2, "8 of 16 bits"
    assert event.copies.stored_B > 0
    assert any("at the model's 16 bits" in note for note in event.notes)


def test_replicas_are_one_expert_to_the_device_that_holds_them_twice(write: Writer) -> None:
    """A device with two slots of an expert asks for it once; two devices that hold it each ask for themselves."""
    trace = write(MODEL, np.zeros((64, 4, 1), int))
    for devices, asked in ((1, 1), (2, 2)):
        rows = np.tile(np.concatenate([np.arange(16), [0, 0]]) if devices == 1 else np.concatenate([[0], np.arange(16), [0]]), (4, 1))
        placement = Placement(slots_LP=rows, slots_G=np.full(devices, 18 // devices), experts=16, layers=MODEL.moe_layers)
        for residency in (Residency(way=WAY), Residency(way=WAY, order="one-by-one"), Residency(share=0.1, policy="static", host=HOST, way=WAY)):
            system = replace(SYSTEMS["plain"], residency=residency)
            event = simulate_event(trace, plan_of(MODEL, placement), hosted(devices), tokens_per_device=64 // devices, system=system, mode="decode")
            assert event.copies is not None
            assert event.copies.asked == 4 * asked


def test_a_policy_that_knows_the_future_says_so(write: Writer) -> None:
    notes = run(cycle(write, 4), Residency(share=0.25, policy="belady", way=WAY)).notes
    assert any("knows the whole run" in note for note in notes)


def test_planes_are_bits_of_what_each_expert_wants(write: Writer) -> None:
    tokens = np.asarray([1.0, 8.0, 2.0, 4.0])
    planes = Planes(bits=(2.0, 1.0, 1.0), hot=0.25)
    assert planes.wanted(tokens).tolist() == [1, 3, 1, 2]
    assert Planes(bits=(4.0,)).wanted(tokens).tolist() == [1] * 4
    assert Planes(bits=(1.0, 1.0), hot=1.0).wanted(tokens).tolist() == [2] * 4
    trace = write(MODEL, zipf_ids(64, MODEL, 0.9))
    nested, apart = (
        run(trace, Residency(way=WAY, order="one-by-one", buffers=None, planes=replace(planes, nested=n)), tokens=64) for n in (True, False)
    )
    assert nested.step_s_S.sum() < apart.step_s_S.sum()


def test_the_timeline_names_copies_in_words(write: Writer, tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    run(cycle(write, 3), Residency(way=replace(WAY, storage_Bps=4e9), tier="nvme", prefetch=Residual(recall=1.0)), timeline=path)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"fetch 3 experts of layer 0", "prefetch 3 experts of layer 2", "read for device 0: prefetch 3 experts of layer 3", "sync"} <= names
    assert "read from SSD" in {event["args"].get("name") for event in events}


def test_profiles_feed_devices_from_their_own_memory_or_their_host() -> None:
    node = load_cluster("a100x8")
    host = fetching(node, 0, "ddr")
    assert host.alone_Bps == pytest.approx(0.81 * 31.5e9)
    assert host.sync_s == 0
    assert any("not calibrated" in note for note in host.notes)
    sn40l = replace(node, devices=(load_device("sn40l"),) * 8, host_G=())
    assert fetching(sn40l, 3, "ddr").alone_Bps == pytest.approx(0.8 * 125e9)
    assert fetching(hosted(), 0, "nvme").storage_Bps == 3.5e9


def test_what_is_wrong_is_said(write: Writer) -> None:
    trace = cycle(write, 2)
    with pytest.raises(ProfileError, match="device 0 has no host; name one in its"):
        run(trace, Residency(), cluster=cluster_of("a100-80", 1, 1, fitted=False))
    with pytest.raises(ProfileError, match="has no 'nvme'; it has ddr"):
        run(trace, Residency(tier="nvme"), cluster=hosted(1, "dgx-a100"))
    with pytest.raises(InputError, match="slots of -1"):
        run(trace, Residency(slots_LG=np.full((4, 1), -1)))
    with pytest.raises(InputError, match="slots of 1.5: a cache has whole slots"):
        run(trace, Residency(slots_LG=np.full((4, 1), 1.5)))
    with pytest.raises(InputError, match="share=0 of the experts stay"):
        Residency(share=0)
    with pytest.raises(InputError, match="share and slots_LG"):
        Residency(share=0.5, slots_LG=np.ones((4, 1), int))
    with pytest.raises(InputError, match=r"slots for \(2, 1\) layers and devices, the placement has \(4, 1\)"):
        run(trace, Residency(slots_LG=np.ones((2, 1), int)))
    fpga = replace(cluster_of("a100-80", 1, 1, fitted=False), devices=(load_device("zcu104"),))
    with pytest.raises(InputError, match=r"0 slots and 2 buffers of 3.15 MB do not fit the memory on the chip of device 0 \(zcu104\), 4.98 MB"):
        run(trace, Residency(order="one-by-one"), cluster=fpga)
    huge = replace(MODEL, hidden=1 << 17, intermediate=1 << 18)
    with pytest.raises(InputError, match=r"one expert of 206 GB do not fit the hbm of device 0"):
        run(write(huge, np.zeros((16, 4, 1), int)), Residency())
    with pytest.raises(InputError, match="inference only"):
        run(trace, Residency(way=WAY), mode="training")
    for residency in (None, Residency(way=WAY)):
        with pytest.raises(TraceError, match="holds no tokens, so there is no step to run"):
            run(write(MODEL, np.zeros((0, 4, 1), int)), residency)
    with pytest.raises(InputError, match="one-by-one"):
        Residency(planes=Planes(bits=(2.0,)))
    with pytest.raises(InputError, match="prefetcher 'affinity' is not made from a distance and a recall"):
        foreseeing("affinity", 1, 1.0)
    with pytest.raises(InputError, match="alone_Bps=0"):
        Fetching(alone_Bps=0, beside_Bps=1)
    with pytest.raises(InputError, match="ring and a residency"):
        replace(SYSTEMS["se-moe"], residency=Residency())
    with pytest.raises(InputError, match="policy 'no-such' is not installed"):
        run(trace, Residency(share=0.5, policy="no-such"))


def files_of(trace: Trace, out: Path) -> tuple[str, ...]:
    residency = Residency(share=0.5, way=WAY, prefetch=Residual(recall=0.6, false=0.4), seed=3)
    event = run(trace, residency, timeline=out / "t.json.gz")
    write_json(out / "r.json", event.to_dict())
    return tuple(hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("r.json", "t.json.gz"))


def test_two_processes_write_the_same_bytes(write: Writer, tmp_path: Path) -> None:
    trace = write(MODEL, zipf_ids(100, MODEL, 0.6))
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from moesim.trace import load_trace
from test_residency import files_of
print(*files_of(load_trace({str(trace.path)!r}), Path({str(tmp_path)!r})))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True).stdout.split()
    assert other == list(files_of(trace, tmp_path))
