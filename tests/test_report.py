"""Reports: what documents hold is shown, what they lack is absent, names are text, and nothing is fetched."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moesim.cli import report as verb
from moesim.errors import InputError, OutputExists
from moesim.model import ModelSpec
from moesim.report import as_document, read_document, render, write_report
from moesim.report.sections import answer, sections
from moesim.report.sections.comparison import strongest
from moesim.report.sections.provenance import notes
from moesim.report.sections.validation import errors_by_plan, worst_case
from moesim.result import Result
from moesim.trace import TraceWriter, load_trace
from moesim.trace.inspect import inspect

NBSP = "\N{NO-BREAK SPACE}"
EVIL = "<script>alert('x')</script>\" onload=\"y $\\frac{a$ \x00 \ud800 日本"


def result(name: str = "linear", *, scale: float = 1.0, devices: int = 4, layers: int = 3) -> Result:
    rng = np.random.default_rng(3)
    tokens = rng.uniform(50, 150, (2, layers, devices))
    return Result(
        name=name,
        engine="lockstep",
        model="tiny",
        cluster="h100x4",
        layers=tuple(range(1, layers + 1)),
        dispatch_s_SL=np.full((2, layers), 1e-5 * scale),
        compute_s_SLG=tokens * 1e-6 * scale,
        combine_s_SL=np.full((2, layers), 1e-5 * scale),
        tokens_SLG=tokens,
        traffic_B_LGG=rng.uniform(1e5, 2e5, (layers, devices, devices)),
        fanout_devices_L=np.full(layers, 2.5 * scale),
        fanout_nodes_L=np.ones(layers),
        tokens_per_step=400.0,
        bottlenecks={"link in": 5, "link out": 1},
        notes=("the kernel is a roofline", "unverified input: nvlink latency"),
        inputs={"trace": "abc123", "tokens_per_device": 100},
    )


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = ModelSpec(name="tiny", layers=4, moe_layers=(1, 2, 3), hidden=8, intermediate=8, experts=8, top_k=2)
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("report") / "trace"
    with TraceWriter(path, model, top_k=2, weights=False, captured_by={"by": "test"}) as writer:
        for step in range(4):
            for domain in ("law", "code"):
                ids = np.argsort(rng.gumbel(size=(50, 3, 8)) + np.linspace(0, 2, 8), axis=2)[:, :, :2]
                writer.append(ids, step=step, phase="train", domain=domain)
    return inspect(load_trace(path)).to_dict()


@pytest.fixture(scope="module")
def document(inspection: dict[str, Any]) -> dict[str, Any]:
    results = [result("linear"), result("better", scale=0.8)]
    plans = [r.summary() for r in results]
    slower = [result("linear").summary(), result("better", scale=1.1).summary()]
    errors = {"n": 4, "median_ape": 0.03, "p90_ape": 0.08, "mape": 0.04, "bias": -0.01}
    return {
        "schema_version": 1,
        "title": "A run",
        "created": "2026-01-02",
        "command": "moesim demo",
        "versions": {"moesim": "0.1.0"},
        "machine": {"cpu": "some CPU", "cores": 2, "memory_B": 8e9, "gpu": None, "system": "Linux"},
        "notes": ["cut short"],
        "training": {"model": "m", "parameters": 1000, "steps": 3, "loss": [3.0, 2.0, 1.5], "domains": {"law": 10}, "seconds": 1.0},
        "inspection": inspection,
        "comparison": {
            "cluster": "h100x4",
            "cluster_title": "4 GPUs",
            "learnt_from": "law, first half",
            "tokens_per_device": 100,
            "scored_on": [
                {"label": "law A", "kind": "in-sample", "tokens": 10, "plans": plans},
                {"label": "law B", "kind": "held-out", "tokens": 20, "plans": plans},
                {"label": "code", "kind": "cross-domain", "tokens": 30, "plans": slower},
            ],
            "solutions": [{"name": "better", "status": "time-limit", "seconds": 1.5, "objective": 2.0, "bound": 1.5, "gap": 0.25}],
        },
        "results": [r.to_dict() for r in results],
        "validation": {
            "device": "Some GPU",
            "backend": "grouped",
            "hardware": {"driver": "1", "memory_B": 1e9},
            "date": "2026-01-02",
            "calibration": {"kernel": {"launch_s": 4e-6}, "measured_on": "uniform loads", **errors},
            "cases": [
                {"plan": p, "layer": i, "rank": 0, "tokens": 9, "experts": 2, "predicted_s": 1e-4 * (1 + i / 10), "measured_s": 1e-4, "cv": 0.01}
                for p in ("linear", "better")
                for i in (1, 2)
            ],
            "summary": errors,
            "models": {"moesim": errors, "tokens-only": {**errors, "median_ape": 0.2}},
            "ranking": {
                "plans": [
                    {"name": "linear", "predicted_s": 2e-4, "measured_s": 2.1e-4},
                    {"name": "better", "predicted_s": 1e-4, "measured_s": 1.2e-4},
                ],
                "spearman": 1.0,
                "kendall": 1.0,
                "top1_regret": 0.0,
                "spread": 0.75,
                "noise_floor": 0.01,
                "verdict": "the order agrees",
            },
            "checks": [{"name": "outputs equal", "ok": True, "detail": "1e-3"}, {"name": "errors small", "ok": False, "detail": "8 %"}],
            "modelled": ["the all-to-all"],
        },
    }


@pytest.fixture(scope="module")
def rendered(document: dict[str, Any]) -> str:
    return render([as_document(document, place="d")])


def spoilt(value: Any, key: str = "") -> Any:
    """The same document with a hostile ending on every text that may hold anything."""
    if isinstance(value, dict):
        return {name: spoilt(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [spoilt(item, key) for item in value]
    return value + EVIL if isinstance(value, str) and key != "kind" else value


class Page(HTMLParser):
    """Tags, ids, links and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]


