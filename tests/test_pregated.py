"""Pre-gated MoE against its authors' raw measurements: all tables by one set of constants, and each by those of the others."""

from __future__ import annotations

import pytest

from moesim.cost.offload import fetching
from moesim.studies.caching import hosted
from moesim.studies.pregated import SSD, SSD_STEPS, TABLES, Constants, Table, fitted, held_experts
from moesim.studies.published import EXPERT_B, PEAKS, SINGLE_LARGE


def worst(table: Table, constants: Constants) -> float:
    return max(map(abs, table.errors(constants)))


@pytest.mark.parametrize("table", [*TABLES, SSD], ids=lambda table: table.what)
def test_the_shipped_constants_give_every_table_within_its_tolerance(table: Table) -> None:
    assert worst(table, Constants()) <= table.within


def test_steps_from_the_ssd_are_predicted_where_they_are_consistent() -> None:
    """Nothing was fitted to them; tokens/s are whole numbers, and at 10 % cached they fall although more is in place."""
    errors = SSD_STEPS.errors(Constants())
    outlier = errors.pop(4)
    assert max(map(abs, errors)) <= 0.15
    assert outlier < -0.25


def test_tables_the_project_promises_have_their_tolerances() -> None:
    """Cached blocks on demand within 2.5 %, pre-gated ones by distinct experts within 10 %."""
    assert {table.within for table in TABLES if "cached" in table.what} == {0.025}
    assert {table.within for table in TABLES if "pre-gated" in table.what and "distinct" in table.what} == {0.10}
    assert [(table.what.split(",")[0], table.within) for table in TABLES if table.check] == [
        ("large-128 on demand", 0.025),
        ("base-16 on demand", 0.05),
        ("base-16 pre-gated", 0.10),
    ]


@pytest.mark.parametrize("row", PEAKS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_peaks_of_memory_are_those_of_the_experts_held(row: tuple[str, int, float, float, float, float]) -> None:
    size, experts, demand_GB, *peaks_GB = row
    held = held_experts(experts, 1, 12 if size == "base" else 24)
    assert [demand_GB + n * EXPERT_B[size] / 1e9 for n in held] == pytest.approx(peaks_GB, rel=0.01)


def test_the_large_models_uncached_blocks_follow() -> None:
    gated_ms, demand_ms, whole_ms = SINGLE_LARGE
    constants = Constants()
    assert 1e3 * constants.large_ahead_s(1) == pytest.approx(gated_ms, rel=0.025)
    assert 1e3 * constants.large_demand_s(1) == pytest.approx(demand_ms, rel=0.025)
    assert 1e3 * constants.large_ahead_s(128, bulk=True) == pytest.approx(whole_ms, rel=0.05)


def test_constants_of_all_tables_but_one_predict_it() -> None:
    """Cached blocks within 2.5 %, all others within 14 %: what no table but their own says is the price of more than one expert."""
    for table in TABLES:
        constants = fitted([other for other in TABLES if other is not table])
        assert worst(table, constants) <= (0.025 if "cached" in table.what else 0.14), table.what


def test_a_fit_finds_the_constants_that_made_the_tables() -> None:
    made = Constants.of([14.0, 13.0, 0.08, 0.2, 1.2, 0.1, 0.2])
    tables = [
        Table(what=t.what, published="", within=1e-3, measured_ms_N=[1e3 * s for s in t.simulated_s_N(made)], simulated_s_N=t.simulated_s_N)
        for t in TABLES
    ]
    assert all(worst(table, fitted(tables)) < 1e-3 for table in tables)
    assert Constants.of(Constants().numbers()).numbers() == pytest.approx(Constants().numbers())


def test_in_four_bytes_a_weight_copies_run_as_the_profile_expects_of_that_slot() -> None:
    expected_Bps = fetching(hosted("a100-80", host="dgx-a100"), 0, "ddr").alone_Bps
    assert 2 * Constants().way.alone_Bps == pytest.approx(expected_Bps, rel=0.02)
    assert {size: bytes_ / 2 for size, bytes_ in EXPERT_B.items()} == {"base": 2 * 768 * 3072, "large": 2 * 1024 * 4096}
