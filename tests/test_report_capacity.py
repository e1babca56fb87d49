"""Reports of sweeps, of capacity and of scaling: the recommendation follows from the cases, and every case is shown."""

from __future__ import annotations

import copy
import json
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
from moesim.report.sections import answer, articles, sections
from moesim.report.sections.capacity import headroom, offering
from moesim.report.sections.serving import coarse
from moesim.report.sections.sweep import groups
from moesim.serving import Arrivals
from moesim.serving.opening import open_arrivals
from moesim.sweep.closer import MOST_INTERVALS, MOST_REQUESTS, dealt, interval_of, scaled, varies
from moesim.sweep.kinds.capacity import CapacityFields
from moesim.trace import Trace, TraceWriter, load_trace
from tests.capacity_cases import capacity_document, measured_run, scaling_result, validation
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
    placing = next(sentence for sentence in said.sentences if "Place experts" in sentence)
    assert "on tokens it has not seen" in placing
    assert "than by eplb" in placing
    assert any("No measurement backs this page" in caution for caution in said.cautions)
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
    assert keys == ["capacity", "what-if", "comparison", "serving", "results", "sweep", "limits", "provenance"]
    assert any("No scaling was planned: a change of size takes" in sentence for sentence in answer(parsed).sentences)
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


def test_measurements_join_the_page_they_back_and_without_them_it_says_so(document: dict[str, Any]) -> None:
    parsed = as_document(document, place="d")
    backing = [as_document(validation(), place="v"), as_document(measured_run(document), place="r")]
    found = articles([backing[0], parsed, backing[1]])
    assert [article.document for article in found] == [parsed]
    assert list(found[0].evidence) == backing
    said = answer(parsed, backing)
    assert not any("No measurement backs" in caution for caution in said.cautions)
    assert any("Measured on cuda (NVIDIA H200), not on the recommended h100-sxm" in caution for caution in said.cautions)
    assert any(f"off by 10.0{NBSP}% in the median" in sentence for sentence in said.sentences)
    assert any(f"median first token −20.0{NBSP}%" in sentence for sentence in said.sentences)
    keys = [section.key for section in sections(parsed, backing)]
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if key[-2:] in ("-1", "-2")] == ["validation-1", "provenance-1", "measured-2", "provenance-2"]
    page = render([parsed, *backing])
    assert page.count("<article") == 1
    assert "Prediction against measurement: On an H200" in page
    assert 'id="d1-measured-2"' in page
    assert "No measurement backs this page" in render([parsed])


def test_measurements_without_a_page_to_back_stand_alone(document: dict[str, Any]) -> None:
    alone = [as_document(validation(), place="v"), as_document(measured_run(document), place="r"), as_document(scaling_result(), place="s")]
    assert [article.evidence for article in articles(alone)] == [(), (), ()]
    assert [section.key for section in sections(alone[1])] == ["serving", "measured", "provenance"]


def test_the_recommended_hardware_is_known_by_its_name(document: dict[str, Any]) -> None:
    def same(d: dict[str, Any]) -> None:
        d["validation"]["hardware"]["gpu"] = "NVIDIA H100 80GB HBM3"

    parsed = as_document(document, place="d")
    assert not any("not on the recommended" in caution for caution in answer(parsed, [changed(validation(), same)]).cautions)


@pytest.fixture(scope="module")
def swinging(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A capacity document whose traffic swings so far that the size should follow."""
    return capacity_document(
        trace,
        tmp_path_factory.mktemp("swinging") / "out",
        arrivals="diurnal:rate=40,span=60s,swing=1,period_s=60s,peak_s=30s,prompt=100,output=10",
        cases=[{}],
        replicas=2,
        max_batch_tokens=1024,
        cluster="h100x8",
    )


def test_one_page_says_what_to_buy_how_to_place_and_when_to_scale(swinging: dict[str, Any]) -> None:
    parsed = as_document(swinging, place="d")
    assert parsed.capacity is not None
    assert parsed.scaling is not None
    assert parsed.capacity.unscaled == ""
    assert parsed.scaling.instances == 2
    said = answer(parsed).sentences
    order = [next(i for i, sentence in enumerate(said) if sentence.startswith(word)) for word in ("Buy", "Place experts", "Scale between")]
    assert order == sorted(order)
    assert "in each of 2 instances" in said[order[2]]
    keys = [section.key for section in sections(parsed)]
    assert keys.index("capacity") < keys.index("scaling") < keys.index("comparison") < keys.index("provenance")
    seen = parsed.scaling.event
    assert seen is not None
    assert seen.start_s <= seen.at_s < seen.at_s + seen.seconds < seen.start_s + seen.bin_s * len(seen.waiting)
    assert min(seen.waiting + seen.running) >= 0
    page = render([parsed])
    assert "closely" in page
    assert f"{seen.after} devices serve from" in page


@given(st.floats(1.0, 1e6), st.floats(0.0, 1e3))
def test_an_interval_holds_the_longest_change_and_there_are_few_of_them(span_s: float, longest_s: float) -> None:
    interval_s = interval_of(span_s, longest_s)
    assert interval_s >= longest_s
    assert span_s / interval_s <= MOST_INTERVALS + 1e-9


@pytest.mark.parametrize(("process", "expected"), [("poisson:rate=20,span=300s", False), ("diurnal:rate=20,span=300s,swing=0.8,period_s=300s", True)])
def test_traffic_varies_where_chance_does_not_explain_it(process: str, expected: bool) -> None:
    told = [varies(open_arrivals(f"{process},prompt=10,output=2", seed=seed), 10.0) for seed in range(20)]
    assert told == [expected] * 20


@given(st.integers(1, 40), st.integers(1, 5))
def test_dealt_requests_are_every_so_many_th(requests: int, instances: int) -> None:
    whole = Arrivals(arrival_s_R=np.arange(requests, dtype=float), prompt_R=np.ones(requests, np.int64), output_R=np.ones(requests, np.int64))
    mine = dealt(whole, instances)
    assert mine.arrival_s_R.tolist() == list(range(0, requests, instances))
    assert len(mine) == -(-requests // instances)


def test_arrivals_beyond_the_bound_and_split_prompts_are_skipped_with_the_reason() -> None:
    common = {"slo": "ttft=1s", "cluster": "h100x8", "model": "qwen3-30b-a3b"}
    many = CapacityFields(arrivals=f"poisson:rate={MOST_REQUESTS},span=2s,prompt=10,output=2", **common)
    assert scaled(many)[0] is None
    assert "run `moesim scale`" in scaled(many)[1]
    split = CapacityFields(arrivals="poisson:rate=10,span=2s,prompt=10,output=2", prefill=1, **common)
    assert "instances of their own" in scaled(split)[1]


def test_the_command_joins_a_study_and_its_measurement(moesim: Callable[..., tuple[int, str, str]], document: dict[str, Any], tmp_path: Path) -> None:
    for name, data in (("study/result.json", document), ("validation.json", validation())):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(data))
    code, out, err = moesim("report", tmp_path / "study", tmp_path / "validation.json", "-o", tmp_path / "page.html", "--json")
    assert code == 0, err
    listed = json.loads(out)["documents"]
    assert [part["sections"][0] for part in listed] == ["capacity", "validation"]
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article") == 1
    assert "Prediction against measurement" in page
