"""CachePlan: what a valid one is, its file, and every mistake named with its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import OutputExists, PlanError
from moesim.hardware import load_cluster
from moesim.optimize.cache_problem import linear_plan
from moesim.plan import TIERS, CachePlan, load_cache_plan

MODEL = tiny_model()
PLAN = linear_plan(MODEL, load_cluster("h100x8"))  # 2 experts of each layer on each device


def cache_plan(**changes: Any) -> CachePlan:
    values: dict[str, Any] = {
        "name": "mine",
        "model": MODEL.name,
        "model_digest": MODEL.digest,
        "layers": MODEL.moe_layers,
        "slots_LG": np.ones((3, 8), int),
        "tier_LE": np.tile([0, 1, 1, 2], (3, 4)),
        "bits_LE": np.full((3, 16), 16.0),
        "policy": "lru",
        "placement": PLAN.digest,
    }
    return CachePlan(**values | changes)


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    tiers = np.array(draw(st.lists(st.lists(st.integers(0, 2), min_size=16, max_size=16), min_size=3, max_size=3)))
    slots = np.array(draw(st.lists(st.lists(st.integers(0, 16), min_size=8, max_size=8), min_size=3, max_size=3)))
    slots[:, 0] = np.maximum(slots[:, 0], (tiers == 0).sum(axis=1))
    return cache_plan(
        slots_LG=slots,
        tier_LE=tiers,
        bits_LE=np.array(draw(st.lists(st.lists(st.sampled_from([16.0, 8.0, 4.5]), min_size=16, max_size=16), min_size=3, max_size=3))),
        policy=draw(st.text(min_size=1)),
        prefetcher=draw(st.sampled_from(["none", "oracle"])),
        distance=draw(st.integers(0, 5)),
        recall=draw(st.floats(0, 1)),
        made_from={"seed": 1},
    )


@given(plans())
def test_a_file_holds_the_whole_plan(tmp_path_factory: pytest.TempPathFactory, plan: CachePlan) -> None:
    path = plan.save(tmp_path_factory.mktemp("plans") / "cache.json")
    again = load_cache_plan(path)
    assert again.to_dict() == plan.to_dict()
    assert again.digest == plan.digest
    with pytest.raises(OutputExists):
        plan.save(path)


def test_the_digest_names_the_decision_alone() -> None:
    plan = cache_plan()
    assert replace(plan, name="other", made_from={"seed": 3}).digest == plan.digest
    for change in ({"policy": "lfu"}, {"recall": 0.5}, {"slots_LG": np.full((3, 8), 2)}, {"bits_LE": np.full((3, 16), 8.0)}, {"placement": "x"}):
        assert replace(plan, **change).digest != plan.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots_LG": np.full((3, 8), 17)}, "layer 1, device 0: 17 slots are outside 0..16"),
        ({"slots_LG": np.full((3, 8), -1)}, "-1 slots are outside 0..16"),
        ({"slots_LG": np.ones((2, 8), int)}, "give one row per layer"),
        ({"slots_LG": np.ones((3, 8))}, "whole numbers"),
        ({"slots_LG": np.zeros((3, 8), int)}, "layer 1: 4 experts are pinned in 0 slots"),
        ({"tier_LE": np.full((3, 16), 3)}, "expected indices of hbm, host, nvme"),
        ({"tier_LE": np.ones((3, 8), int)}, "tiers and bits \\[layers, experts\\]"),
        ({"bits_LE": np.full((3, 16), np.nan)}, "layer 1, expert 0: nan bits per weight"),
        ({"bits_LE": np.zeros((3, 16))}, "0.0 bits per weight"),
        ({"policy": ""}, "name both"),
        ({"recall": 1.5}, "a share in 0..1"),
        ({"distance": -1}, "0 or more layers"),
    ],
)
def test_an_invalid_plan_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cache_plan(**change)


def test_bytes_are_pinned_experts_and_slots_for_the_largest_of_the_others() -> None:
    tiers, bits = np.ones((3, 16), int), np.full((3, 16), 8.0)
    tiers[:, 0], bits[:, 0], bits[:, 1] = 0, 16.0, 4.0
    plan = cache_plan(slots_LG=np.ones((3, 8), int), tier_LE=tiers, bits_LE=bits)
    held_B_G = plan.hbm_B_G(800, PLAN.placement.holds_LGE)
    assert held_B_G.tolist() == [3 * 1600.0] + [3 * 800.0] * 7  # device 0: a pinned expert of 16 bits; the others: a slot of 8 bits
    wide = replace(plan, slots_LG=np.full((3, 8), 2))
    assert wide.hbm_B_G(800, PLAN.placement.holds_LGE)[0] == 3 * (1600.0 + 400.0)  # what is left there has 4 bits


def test_it_fits_its_model_and_placement_only() -> None:
    cache_plan().check_fits(MODEL, PLAN)
    with pytest.raises(PlanError, match=r"mine.json: made for 'tiny' \(3 MoE layers x 16 experts\), not for 'tiny' \(2 x 8\)"):
        cache_plan().check_fits(tiny_model(layers=2, experts=8), PLAN, place="mine.json")
    with pytest.raises(PlanError, match="made for 8 devices, plan 'linear' has 32"):
        cache_plan().check_fits(tiny_model(), linear_plan(tiny_model(experts=32), load_cluster("h100-4x8")))
    with pytest.raises(PlanError, match="made for placement abc"):
        cache_plan(placement="abc").check_fits(MODEL, PLAN)
    crowded = cache_plan(tier_LE=np.tile(np.arange(16) >= 2, (3, 1)).astype(int))  # both experts of device 0 pinned in its one slot
    with pytest.raises(PlanError, match="layer 1, device 0: 2 experts are pinned in 1 slots"):
        crowded.check_fits(MODEL, PLAN)


def test_a_broken_file_is_named_mistake_by_mistake(tmp_path: Path) -> None:
    good = cache_plan().to_dict()
    path = tmp_path / "cache.json"

    def refused(change: dict[str, Any]) -> str:
        path.write_text(json.dumps(good | change))
        with pytest.raises(PlanError) as refusal:
            load_cache_plan(path)
        return str(refusal.value)

    both = refused({"kind": "placement", "colour": "red", "slots": [[1.5]], "prefetch": {"name": "none", "distance": 1}})
    for part in (str(path), "$.kind", "$.colour: unknown key", "$.slots[0][0]", "$.prefetch.recall: missing"):
        assert part in both
    shapes = refused({"slots": [[1], [1, 2], [1]], "tiers": good["tiers"][:2], "bits": [[16.0]] * 3})
    for part in ("$.slots[1] has 2 entries, expected 1", "$.tiers has 2 rows for 3 MoE layers", "$.bits[0] has 1 entries, expected 16"):
        assert part in shapes
    assert "'hbm', 'host' or 'nvme'" in refused({"tiers": [["tape"] * 16] * 3})
    assert "17 slots are outside 0..16" in refused({"slots": [[17] * 8] * 3})
    path.write_text("{")
    with pytest.raises(PlanError, match="not valid JSON"):
        load_cache_plan(path)
    assert TIERS == ("hbm", "host", "nvme")
