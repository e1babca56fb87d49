"""Event engine: equal to lockstep where nothing overlaps, and the laws of what does."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost import TRANSPORTS, CostModel
from moesim.errors import InputError, PlanError
from moesim.files import write_json
from moesim.hardware import Cluster, load_cluster, load_device, load_hosts
from moesim.hardware.profile import load_links
from moesim.model import ModelSpec
from moesim.plan import Placement, Plan, slots_per_device
from moesim.sim import simulate
from moesim.sim.event import EventResult, simulate_event
from moesim.systems import SYSTEMS, Exchange, Schedule
from moesim.trace import Trace, TraceWriter, load_trace

MODEL = tiny_model(layers=3, experts=32, top_k=4, hidden=2048, intermediate=1024, shared_intermediate=1024)


def plan_of(model: ModelSpec, devices: int, *, seed: int | None = None, spare: int = 0, dispatch: str = "even") -> Plan:
    """Experts in order, or shuffled with `spare` replicas per device."""
    rows = np.tile(np.arange(model.experts), (len(model.moe_layers), 1))
    if seed is not None:
        rng = np.random.default_rng(seed)
        extra = rng.integers(0, model.experts, (len(rows), spare * devices))
        rows = rng.permuted(np.concatenate([rows, extra], axis=1), axis=1)
    p = Placement(slots_LP=rows, slots_G=slots_per_device(rows.shape[1], devices), experts=model.experts, layers=model.moe_layers, dispatch=dispatch)
    return Plan(name="p", model=model.name, model_digest=model.digest, placement=p)


def trace_at(path: Path, model: ModelSpec, tokens: int, *, seed: int = 0) -> Trace:
    with TraceWriter(path, model, weights=False) as writer:
        writer.append(clustered_routing(model, tokens, clusters=8, seed=seed))
    return load_trace(path)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return trace_at(tmp_path_factory.mktemp("t") / "trace", MODEL, 1200)


def random_cluster(rng: np.random.Generator) -> Cluster:
    """Up to 16 devices of three kinds in equal or unequal nodes, with a network of any speed."""
    names = ("h100-sxm", "a100-80", "v100")
    regular = rng.random() < 0.5
    sizes = [int(rng.choice([2, 4]))] * int(rng.choice([2, 4])) if regular else [int(n) for n in rng.choice([1, 2, 4, 8], rng.integers(1, 3))]
    while sum(sizes) not in (2, 4, 8, 16):
        sizes.append(1)
    links = load_links()
    nodes = np.repeat(np.arange(len(sizes)), sizes)
    kinds = [load_device(rng.choice(names[:2] if regular else names)) for _ in sizes]
    return Cluster(
        name="random",
        title="random",
        devices=tuple(kinds[n] for n in nodes),
        node_G=nodes.astype(np.int32),
        intra_G=tuple(links["nvlink4" if rng.random() < 0.7 else "pcie4-x16"] for _ in nodes),
        network=replace(links["ib-hdr"], bandwidth_Bps=float(rng.uniform(1e9, 1e11))) if len(sizes) > 1 else None,
        oversubscription=float(rng.choice([1.0, 4.0])),
    )


@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([4, 64, 1024]))
def test_without_overlap_and_contention_it_is_the_lockstep_engine(seed: int, tokens: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = np.random.default_rng(seed)
    cluster = random_cluster(rng)
    bits = 8 if all("h100" in d.name for d in cluster.devices) else 16
    model = replace(MODEL, top_k=int(rng.integers(1, 5)), weight_bits=bits)
    if any(d.name == "v100" for d in cluster.devices):
        model = replace(model, weight_bits=32)
    trace = trace_at(tmp_path_factory.mktemp("t") / "trace", model, int(rng.integers(50, 900)), seed=seed)
    dispatch = str(rng.choice(["even", "static-source", "nearest"]))
    plan = plan_of(model, cluster.size, seed=seed, spare=int(rng.integers(0, 3)), dispatch=dispatch)
    equal = len(set(np.unique(cluster.node_G, return_counts=True)[1].tolist())) == 1
    transport = str(rng.choice([name for name, way in TRANSPORTS.items() if equal or way.algorithm == "flat"]))
    cost = CostModel.of(cluster, model, transport=transport)
    lockstep = simulate(trace, plan, cluster, tokens_per_device=tokens, cost=cost)
    event = simulate_event(trace, plan, cluster, tokens_per_device=tokens, cost=cost, mode=str(rng.choice(["prefill", "decode"])))  # type: ignore[arg-type]
    np.testing.assert_allclose(event.layer_s_SL, lockstep.layer_s_SL, rtol=1e-9)
    for name in ("dispatch_s_SL", "compute_s_SLG", "combine_s_SL", "tokens_SLG", "fanout_devices_L", "fanout_nodes_L"):
        np.testing.assert_array_equal(getattr(event, name), getattr(lockstep, name))
    np.testing.assert_allclose(event.traffic_B_LGG, lockstep.traffic_B_LGG, rtol=1e-12)
    assert event.bottlenecks == lockstep.bottlenecks
    assert set(event.notes) >= set(lockstep.notes)
    assert event.summary()["layer_time_s"] == pytest.approx(lockstep.summary()["layer_time_s"], rel=1e-9)


@pytest.mark.parametrize("name", ["h100x8", "h100-4x8"])
def test_a_training_layer_is_three_times_the_compute_and_twice_the_exchanges(routed: Trace, name: str) -> None:
    cluster = load_cluster(name)
    plan = plan_of(MODEL, cluster.size)
    lockstep = simulate(routed, plan, cluster, tokens_per_device=16)
    event = simulate_event(routed, plan, cluster, tokens_per_device=16, mode="training")
    expected = 2 * (lockstep.dispatch_s_SL + lockstep.combine_s_SL) + 3 * lockstep.compute_s_SLG.max(axis=2)
    np.testing.assert_allclose(event.layer_s_SL, expected, rtol=1e-9)
    assert {"optimizer", "reduce"} <= set(event.critical_path_s)


@pytest.mark.parametrize("system", sorted(SYSTEMS))
@pytest.mark.parametrize("contention", [False, True])
def test_paths_and_uses_add_up_for_every_system(routed: Trace, system: str, contention: bool) -> None:
    cluster = load_cluster("h100-4x8")
    if SYSTEMS[system].residency:  # one of them copies from an SSD
        cluster = replace(cluster, host_G=(load_hosts()["workstation"],) * 32)
    for mode in ("decode", "training"):
        if mode == "training" and (SYSTEMS[system].ring or SYSTEMS[system].residency or SYSTEMS[system].schedule.batches > 1):
            continue
        event = simulate_event(routed, plan_of(MODEL, 32), cluster, tokens_per_device=8, system=system, mode=mode, contention=contention)  # type: ignore[arg-type]
        assert sum(event.critical_path_s.values()) == pytest.approx(event.step_s_S.sum(), rel=1e-9)
        assert "nothing to do" not in event.critical_path_s
        assert all(0 <= share <= 1 + 1e-9 for share in event.stream_use.values())
        assert all(0 <= share <= 1 + 1e-9 for share in event.link_use.values())
        busy = sum(share for stream, share in event.stream_use.items() if stream.startswith("compute"))
        waited = sum(event.stall_s.values())
        idle = (32 - busy) * event.step_s_S.sum()
        assert waited <= idle * (1 + 1e-9)  # the last wait of each device is never ended by a task
        assert waited >= idle - 32 * event.layer_s_SL[-1].sum()
        json.dumps(event.to_dict(), allow_nan=False)


def test_contention_alone_changes_nothing_where_ports_are_the_narrowest(routed: Trace) -> None:
    cluster = load_cluster("h100x8")
    alone, shared = (simulate_event(routed, plan_of(MODEL, 8), cluster, tokens_per_device=256, contention=c) for c in (False, True))
    np.testing.assert_allclose(alone.layer_s_SL, shared.layer_s_SL, rtol=1e-9)


def test_an_oversubscribed_spine_slows_what_crosses_it_and_nothing_else(routed: Trace) -> None:
    plan = plan_of(MODEL, 32)
    full = load_cluster("h100-4x8")
    narrow = replace(full, oversubscription=8.0)

    def layer_s(cluster: Cluster, transport: str) -> float:
        cost = CostModel.of(cluster, MODEL, transport=transport)
        return float(simulate_event(routed, plan, cluster, tokens_per_device=512, cost=cost, contention=True).layer_s_SL.mean())

    assert layer_s(narrow, "nccl") > 1.5 * layer_s(full, "nccl"), "direct pairs cross rails"
    assert layer_s(narrow, "deepep-normal") == pytest.approx(layer_s(full, "deepep-normal"), rel=1e-9), "equal indices stay on their rail"


def test_overlap_is_never_slower_and_bounded_by_the_longest_stage(routed: Trace) -> None:
    cluster = load_cluster("h100-4x8")
    plan = plan_of(MODEL, 32)
    plain = simulate_event(routed, plan, cluster, tokens_per_device=4096)
    piped = simulate_event(routed, plan, cluster, tokens_per_device=4096, system=replace(SYSTEMS["plain"], schedule=Schedule(forward=(1, 2, 4))))
    assert (piped.layer_s_SL <= plain.layer_s_SL * (1 + 1e-9)).all()
    assert piped.layer_s_SL.sum() < plain.layer_s_SL.sum()
    assert (piped.layer_s_SL >= np.maximum(piped.dispatch_s_SL + piped.combine_s_SL, piped.compute_s_SLG.max(axis=2)) * (1 - 1e-9)).all()


def test_communication_that_takes_compute_slows_what_runs_beside_it(routed: Trace) -> None:
    cluster, plan = load_cluster("h100-4x8"), plan_of(MODEL, 32)

    def layer_s(degree: int, share: float) -> float:
        system = replace(SYSTEMS["plain"], exchange=Exchange(sm_share=share), schedule=Schedule(forward=(degree,)))
        return float(simulate_event(routed, plan, cluster, tokens_per_device=4096, system=system).layer_s_SL.mean())

    assert layer_s(1, 0.5) == pytest.approx(layer_s(1, 0.0), rel=1e-9), "nothing runs beside it"
    times = [layer_s(4, share) for share in (0.0, 0.2, 0.5)]
    assert times == sorted(times)
    assert times[2] > times[0]


def test_the_timeline_is_a_chrome_trace_without_overlaps_on_a_track(routed: Trace, tmp_path: Path) -> None:
    path = tmp_path / "out.json.gz"
    event = simulate_event(routed, plan_of(MODEL, 8), load_cluster("h100x8"), tokens_per_device=32, system="tutel", timeline=path)
    data = json.loads(gzip.decompress(path.read_bytes()))
    slices = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == event.tasks
    processes = {e["pid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "process_name"}
    assert processes[1] == "network"
    assert processes[4] == "device 2 (h100-sxm, node 0)"
    threads = {(e["pid"], e["tid"]) for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in slices} == threads
    for track in threads:
        mine = sorted((e["ts"], e["ts"] + e["dur"]) for e in slices if (e["pid"], e["tid"]) == track)
        assert all(round(b[0] * 1e3) >= round(a[1] * 1e3) for a, b in itertools.pairwise(mine))
    assert max(e["ts"] + e["dur"] for e in slices) == pytest.approx(event.step_s_S.sum() * 1e6, rel=1e-6)
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize("case", ["collectives", "copies"])
def test_the_timeline_obeys_the_rules_that_viewers_enforce(routed: Trace, tmp_path: Path, case: str) -> None:
    """Trace Event Format (Google, 2016) as the trace processor of Perfetto 52 reads it: what a slice and a name must hold, ids that
    it takes for no main thread, and slices of one thread that nest or are apart to the nanosecond, or it drops one."""
    cluster = replace(load_cluster("h100x8"), host_G=(load_hosts()["workstation"],) * 8)
    fsmoe = replace(SYSTEMS["fsmoe"], exchange=Exchange(transports=("nccl",), sm_share=0.1))
    system, mode = (fsmoe, "training") if case == "collectives" else (SYSTEMS["pre-gated"], "decode")  # whose copies give way to each other
    simulate_event(routed, plan_of(MODEL, 8), cluster, tokens_per_device=32, system=system, mode=mode, timeline=tmp_path / "t.json.gz")  # type: ignore[arg-type]
    data = json.loads(gzip.decompress((tmp_path / "t.json.gz").read_bytes()))
    assert data["displayTimeUnit"] in ("ms", "ns")
    assert isinstance(data["otherData"], dict)
    named: set[tuple[int, int]] = set()
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in data["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert type(event["pid"]) is int
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            value = event["args"]["sort_index" if event["name"] == "process_sort_index" else "name"]
            assert type(value) is (int if event["name"] == "process_sort_index" else str)
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
            continue
        assert type(event["tid"]) is int
        assert event["pid"] > 0
        assert event["tid"] not in (0, event["pid"])
        assert (event["pid"], event["tid"]) in named, "a track is named before its first slice"
        assert isinstance(event["name"], str)
        assert event["name"]
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        begin, long = round(event["ts"] * 1e3), round(event["dur"] * 1e3)
        assert (event["ts"], event["dur"]) == (begin / 1e3, long / 1e3), "whole nanoseconds"
        tracks.setdefault((event["pid"], event["tid"]), []).append((begin, begin + long))
    assert len({thread for _, thread in tracks}) == len(tracks), "no two processes share a thread id"
    for slices in tracks.values():
        ends: list[int] = []
        for begin, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1], "slices overlap in part"
            ends.append(end)


def test_a_failed_run_leaves_no_timeline(routed: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Iterator[object]:
        raise RuntimeError("broken")

    monkeypatch.setattr("moesim.sim.event.passes", broken)
    with pytest.raises(RuntimeError, match="broken"):
        simulate_event(routed, plan_of(MODEL, 8), load_cluster("h100x8"), timeline=tmp_path / "x.json.gz")
    assert not list(tmp_path.iterdir())


def files_of(trace: Trace, out: Path) -> tuple[str, ...]:
    """Digests of the result and the timeline of one run, written to `out`."""
    event = simulate_event(
        trace,
        plan_of(MODEL, 32),
        load_cluster("h100-4x8"),
        tokens_per_device=8,
        system="fsmoe",
        mode="training",
        contention=True,
        timeline=out / "t.json.gz",
    )
    write_json(out / "r.json", event.to_dict())
    return tuple(hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("r.json", "t.json.gz"))


def test_two_processes_write_the_same_bytes(routed: Trace, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_event import files_of, load_trace
print(*files_of(load_trace({str(routed.path)!r}), Path({str(tmp_path)!r})))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True).stdout.split()
    assert other == list(files_of(routed, tmp_path))


def test_what_is_wrong_is_said(routed: Trace) -> None:
    plan, cluster = plan_of(MODEL, 8), load_cluster("h100x8")
    with pytest.raises(InputError, match="system 'none' is unknown"):
        simulate_event(routed, plan, cluster, system="none")
    with pytest.raises(InputError, match="mode 'x' is unknown"):
        simulate_event(routed, plan, cluster, mode="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be >= 1"):
        simulate_event(routed, plan, cluster, tokens_per_device=0)
    with pytest.raises(InputError, match="inference only"):
        simulate_event(routed, plan, cluster, system="se-moe", mode="training")
    with pytest.raises(PlanError, match="made for 8 devices"):
        simulate_event(routed, plan, load_cluster("h100-4x8"))


def test_the_result_says_what_it_is(routed: Trace, tmp_path: Path) -> None:
    event = simulate_event(routed, plan_of(MODEL, 8), load_cluster("h100x8"), tokens_per_device=16, mode="decode", system="deepspeed-moe")
    assert isinstance(event, EventResult)
    data = event.to_dict()
    assert data["summary"]["engine"] == "event"
    assert data["event"]["system"] == data["inputs"]["system"] == "deepspeed-moe"
    assert any("not calibrated: attention" in line for line in data["notes"])
    write_json(tmp_path / "r.json", data)
