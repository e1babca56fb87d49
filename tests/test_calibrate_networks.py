"""Fits of collective tables: known parameters come back, scores mean what they say, bad tables are refused."""

from __future__ import annotations

import csv
import datetime
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.fit import profile_text
from moesim.calibrate.networks import (
    cross_validate,
    deepep_tables,
    distinct_destinations,
    evaluate,
    fit_curve,
    fit_ports,
    nccl_tables,
    read_deepep,
    score_curve,
    score_ports,
    split_algorithms,
)
from moesim.calibrate.tables import load, nccl_points
from moesim.cost.collectives import CollectiveCurve, LinearPort, Ports, ProtocolPort, collective
from moesim.errors import InputError
from moesim.hardware.profile import load_device

TRUE = ProtocolPort(
    short_latency_s=5e-6,
    short_message_s=3e-7,
    short_bandwidth_Bps=8e9,
    long_floor_s=1.2e-5,
    long_latency_s=9e-6,
    long_message_s=2e-7,
    copy_bandwidth_Bps=7e11,
    port_bandwidth_Bps=6e11,
    ramp=0.5,
    ramp_B=1.5e7,
)
TRUE_PORTS = Ports(link=LinearPort(latency_s=4e-5, bandwidth_Bps=1.5e11), nic=LinearPort(latency_s=3e-5, bandwidth_Bps=4.5e10))
SIZES = 2 ** np.arange(9, 30)
NCCL_COLUMNS = ("nccl_version", "op", "dtype", "num_gpus", "bytes", "latency_ms")
DEEPEP_COLUMNS = (
    "mode",
    "ep_size",
    "gpus_per_node",
    "op",
    "tokens_per_rank",
    "hidden",
    "topk",
    "topk_groups",
    "dtype",
    "bandwidth_GBps",
    "latency_us",
)