# --- pages -------------------------------------------------------------------------------------------------------


def test_a_written_report_is_the_rendered_page_and_the_same_every_time(document: dict[str, Any], rendered: str, tmp_path: Path) -> None:
    path = write_report([document], tmp_path / "new" / "report.html")
    assert path.read_text("utf-8") == rendered


def test_every_section_is_shown_once_and_the_page_is_whole(document: dict[str, Any], rendered: str) -> None:
    page = Page(rendered)
    keys = [section.key for section in sections(as_document(document, place="d"))]
    assert keys == ["comparison", "validation", "results", "inspection", "training", "provenance"]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert [key for key in keys if f"d1-{key}" in ids] == keys
    assert all(link.removeprefix("#") in ids for tag, attributes in page.tags if tag == "a" for link in [attributes["href"]])
    assert ("html", {"lang": "en"}) in page.tags
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2", "h3")][:2] == ["h1", "h2"]
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) >= 12
    assert all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in figures)
    assert "A run" in page.text
    assert "Unverified inputs (1)" in page.text
    assert "the kernel is a roofline" in page.text
    assert "✗\N{NO-BREAK SPACE}FAILED" in page.text


def test_nothing_is_fetched_and_nothing_runs(rendered: str) -> None:
    page = Page(rendered)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    links = page.values("href", "src", "xlink:href", "srcset", "action", "data")
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"https?:|url\((?!#)|@import", rendered)


def test_hostile_names_are_shown_as_text(document: dict[str, Any]) -> None:
    page_text = render([as_document(spoilt(document), place="d")], title=EVIL)
    page = Page(page_text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert('x')</script>") > 30
    assert "\x00" not in page_text
    assert page_text.encode()


def test_missing_sections_are_absent(document: dict[str, Any]) -> None:
    for only in ("training", "inspection", "comparison", "results", "validation"):
        found = as_document({"schema_version": 1, only: document[only]}, place="d")
        assert [section.key for section in sections(found)] == [only, "provenance"]
        assert "None" not in repr(answer(found))
    page = Page(render([as_document({"schema_version": 1, "training": document["training"]}, place="d")]))
    assert {"d1-training", "d1-provenance"} == {name for name in page.values("id") if re.fullmatch(r"d1-[a-z]+", name)}
    assert "None" not in page.text


def test_several_documents_keep_their_order_under_their_own_headings(document: dict[str, Any], inspection: dict[str, Any]) -> None:
    trained = {"schema_version": 1, "title": "A run", "training": document["training"]}
    documents = [{"schema_version": 1, **inspection}, result("only").to_dict(), trained]
    text = render([as_document(data, place=str(i)) for i, data in enumerate(documents)])
    page = Page(text)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "article"] == ["d1", "d2", "d3"]
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Routing of tiny", "only on h100x4", "A run"]
    assert len(page.values("id")) == len(set(page.values("id")))


def test_one_device_one_layer_one_step_is_a_report(inspection: dict[str, Any]) -> None:
    small = result(devices=1, layers=1).to_dict()
    narrow = {
        **inspection, "layers": [0], "affinity_bits": [], "skew": [1.0], "unused_experts": [8], "load": [[0] * 8], "domains": [""],
        "domain_drift_bits": [[0.0]], "step_edges": [0], "step_drift_bits": [],
    }  # fmt: skip
    text = render([as_document({"schema_version": 1, "results": [small], "inspection": narrow}, place="d")])
    assert "8 of 8" in text


def test_errors_by_plan_follow_their_definition(document: dict[str, Any]) -> None:
    cases = as_document(document, place="d").validation.cases  # type: ignore[union-attr]
    errors = errors_by_plan(cases)["linear"]
    assert errors.n == 2
    assert errors.median_ape == pytest.approx(0.15)
    assert errors.bias == pytest.approx(0.15)
    assert "layer 2" in worst_case(cases)
    assert "+20.0" in worst_case(cases)


# --- the answer --------------------------------------------------------------------------------------------------


