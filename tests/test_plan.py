"""Placements and plans: invalid ones cannot be built, migrations are cheapest, files are checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import OutputExists, PlanError
from moesim.plan import Placement, Plan, load_plan, slots_per_device


def placement(slots: object, per_device: object = (2, 2), experts: int = 4, **more: object) -> Placement:
    rows = np.asarray(slots)
    return Placement(slots_LP=rows, slots_G=np.asarray(per_device), experts=experts, layers=tuple(range(len(rows))), **more)


@st.composite
def placements(draw: st.DrawFn, devices: int = 4, experts: int = 8, layers: int = 2) -> Placement:
    extra = draw(st.integers(0, 2)) * devices
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, extra)])) for _ in range(layers)]
    return placement(np.stack(rows), slots_per_device(experts + extra, devices), experts)


@pytest.mark.parametrize(
    ("slots", "per_device", "message"),
    [
        ([[0, 1, 2, 2]], (2, 2), "layer 0: expert 3 has no slot"),
        ([[0, 1, 2, 9]], (2, 2), r"layer 0, slot 3 \(device 1\): expert 9 is outside 0..3"),
        ([[0, 1, 2, 3]], (2, 1), "in all 3, but every layer lists 4"),
        ([[0, 1, 2, 3]], (5, -1), "own"),
        ([[0.0, 1, 2, 3]], (2, 2), "whole numbers"),
        ([0, 1, 2, 3], (2, 2), "must be"),
    ],
)
def test_an_invalid_placement_cannot_be_built(slots: object, per_device: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Placement(slots_LP=np.asarray(slots), slots_G=np.asarray(per_device), experts=4, layers=(0,))


def test_an_unknown_dispatch_rule_lists_the_known() -> None:
    with pytest.raises(PlanError, match="even, static-source, nearest"):
        placement([[0, 1, 2, 3]], dispatch="magic")


def test_slots_that_do_not_divide_name_the_nearest_that_do() -> None:
    with pytest.raises(PlanError, match="use 16 or 24 slots"):
        slots_per_device(20, 8)


def test_arrays_cannot_be_changed_behind_the_plan() -> None:
    with pytest.raises(ValueError, match="read-only"):
        placement([[0, 1, 2, 3]]).slots_LP[0, 0] = 1


@given(old=placements(), new=placements())
def test_a_migration_brings_every_missing_expert_once_and_nothing_else(old: Placement, new: Placement) -> None:
    moves = old.diff(new, node_G=[0, 0, 1, 1])
    held = old.holds_LGE.copy()
    for layer, expert, source, target in moves.moves_M4:
        assert old.holds_LGE[layer, source, expert], "copied from a device that has it"
        assert not held[layer, target, expert], "copied once"
        held[layer, target, expert] = True
    assert (held | ~new.holds_LGE).all()
    assert len(moves) == (new.holds_LGE & ~old.holds_LGE).sum(), "no cheaper way exists"
    assert moves.bytes_GG(10.0).sum() == 10.0 * len(moves)
    assert len(old.diff(old)) == 0


def test_a_migration_prefers_the_own_node() -> None:
    old = placement([[0, 1, 0, 1]], (1, 1, 1, 1), 2)
    new = placement([[0, 0, 0, 1]], (1, 1, 1, 1), 2)
    assert old.diff(new, node_G=[0, 0, 1, 1]).moves_M4.tolist() == [[0, 0, 0, 1]]


def test_slots_within_a_device_are_interchangeable() -> None:
    assert len(placement([[0, 1, 2, 3]]).diff(placement([[1, 0, 3, 2]]))) == 0


def make_plan() -> Plan:
    model = tiny_model(layers=2, experts=4)
    p = Placement(slots_LP=np.array([[0, 1, 2, 3], [3, 2, 1, 0]]), slots_G=np.array([2, 2]), experts=4, layers=model.moe_layers)
    return Plan(name="mine", model=model.name, model_digest=model.digest, placement=p, made_from={"seed": 1}, solution={"gap": None})


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan()
    again = load_plan(plan.save(tmp_path / "plan.json"))
    assert again.placement == plan.placement
    assert (again.name, again.digest, again.made_from, again.solution) == (plan.name, plan.digest, plan.made_from, plan.solution)
    with pytest.raises(OutputExists, match="--force"):
        plan.save(tmp_path / "plan.json")


def test_a_plan_for_another_model_or_device_count_is_refused() -> None:
    plan = make_plan()
    plan.check_fits(tiny_model(layers=2, experts=4), 2)
    with pytest.raises(PlanError, match="2 MoE layers x 4 experts.*not for 'tiny'"):
        plan.check_fits(tiny_model(layers=3, experts=4), 2)
    with pytest.raises(PlanError, match="made for 2 devices, the cluster has 8"):
        plan.check_fits(tiny_model(layers=2, experts=4), 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [[0, 1, 2, "3"], [3, 2, 1, 0]]}, r"\$\.slots\[0\]\[3\]"),
        ({"slots": [[0, 1, 2], [3, 2, 1, 0]]}, "rows have"),
        ({"slots": [[0, 1, 2, 3], [3, 2, 1, 1]]}, "layer 2: expert 0 has no slot"),
        ({"extra": 1}, r"\$\.extra: unknown key"),
        ({"schema_version": 2, "kind": "cache"}, r"\$\.schema_version.*\$\.kind"),
    ],
)
def test_every_mistake_of_a_plan_file_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = make_plan().save(tmp_path / "plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlanError, match=message):
        load_plan(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", "[" * 100_000, "\x00"])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json"):
        load_plan(tmp_path / "plan.json")
