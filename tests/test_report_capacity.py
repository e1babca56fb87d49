"""Reports of sweeps, of capacity and of scaling: the recommendation follows from the cases, and every case is shown."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.model import ModelSpec
from moesim.report import as_document, read_document, render
from moesim.report.offers import Offers
from moesim.report.sections import answer, sections
from moesim.report.sections.capacity import headroom, offering
from moesim.report.sections.serving import coarse
from moesim.report.sections.sweep import groups
from moesim.trace import Trace, TraceWriter, load_trace
from tests.capacity_cases import capacity_document, scaling_result
from tests.conftest import clustered_routing, tiny_model

NBSP = "\N{NO-BREAK SPACE}"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    model: ModelSpec = tiny_model(experts=8)
    path = tmp_path_factory.mktemp("capacity") / "trace"
    with TraceWriter(path, model, top_k=2, weights=False) as writer:
        writer.append(clustered_routing(model, 600), domain=np.where(np.arange(600) % 3 == 0, "prose", "code"), sequence=np.arange(600) // 20)
    return load_trace(path)


@pytest.fixture(scope="module")
def document(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return capacity_document(trace, tmp_path_factory.mktemp("capacity") / "out")


def changed(document: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> Any:
    other = copy.deepcopy(document)
    change(other)
    return as_document(other, place="d")


def test_the_recommendation_is_the_cheapest_deployment_that_keeps_the_objective(document: dict[str, Any]) -> None:
    parsed = as_document(document, place="d")
    assert parsed.capacity is not None
    assert parsed.sweep is not None
    offers = offering(parsed.capacity, parsed.sweep)
    keeping = [case for case in offers.cases if offers.keeps(case)]
    assert offers.chosen is offers.cases[0]
    assert offers.paid(offers.chosen) == min(map(offers.paid, keeping)) == 20.0
    said = answer(parsed)
    assert said.sentences[0].startswith("Buy 1 × h100x8 ($20.00 an hour): the cheapest of 2 that keep the objective")
    assert any("Place experts" in sentence for sentence in said.sentences)
    assert any("nothing in this document was measured" in caution for caution in said.cautions)
    assert [tile.value for tile in said.tiles][0] == "$20.00"


def test_headroom_lies_between_the_traffic_kept_and_the_traffic_missed(document: dict[str, Any]) -> None:
    parsed = as_document(document, place="d")
    assert parsed.capacity is not None
    assert parsed.sweep is not None
    offers = offering(parsed.capacity, parsed.sweep)
    kept, missed = headroom(parsed.capacity, parsed.sweep, offers)
    assert (kept, missed) == (1.0, 300.0)


def test_without_a_keeper_nothing_is_recommended_and_without_prices_devices_are_counted(document: dict[str, Any]) -> None:
    def hopeless(d: dict[str, Any]) -> None:
        d["capacity"].update(chosen=None, share=1.0)
        for case in d["sweep"]["cases"]:
            case["figures"]["attainment"] = 0.5

    said = answer(changed(document, hopeless))
    assert said.sentences[0].startswith("None of 2 deployments keeps the objective")
    assert not any(sentence.startswith("Buy") for sentence in said.sentences)

    def free(d: dict[str, Any]) -> None:
        d["capacity"]["priced"] = False

    assert answer(changed(document, free)).sentences[0].startswith("Buy 1 × h100x8 (8 devices)")


def test_a_capacity_page_has_every_part_of_the_answer(document: dict[str, Any]) -> None:
    parsed = as_document(document, place="d")
    keys = [section.key for section in sections(parsed)]
    assert keys == ["capacity", "what-if", "serving", "results", "sweep", "limits", "provenance"]
    page = render([parsed])
    for text in (
        "What to buy",
        "What if",
        "as it is",
        "missed",
        "What the model does not cover",
        "Key-value cache",
        "Bytes between",
        "not calibrated",
    ):
        assert text in page, text
    assert page.index("Buy 1 ×") < page.index('id="d1-capacity"')


def test_skew_and_its_domain_are_one_condition(document: dict[str, Any]) -> None:
    page = render([as_document(document, place="d")])
    assert "over skew" in page
    assert "skew 0.5" in page


def test_a_scaling_result_says_what_it_saves_and_what_breaks_it(document: dict[str, Any]) -> None:
    parsed = as_document(scaling_result(), place="s")
    said = answer(parsed)
    assert said.sentences[0] == f"Scale between 4 and 8 devices: $3.00 for 20{NBSP}min, 25.0{NBSP}% less than one size throughout."
    assert any("traffic doubles" in caution for caution in said.cautions)
    page = render([as_document(document, place="d"), parsed])
    assert "4→8" in page.replace(" ", "")
    assert page.count("Buy 1 ×") == 2, "once at the top of the page, once in its document"


def test_a_serving_result_is_drawn_by_itself(document: dict[str, Any]) -> None:
    run = {
        "schema_version": 1,
        "kind": "serving",
        **{key: value for key, value in document["serving"][0].items() if key not in ("schema_version", "kind")},
    }
    parsed = as_document(run, place="r")
    assert [section.key for section in sections(parsed)] == ["serving", "provenance"]
    assert "requests keep the objective" in answer(parsed).sentences[0]


def test_groups_of_a_sweep_are_sorted_by_the_first_figure(document: dict[str, Any]) -> None:
    parsed = as_document(document, place="d")
    assert parsed.sweep is not None
    for cases in groups(parsed.sweep).values():
        kept = [case.figures["attainment"] or 0.0 for case in cases]
        assert kept == sorted(kept, reverse=True)


def test_capacity_without_its_cases_and_a_folder_without_a_result_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="capacity without the sweep"):
        as_document({key: value for key, value in document.items() if key != "sweep"}, place="d")
    with pytest.raises(InputError, match=r"result\.json"):
        read_document(tmp_path)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=1, max_size=12))
def test_nothing_on_the_frontier_is_beaten_and_everything_else_is(points: list[tuple[float, float]]) -> None:
    paid, kept = zip(*points, strict=True)
    front = set(Offers(paid=paid, kept=kept, good=[True] * len(paid), chosen=None, share=0.9, xlabel="").frontier())

    def beaten(i: int) -> bool:
        return any(paid[j] <= paid[i] and kept[j] >= kept[i] and (paid[j], kept[j]) != (paid[i], kept[i]) for j in range(len(paid)))

    assert all(not beaten(i) for i in front)
    assert {(paid[i], kept[i]) for i in range(len(paid)) if not beaten(i)} == {(paid[i], kept[i]) for i in front}


@given(st.lists(st.floats(-1e6, 1e6), max_size=600), st.integers(1, 50))
def test_coarse_lines_are_short_and_keep_their_range(values: list[float], most: int) -> None:
    found = coarse(values, most)
    assert len(found) <= most
    assert bool(found) == bool(values)
    if values:
        assert min(values) - 1e-6 <= min(found) <= max(found) <= max(values) + 1e-6