def write(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def read_nccl(path):
    """Points of each op of a file."""
    return nccl_points(load(path)[1], place=str(path))[0]


def nccl_rows(op="all_to_all", dtype="half", noise=0.0, repeats=1, version="2.29.2", ranks=(2, 4, 8)):
    rng = np.random.default_rng(1)
    rows = []
    for n in ranks:
        curve = CollectiveCurve(name="true", op=op, port=TRUE, ranks=(2, 8))
        for size in SIZES:
            for _ in range(repeats):
                ms = float(curve.time_s(size, ranks=n)[0]) * 1e3 * np.exp(rng.normal(0, noise))
                rows.append((version, op, dtype, n, size, ms))
    return rows


def deepep_rows(mode):
    """A table as DeepEP would have printed it on hardware that behaves exactly as TRUE_PORTS."""
    rows = []
    for ep in (8, 16, 32, 64):
        for op, dtype in (("dispatch", "fp8"), ("combine", "bf16")):
            tokens = 4096 if mode == "normal" else 128
            row = [mode, ep, 8, op, tokens, 7168, 8, 4, dtype, 1.0, 1.0]
            rows.append(row)
    return rows


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    path = tmp_path_factory.mktemp("nccl") / "nccl.csv"
    rows = nccl_rows(noise=0.03, repeats=3) + nccl_rows(noise=0.03, dtype="int8")
    return write(path, NCCL_COLUMNS, rows)


@pytest.fixture
def exact(tmp_path):
    def table(mode):
        path = write(tmp_path / "deepep.csv", DEEPEP_COLUMNS, deepep_rows(mode))
        rows = deepep_rows(mode)
        for row, each in zip(rows, read_deepep(path), strict=True):
            seconds = float(each.predict(TRUE_PORTS).time_s_N)
            row[9] = each.time_s / seconds  # printed GB/s: the placeholder 1 GB/s scaled to the true time
            row[10] = seconds * 1e6
        return write(path, DEEPEP_COLUMNS, rows)

    return table


def test_noise_free_curve_comes_back(tmp_path):
    [points] = read_nccl(write(tmp_path / "t.csv", NCCL_COLUMNS, nccl_rows()))
    curve = fit_curve(points)
    assert score_curve(curve, points)["worst"] == pytest.approx(0.0, abs=0.02)
    assert curve.port.port_bandwidth_Bps == pytest.approx(TRUE.port_bandwidth_Bps, rel=0.02)
    assert curve.port.copy_bandwidth_Bps == pytest.approx(TRUE.copy_bandwidth_Bps, rel=0.02)
    assert curve.port.short_latency_s == pytest.approx(TRUE.short_latency_s, rel=0.05)
    assert curve.ranks == (2, 8)


def test_rank_counts_that_were_not_measured_are_predicted(tmp_path):
    [points] = read_nccl(write(tmp_path / "t.csv", NCCL_COLUMNS, nccl_rows(ranks=(2, 4, 8, 16, 32))))
    seen = fit_curve(points.at(np.isin(points.ranks_N, (2, 8))))
    assert score_curve(seen, points.at(points.ranks_N == 4))["mape"] < 0.02
    beyond = score_curve(seen, points.at(points.ranks_N > 8))
    assert beyond["mape"] < 0.1
    assert beyond["extrapolated"] == beyond["n"]


def test_cross_validation_under_noise(noisy):
    [points] = read_nccl(noisy)
    assert points.time_s_N.size == 63
    assert (points.spread_N > 0).all()
    scores = cross_validate(points)
    assert set(scores) == {"all", "large", *(f"ranks {n}{s}" for n in (2, 4, 8) for s in ("", " large"))}
    assert scores["all"]["n"] == 63 == sum(scores[f"ranks {n}"]["n"] for n in (2, 4, 8))
    assert 0.005 < scores["all"]["mape"] < 0.05
    assert scores["large"]["mape"] < 0.03
    assert scores["all"]["extrapolated"] >= 3


def test_cross_validation_sees_what_a_curve_cannot_know(tmp_path):
    """Every second size made twice as slow: held-out scores must be bad, or the check could not fail."""
    rows = [(*row[:-1], row[-1] * (1 + (i % 2))) for i, row in enumerate(nccl_rows())]
    [points] = read_nccl(write(tmp_path / "t.csv", NCCL_COLUMNS, rows))
    assert cross_validate(points)["all"]["mape"] > 0.3


def test_medians_pool_repeats_and_types_but_not_types_of_reductions(tmp_path):
    rows = [
        ("2.29.2", op, dtype, 8, 1024, ms)
        for op in ("all_to_all", "all_reduce")
        for dtype, ms in (("half", 1.0), ("half", 3.0), ("half", 1.5), ("int8", 9.0))
    ]
    rows.append(("2.23", "all_to_all", "half", 8, 1024, 77.0))
    reduce_, exchange = read_nccl(write(tmp_path / "t.csv", NCCL_COLUMNS, rows))
    assert (exchange.op, reduce_.op) == ("all_to_all", "all_reduce")
    assert (*exchange.time_s_N, *exchange.spread_N) == pytest.approx((0.00225, 8.0))
    assert (*reduce_.time_s_N, *reduce_.spread_N) == pytest.approx((0.0015, 2.0))


def test_only_all_reduce_is_split_where_the_switch_takes_over(tmp_path):
    rows = nccl_rows(op="all_reduce") + nccl_rows(op="all_gather")
    gather, reduce_ = read_nccl(write(tmp_path / "t.csv", NCCL_COLUMNS, rows))
    assert [part.op for part in split_algorithms(gather)] == ["all_gather"]
    assert [sorted(set(part.ranks_N)) for part in split_algorithms(reduce_)] == [[2, 4], [8]]


errors = st.lists(st.floats(-0.9, 3.0), min_size=1, max_size=30)


@settings(deadline=None)
@given(errors)
def test_scores_are_consistent(signed):
    measured = np.geomspace(1e-6, 1.0, len(signed))
    flags = np.zeros(len(signed), dtype=bool)
    score = evaluate(measured * (1 + np.array(signed)), measured, flags)
    assert score["n"] == len(signed)
    assert score["median_ape"] <= score["p90_ape"] + 1e-12 <= abs(score["worst"]) + 1e-11
    assert abs(score["bias"]) <= score["mape"] + 1e-12 <= abs(score["worst"]) + 1e-11


def test_nothing_to_score_is_refused():
    with pytest.raises(InputError, match="non-empty"):
        evaluate(np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool))


def test_distinct_destinations_closed_forms():
    assert distinct_destinations(256, 8, 1, 1, 1) == (1.0, 1.0)
    assert distinct_destinations(256, 1, 64, 8, 4) == (1.0, 1.0)
    # without group limit a device of 32 of 256 experts is missed with C(224,8)/C(256,8)
    missed = np.prod((224 - np.arange(8)) / (256 - np.arange(8)))
    devices, nodes = distinct_destinations(256, 8, 8, 1, 1)
    assert devices == pytest.approx(8 * (1 - missed), rel=0.005)
    assert nodes == 1.0
    limited = distinct_destinations(256, 8, 64, 8, 4)
    assert limited[1] <= 4.0 < distinct_destinations(256, 8, 64, 8, 8)[1]
    assert distinct_destinations(256, 8, 64, 8, 1)[1] == 1.0


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_exact_ports_come_back(exact, mode):
    exchanges = read_deepep(exact(mode))
    ports = fit_ports(exchanges)
    assert abs(score_ports(exchanges)["worst"]) < 0.02
    assert ports.nic.bandwidth_Bps == pytest.approx(TRUE_PORTS.nic.bandwidth_Bps, rel=0.03)
    assert ports.link.bandwidth_Bps == pytest.approx(TRUE_PORTS.link.bandwidth_Bps, rel=0.05)
    assert score_ports(exchanges)["extrapolated"] == 0
    left_out = score_ports(exchanges, leave_one_out=True)
    assert left_out["n"] == 8
    assert left_out["extrapolated"] >= 2  # the fewest and the most bytes lie outside the rest