def test_the_answer_names_the_best_held_out_plan_its_gain_and_where_it_loses(document: dict[str, Any]) -> None:
    found = answer(as_document(document, place="d"))
    assert found.sentences[0].startswith("On 20 tokens it has not seen (law B), better has the shortest MoE layer")
    assert f"20.0{NBSP}% less than linear" in found.sentences[0]
    assert f"(+10.0{NBSP}% vs linear), where linear is the fastest" in found.sentences[1]
    assert "The order agrees." in found.sentences
    assert found.cautions == ["1 of 2 checks failed: errors small."]
    assert [tile.tone for tile in found.tiles] == ["good", "plain", "good", "good"]


def test_in_sample_figures_alone_are_cautioned_and_a_winning_baseline_is_said(document: dict[str, Any]) -> None:
    data = copy.deepcopy(document["comparison"])
    data["scored_on"] = data["scored_on"][:1]
    alone = answer(as_document({"schema_version": 1, "comparison": data}, place="d"))
    assert "only on the tokens it learnt from" in alone.cautions[0]
    data["scored_on"][0]["plans"] = [result("linear").summary(), result("worse", scale=2).summary()]
    assert "nothing beats linear" in answer(as_document({"schema_version": 1, "comparison": data}, place="d")).sentences[0]


def test_simulations_that_differ_in_cluster_have_no_best() -> None:
    there = {**result("b", scale=0.5).to_dict(), "cluster": "elsewhere"}
    found = answer(as_document({"schema_version": 1, "results": [result("a").to_dict(), there]}, place="d"))
    assert "no plan is called the best" in found.sentences[0]
    assert found.tiles == []


def test_the_best_of_each_part_is_marked_in_words_too(document: dict[str, Any], rendered: str) -> None:
    parsed = as_document(document, place="d")
    assert strongest(parsed.comparison).label == "law B"  # type: ignore[arg-type]
    table = next(block for block in sections(parsed)[0].blocks if block.kind == "table")
    in_sample, _, cross = ([[cell.best for cell in row] for row in group.rows] for group in table.groups)  # type: ignore[union-attr]
    assert in_sample == [[False] * 10, [False, False, True, False, False, True, True, True, True, False]]
    assert cross[0] == [False, False, True, False, False, True, True, True, True, False]
    assert '<span class="unseen">best: </span>' in rendered


def test_notes_are_said_once_and_unverified_inputs_apart(document: dict[str, Any]) -> None:
    assert notes(as_document(document, place="d")) == (["cut short", "the kernel is a roofline"], ["nvlink latency"])


# --- bad documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "expected a JSON object, found list"),
        ("{}", "no schema_version, found keys: nothing"),
        ('{"training": {"model": "m"}, "alpha": 1}', "no schema_version, found keys: alpha, training"),
        ('{"schema_version": 1, "plans": []}', "none of the sections"),
        ('{"schema_version": 2, "training": {}}', r"\$.schema_version"),
        ('{"schema_version": 1, "training": {"model": "m"}}', r"\$.training.parameters: missing; \$.training.steps: missing"),
        ("{", "not valid JSON"),
        ('{"schema_version": 1, "training": NaN}', "non-number NaN"),
    ],
)
def test_bad_files_name_the_file_and_the_mistake(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        read_document(path)
    assert str(path) in str(caught.value)


def test_ragged_or_endless_numbers_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    bare = result().to_dict()
    for broken, says in (
        ({**bare, "traffic_B": [[1.0, 2.0], [3.0]]}, "traffic_B|device_tokens"),
        ({**bare, "load_ratio": [1.0]}, "load_ratio has 1 entries, expected 3"),
        ({**bare, "layer_s": [math.nan, 1.0, 1.0]}, "finite"),
        ({"schema_version": 1, "comparison": {**document["comparison"], "scored_on": []}}, "scored_on"),
    ):
        with pytest.raises(InputError, match=says):
            write_report([broken], tmp_path / "r.html")
    with pytest.raises(InputError, match="no documents"):
        write_report([], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command(verb.NAME, epilog=verb.EPILOG)(verb.run)
    return app


def test_the_command_writes_a_page_once_and_again_only_by_force(command: typer.Typer, tmp_path: Path) -> None:
    source, out = tmp_path / "r.json", tmp_path / "new" / "report.html"
    source.write_text(json.dumps(result().to_dict()))
    runner = CliRunner()
    done = runner.invoke(command, [str(source), "-o", str(out), "--title", "Mine & yours"])
    assert done.exit_code == 0, done.output
    assert f"wrote {out}: 2 sections of 1 document;" in done.stdout
    assert "<title>Mine &amp; yours</title>" in out.read_text("utf-8")
    again = runner.invoke(command, [str(source), "-o", str(out)])
    assert isinstance(again.exception, OutputExists)
    forced = runner.invoke(command, [str(source), "-o", str(out), "--force", "--json"])
    assert json.loads(forced.stdout)["documents"] == [{"file": str(source), "sections": ["results", "provenance"]}]
    wrong = runner.invoke(command, [str(tmp_path / "none.json"), "-o", str(tmp_path / "other.html")])
    assert isinstance(wrong.exception, InputError)
    assert not (tmp_path / "other.html").exists()
