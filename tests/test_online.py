"""Planning while serving: totals add up, nothing is worse than standing still by more than its copies, drift is followed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model

from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.optimize import online
from moesim.plan import Placement

MODEL = tiny_model(top_k=4, hidden=2048, intermediate=1408)
CLUSTER = load_cluster("h100x8")
LINEAR = Placement(slots_LP=np.tile(np.arange(16), (3, 1)), slots_G=np.full(8, 2), experts=16, layers=MODEL.moe_layers)
WINDOW = 600


def shifting(windows_before, windows_after):
    """Traffic of one kind, then of another in which every expert has another's role."""
    name = np.random.default_rng(3).permutation(16).astype(np.uint16)
    before = clustered_routing(MODEL, WINDOW * windows_before)
    after = name[clustered_routing(MODEL, WINDOW * windows_after, seed=1)]
    return np.concatenate([before, after])


def by_name(section):
    return {row["name"]: row for row in section["habits"]}


def test_it_follows_a_drift_and_pays_for_its_copies(make_trace):
    section = online(make_trace(MODEL, shifting(1, 4)), CLUSTER, window=WINDOW, every=2, time_limit_s=10.0)
    rows = by_name(section)
    static, eplb, ours = rows["static"], rows["eplb every 2"], rows["ours"]
    assert section["windows_served"] == 4
    for row in rows.values():
        assert row["total_s"] == pytest.approx(sum(row["served_s_W"]) + sum(row["stall_s_W"]))
        assert row["stalled_s"] == pytest.approx(sum(row["stall_s_W"]))
        assert (row["stalled_s"] > 0) == (row["moves"] > 0)
    assert static["moves"] == 0
    assert ours["total_s"] < static["total_s"]
    assert ours["gain_of_ours"] == 0.0
    assert static["gain_of_ours"] == pytest.approx(1 - ours["total_s"] / static["total_s"])
    assert eplb["plans"] <= 2
    # one window of delay to see the new traffic, one to prove a plan on it, then it is quicker in every window
    assert all(mine < theirs for mine, theirs in zip(ours["served_s_W"][2:], static["served_s_W"][2:], strict=True))
    json.dumps(section, allow_nan=False)


def test_a_plan_is_taken_only_if_a_window_it_has_not_seen_pays_for_it(make_trace):
    """Every decision's figures: net = gain - copies; taken if and only if the best candidate's is above 0."""
    section = online(make_trace(MODEL, shifting(1, 3)), CLUSTER, window=WINDOW, first=LINEAR, steps_per_window=50.0, time_limit_s=10.0)
    assert section["windows_served"] == 4
    assert section["decisions"][0]["judged"] == []
    for decision in section["decisions"]:
        assert decision["taken"] == any(row["net_s"] > 0 for row in decision["judged"])
        for row in decision["judged"]:
            assert row["net_s"] == pytest.approx(row["gain_s"] - row["copies_s"])


def test_when_windows_are_too_short_nothing_moves(make_trace):
    """Copies cost more than a millionth of a step can gain."""
    section = online(make_trace(MODEL, shifting(1, 2)), CLUSTER, window=WINDOW, first=LINEAR, steps_per_window=1e-6, time_limit_s=10.0)
    rows = by_name(section)
    assert rows["ours"]["moves"] == 0
    assert rows["ours"]["total_s"] == pytest.approx(rows["static"]["total_s"])


def test_a_budget_holds_for_every_move(make_trace):
    section = online(make_trace(MODEL, shifting(1, 3)), CLUSTER, window=WINDOW, first=LINEAR, most_moves=5, solver="greedy")
    assert all(row["moves"] <= 5 for decision in section["decisions"] for row in decision["judged"])


@pytest.mark.parametrize("window", [0, 2000, 10**9])
def test_too_few_windows_are_refused(make_trace, window):
    with pytest.raises(InputError, match="give at least 3"):
        online(make_trace(MODEL, shifting(1, 2)), CLUSTER, window=window)


def test_on_the_command_line(make_trace, moesim, tmp_path):
    trace = make_trace(MODEL, shifting(1, 3))
    out = tmp_path / "online.json"
    code, text, _ = moesim("place", trace.path, "--online", WINDOW, "--solver", "greedy", "-o", out)
    assert code == 0
    assert "gain of ours" in text
    assert json.loads(out.read_text())["online"]["windows_served"] == 3
    assert moesim("place", trace.path, "--online", WINDOW, "--rules", out, "-o", tmp_path / "other.json")[0] == 2