def test_one_copy_per_node_in_normal_mode_one_per_expert_in_low_latency(exact):
    normal = [each for each in read_deepep(exact("normal")) if each.ranks == 32]
    few = [each for each in read_deepep(exact("low_latency")) if each.ranks == 32]
    token_B = 7168 * (1 + 4 / 128)
    assert few[0].traffic_GG.sum() == pytest.approx(32 * 128 * 8 * (token_B + 16))
    assert few[0].node_traffic_GM is None
    assert normal[0].node_traffic_GM.shape == (32, 4)
    assert normal[0].node_traffic_GM[0].sum() < normal[0].traffic_GG[0].sum() < 4096 * 8 * token_B
    assert normal[1].traffic_GG.sum() == pytest.approx(normal[0].traffic_GG.sum() * 2 / (1 + 4 / 128))


def test_fragments_load_as_a_profile(tmp_path, exact, noisy):
    date = datetime.date(2026, 11, 22)
    tables = nccl_tables(read_nccl(noisy), source="made up, test", date=date)
    tables += deepep_tables(exact("low_latency"), source="made up, test", date=date)
    text = profile_text({"collectives": tables})
    assert len(tomllib.loads(text)["collectives"]) == 2
    device = tmp_path / "dev.toml"
    made_up = 'source = "made up"\nconfidence = "assumed"\n'
    device.write_text(
        'name = "dev"\ntitle = "test device"\nkind = "gpu"\n'
        f"[compute]\n{made_up}flops = {{ bf16 = 1e15 }}\n"
        f'[[memories]]\nname = "hbm"\ncapacity = 8e10\nbandwidth = 3e12\n{made_up}' + text
    )
    curve, ports = (collective(fitted) for fitted in load_device(device).collectives)
    [points] = read_nccl(noisy)
    np.testing.assert_allclose(
        curve.time_s(points.bytes_N, ranks=points.ranks_N)[0],
        fit_curve(points).time_s(points.bytes_N, ranks=points.ranks_N)[0],
        rtol=2e-3,
    )
    assert not curve.time_s(points.bytes_N, ranks=points.ranks_N)[1].any()
    assert ports.nic.bandwidth_Bps == pytest.approx(TRUE_PORTS.nic.bandwidth_Bps, rel=0.03)
    residuals = tables[0]["residuals"]
    assert residuals["mape"] <= residuals["held_out_mape"]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("latency_ms", "fast", "'latency_ms', row 2: 'fast'"),
        ("latency_ms", "-1", "> 0"),
        ("latency_ms", "nan", "> 0"),
        ("bytes", "0", ">= 1"),
        ("num_gpus", "1", ">= 2"),
        ("num_gpus", "2.5", "whole"),
    ],
)
def test_bad_rows_are_named(tmp_path, column, value, message):
    good = ("2.29.2", "all_to_all", "half", 2, 512, 0.1)
    bad = dict(zip(NCCL_COLUMNS, good, strict=True)) | {column: value}
    path = write(tmp_path / "bad.csv", NCCL_COLUMNS, [good, bad.values()])
    with pytest.raises(InputError, match=message) as caught:
        read_nccl(path)
    assert "row 2" in str(caught.value)


def test_bad_tables_are_refused(tmp_path):
    good = ("2.29.2", "all_to_all", "half", 2, 512, 0.1)
    with pytest.raises(InputError, match=r"latency_ms missing"):
        read_nccl(write(tmp_path / "a.csv", NCCL_COLUMNS[:-1], [good[:-1]]))
    with pytest.raises(InputError, match="no row of a known collective"):
        read_nccl(write(tmp_path / "b.csv", NCCL_COLUMNS, []))
    with pytest.raises(InputError, match="op not of"):
        read_nccl(write(tmp_path / "c.csv", NCCL_COLUMNS, [("2.29.2", "gossip", *good[2:])]))
    with pytest.raises(InputError, match="readable"):
        read_nccl(tmp_path / "absent.csv")
    [points] = read_nccl(write(tmp_path / "d.csv", NCCL_COLUMNS, [good]))
    with pytest.raises(InputError, match="at least 8"):
        fit_curve(points)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [(0, "turbo", "turbo"), (8, "fp12", "fp12"), (1, 12, "divide"), (9, "", "bandwidth_GBps"), (4, "many", "tokens")],
)
def test_bad_exchanges_are_refused(tmp_path, index, value, message):
    rows = deepep_rows("normal")
    rows[0][index] = value
    with pytest.raises(InputError, match=message):
        read_deepep(write(tmp_path / "bad.csv", DEEPEP_COLUMNS, rows))


def test_a_tier_without_traffic_cannot_be_fitted(tmp_path):
    rows = [row for row in deepep_rows("low_latency") if row[1] == 8] * 2
    with pytest.raises(InputError, match="between nodes"):
        fit_ports(read_deepep(write(tmp_path / "one.csv", DEEPEP_COLUMNS, rows)))
