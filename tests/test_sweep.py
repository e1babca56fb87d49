"""Sweeps: specs list every mistake, cases are named by what they are made from, and rows survive anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.sweep import LocalCrew, load_spec, results, stats_of, sweep
from moesim.sweep.crew import Died
from moesim.sweep.journal import Journal, line_of, read_rows, row_of
from moesim.sweep.kinds import KINDS, Found, Kind
from moesim.sweep.spec import Case, as_spec
from moesim.sweep.table import contests
from moesim.sweep.work import work
from moesim.trace import Trace, TraceStats, TraceWriter, load_trace
from tests.conftest import clustered_routing, tiny_model
from tests.sweep_cases import Here, square_or_die

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.dictionaries(st.text(max_size=8), JSON, max_size=5)


def spec_of(source: Trace, /, **grid: Any) -> dict[str, Any]:
    return {"kind": "simulate", "grid": {"trace": str(source.path), "cluster": "h100x8", "tokens_per_device": 32} | grid}


# --- specs and cases -------------------------------------------------------------------------------------------------


def test_cases_are_the_product_of_grid_and_list_each_once(trace: Trace, tmp_path: Path) -> None:
    data = spec_of(trace, seed=[0, 1, 1], domain=["code", "prose"]) | {"cases": [{"solver": "eplb"}, {"solver": "linear", "replicas": 0}]}
    spec = as_spec(data, root=tmp_path)
    assert len(spec.cases) == 2 * 2 * 2
    assert spec.axes == ("solver", "domain", "seed")
    assert len({case.id for case in spec.cases}) == len(spec.cases)


def test_a_case_is_named_by_content_not_by_path(trace: Trace, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(trace.path, moved)
    ids = [as_spec(spec_of(trace, solver="eplb") | {}, root=tmp_path).cases[0].id]
    ids.append(as_spec({"kind": "simulate", "grid": {**spec_of(trace, solver="eplb")["grid"], "trace": "elsewhere"}}, root=tmp_path).cases[0].id)
    assert ids[0] == ids[1]
    assert as_spec(spec_of(trace, solver="eplb", seed=1), root=tmp_path).cases[0].id != ids[0]
    assert as_spec(spec_of(trace, solver="eplb", cluster="h200x8"), root=tmp_path).cases[0].id != ids[0]


def test_a_case_is_named_by_all_of_its_model(tmp_path: Path) -> None:
    """Models that route alike and differ in what surrounds the experts are different cases."""
    config = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = set()
    for vocabulary in (100, 200, 100):
        path = tmp_path / f"{vocabulary}.json"
        path.write_text(json.dumps(config | {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": vocabulary}))
        grid = {"model": path.name, "cluster": "h100x8", "arrivals": "poisson:rate=1,span=9s,prompt=9,output=9", "slo": "ttft=1s"}
        ids.add(as_spec({"kind": "capacity", "grid": grid}, root=tmp_path).cases[0].id)
    assert len(ids) == 2


def test_a_toml_spec_with_paths_of_its_own_folder(trace: Trace, tmp_path: Path) -> None:
    shutil.copytree(trace.path, tmp_path / "specs" / "t")
    file = tmp_path / "specs" / "s.toml"
    file.write_text('kind = "simulate"\n[grid]\ntrace = "t"\ncluster = "h100x8"\nsolver = "eplb"\ntime_limit = "2 s"\n')
    case = load_spec(file).cases[0]
    assert case.fields["trace"] == str(tmp_path / "specs" / "t")
    assert case.fields["time_limit"] == 2.0


def test_every_mistake_is_listed_with_its_path(trace: Trace, tmp_path: Path) -> None:
    data = spec_of(trace, solver=["eplb", 5], sovler="x", bandwidth=[1.0, 0.0], phase="prefil") | {"titel": "t", "cases": [{"seed": "a"}]}
    with pytest.raises(InputError) as refused:
        as_spec(data, root=tmp_path, place="s.toml")
    for path in ("s.toml: ", "$.grid.solver[1]", "$.grid.sovler", "$.grid.bandwidth[1]", "$.grid.phase[0]", "$.titel", "$.cases[0].seed"):
        assert path in str(refused.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"solver": ["eplb", "eplbx"], "cluster": ["h100x8", "h900"]}, ("'eplbx' is not installed", "'h900' is not known")),
        ({"solver": "eplb", "trace": "nowhere"}, ("nowhere: no such file",)),
        ({}, ("give a solver, or a plan",)),
        ({"solver": "eplb", "system": "no-such"}, ("'no-such' is unknown",)),
        ({"solver": []}, ("$.grid.solver",)),
        ({"solver": "eplb", "seed": list(range(2000)), "tokens_per_device": list(range(1, 1000))}, ("1,998,000 cases are more than",)),
    ],
)
def test_what_is_wrong_with_values_is_said_before_anything_runs(trace: Trace, tmp_path: Path, change: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        as_spec(spec_of(trace, **change), root=tmp_path)
    assert all(text in str(refused.value) for text in said)


def test_a_key_given_twice_an_unknown_kind_and_an_empty_file_are_refused(trace: Trace, tmp_path: Path) -> None:
    for data, said in (
        (spec_of(trace, solver="eplb") | {"cases": [{"solver": "linear"}]}, "$.cases[0].solver: is in the grid, too"),
        ({"kind": "nothing"}, "$.kind: input should be 'simulate'"),
        ({}, "$.kind: missing"),
    ):
        with pytest.raises(InputError) as refused:
            as_spec(data, root=tmp_path)
        assert said in str(refused.value)


# --- the journal -----------------------------------------------------------------------------------------------------


@given(ROWS)
def test_a_line_is_json_and_gives_its_row_back(row: dict[str, Any]) -> None:
    line = line_of(row)
    assert line.count("\n") == 1
    assert json.loads(line)["row"] == row
    assert row_of(line) == row


@given(ROWS, st.data())
def test_no_torn_or_altered_line_is_taken_for_a_row(row: dict[str, Any], data: st.DataObject) -> None:
    line = line_of(row)
    assert row_of(line[: data.draw(st.integers(0, len(line) - 1))]) is None
    at = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda c: c != line[at]))
    assert row_of(line[:at] + other + line[at + 1 :]) is None


def test_a_journal_torn_at_any_byte_keeps_every_whole_row_and_is_written_on(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append([{"case": "a", "n": 1}, {"case": "b", "text": "é"}])
    part = next((tmp_path / "j").glob("rows-*"))
    whole = part.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(len(whole)):
        part.write_bytes(whole[:cut])
        damaged: list[str] = []
        assert [row["case"] for row in read_rows(tmp_path / "j", damaged)] == ["a", "b"][: (cut >= first) + (cut == len(whole))]
        assert damaged == []
    with Journal(tmp_path / "j") as journal:
        journal.append([{"case": "c"}])
    assert [row["case"] for row in read_rows(tmp_path / "j")] == ["a", "c"]


def test_an_altered_line_is_named_and_left_out(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.append([{"case": "a", "n": 1}, {"case": "b", "n": 2}])
    part = next((tmp_path / "j").glob("rows-*"))
    part.write_text(part.read_text().replace('"n":1', '"n":7'))
    damaged: list[str] = []
    assert [row["case"] for row in read_rows(tmp_path / "j", damaged)] == ["b"]
    assert damaged == [f"{part}:1"]


def test_two_sweeps_cannot_write_in_one_folder_and_a_strange_folder_is_left_alone(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(InputError, match="another sweep is writing"), Journal(tmp_path / "j"):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, said in (("mine", "no sweep wrote"), ("file", "not a folder")):
        with pytest.raises(InputError, match=said), Journal(tmp_path / name):
            pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_finds_what_simulating_by_hand_finds(trace: Trace, tmp_path: Path) -> None:
    import moesim
    from moesim.optimize import Problem, place, score

    spec = as_spec(
        spec_of(trace, solver=["eplb", "linear"], system="plain", bandwidth=[0.1, 1.0], tokens_per_device=256, cluster="rtx-4090x8-pcie"),
        root=tmp_path,
    )
    outcome = sweep(spec, tmp_path / "out", Here())
    assert outcome.count("ok") == 4
    cluster = moesim.load_cluster("rtx-4090x8-pcie")
    plan, _ = place(Problem.of(trace.select(tokens="0%:50%"), cluster, tokens_per_device=256), solver="eplb")
    assert plan is not None
    expected = score(trace.select(tokens="50%:"), [plan], cluster, tokens_per_device=256)[0].summary()
    by_hand = next(row for row in outcome.rows if row["fields"]["solver"] == "eplb" and row["fields"]["bandwidth"] == 1.0)["figures"]
    assert by_hand["max_load_ratio"] == expected["max_load_ratio"]
    assert by_hand["layer_time_s"] == pytest.approx(expected["layer_time_s"], rel=1e-9)
    table = results(tmp_path / "out")
    assert list(table["case"]) == [case.id for case in spec.cases]
    slow = table[table["bandwidth"] == 0.1].set_index("solver")["dispatch_s"]
    assert (slow > table[table["bandwidth"] == 1.0].set_index("solver")["dispatch_s"]).all()
    assert table["layer_time_s"].tolist() == [row["figures"]["layer_time_s"] for row in outcome.rows]


def test_a_second_run_does_only_what_is_missing_and_writes_the_same_table(trace: Trace, tmp_path: Path) -> None:
    half, both = (as_spec(spec_of(trace, solver="linear", seed=seeds), root=tmp_path) for seeds in ([0, 1], [0, 1, 2, 3]))
    sweep(both, tmp_path / "whole", Here())
    sweep(half, tmp_path / "out", Here())
    rows_before = [row["seconds"] for row in read_rows(tmp_path / "out")]
    assert sweep(both, tmp_path / "out", Here()).kept == 2
    again = sweep(both, tmp_path / "out", Here())
    assert again.kept == 4
    assert [row["seconds"] for row in again.rows[:2]] == rows_before
    assert (tmp_path / "out" / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()


def test_the_impossible_is_recorded_as_such_and_a_failure_is_not_fatal_and_tried_again(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = as_spec(spec_of(trace, solver=["eplb", "exflow"], replicas=8), root=tmp_path)
    impossible = sweep(spec, tmp_path / "a", Here())
    assert [row["status"] for row in impossible.rows] == ["ok", "infeasible"]
    assert "replicas" in impossible.rows[1]["error"]

    def broken(fields: Any) -> Found:
        if fields.solver == "linear":
            raise ZeroDivisionError("planted")
        return Found(figures={"layer_time_s": float("nan")}, notes=["as it is"])

    monkeypatch.setitem(KINDS, "simulate", Kind(**{**{f: getattr(KINDS["simulate"], f) for f in Kind.__dataclass_fields__}, "run": broken}))
    spec = as_spec(spec_of(trace, solver=["eplb", "linear"]), root=tmp_path)
    outcome = sweep(spec, tmp_path / "b", Here())
    assert (outcome.count("ok"), outcome.count("failed")) == (1, 1)
    assert "ZeroDivisionError: planted" in outcome.rows[1]["error"]
    assert "in broken" in outcome.rows[1]["traceback"]
    assert outcome.rows[0]["figures"] == {"layer_time_s": None}
    assert "layer_time_s is nan, not a number" in outcome.rows[0]["notes"]
    monkeypatch.undo()
    repaired = sweep(spec, tmp_path / "b", Here())
    assert (repaired.kept, repaired.count("ok")) == (1, 2)
    assert len(results(tmp_path / "b")) == 2


def test_a_worker_that_sees_another_file_says_so(trace: Trace, tmp_path: Path) -> None:
    case = as_spec(spec_of(trace, solver="linear"), root=tmp_path).cases[0]
    stranger = Case(kind=case.kind, fields=case.fields, content={**case.content, "trace": "0" * 16})
    row = work(stranger)
    assert row["status"] == "failed"
    assert "give every worker the same files" in row["error"]


def test_contests_put_equal_conditions_together_best_first(trace: Trace, tmp_path: Path) -> None:
    spec = as_spec(spec_of(trace, solver=["linear", "eplb"], tokens_per_device=[16, 256]), root=tmp_path)
    groups = contests(spec, sweep(spec, tmp_path / "out", Here()).rows)
    assert [len(group) for group in groups] == [2, 2]
    for group in groups:
        assert len({row["fields"]["tokens_per_device"] for row in group}) == 1
        assert group[0]["figures"]["layer_time_s"] <= group[1]["figures"]["layer_time_s"]


# --- crews -----------------------------------------------------------------------------------------------------------


def test_local_workers_find_the_same_and_a_deadly_item_is_named_without_harm_to_others(tmp_path: Path) -> None:
    found = dict(LocalCrew(2).run(square_or_die, range(12)))
    assert found.pop(7) == Died(3)
    assert found == {n: n * n for n in range(12) if n != 7}
    assert list(LocalCrew(3).run(square_or_die, [])) == []
    with pytest.raises(InputError, match="0 workers"):
        LocalCrew(0)


def test_statistics_by_a_crew_are_those_of_the_whole(tmp_path: Path) -> None:
    model = tiny_model()
    ids = clustered_routing(model, 900)
    with TraceWriter(tmp_path / "t", model, top_k=2, weights=False, part_rows=100) as writer:
        for step in range(9):
            writer.append(ids[step * 100 : (step + 1) * 100], step=step, domain="a" if step % 2 else "b")
    trace = load_trace(tmp_path / "t")
    assert len(trace.parts) == 9
    for view in (trace, trace.select(domain="a")):
        whole, parts = TraceStats.of(view), stats_of(view, Here())
        assert parts.tokens == whole.tokens
        for name in ("load_LE", "coactivation_LEE", "transitions_LEE"):
            assert np.array_equal(getattr(parts, name), getattr(whole, name))
    with pytest.raises(InputError, match="cannot be counted part by part"):
        stats_of(trace.select(tokens="0%:50%"), Here())
    trace.parts[3].write_bytes(b"PAR1 spoilt")
    with pytest.raises(InputError, match="part-"):
        stats_of(trace, Here())


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_verb_sweeps_shows_and_goes_on(moesim: Callable[..., tuple[int, str, str]], trace: Trace, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(
        f'kind = "simulate"\ntitle = "Two solvers"\n[grid]\ntrace = "{trace.path}"\ncluster = "h100x8"\n'
        'solver = ["exflow", "eplb"]\nreplicas = [0, 8]\ntokens_per_device = 32\n'
    )
    code, out, _ = moesim("sweep", file, "-o", tmp_path / "out", "--workers", 1)
    assert code == 0
    assert "Two solvers" in out
    assert "4 cases, 0 done before: 3 ok, 1 infeasible" in out
    code, out, _ = moesim("sweep", file, "-o", tmp_path / "out", "--json")
    told = json.loads(out)
    assert (code, told["cases"], told["kept"], told["ok"], told["infeasible"], told["failed"]) == (0, 4, 4, 3, 1, 0)
    assert moesim("sweep", file, "--workers", 1, "--scheduler", "tcp://x:1")[0] == 2


def test_failed_cases_end_with_exit_code_1_and_their_reason(
    moesim: Callable[..., tuple[int, str, str]], trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moesim.sweep as room

    monkeypatch.setattr(room, "LocalCrew", lambda workers: Here())
    file = tmp_path / "s.toml"
    file.write_text(f'kind = "simulate"\n[grid]\ntrace = "{trace.path}"\ncluster = "h100x8"\nsolver = "eplb"\ndispatch = ["even", "oddly"]\n')
    code, out, err = moesim("sweep", file, "-o", tmp_path / "out")
    assert code == 1
    assert "1 ok, 1 failed" in out
    assert "failed: PlanError: " in err
    assert "(1 cases, such as dispatch = oddly)" in err


# --- other kinds -------------------------------------------------------------------------------------------------------


def test_caches_are_swept_over_policies_and_sizes_and_no_policy_beats_the_optimal_one(trace: Trace, tmp_path: Path) -> None:
    from moesim.replay import Events, replay

    grid = {"trace": str(trace.path), "policy": ["lru", "lfu", "optimal"], "slots": [2, 4, 8, 16], "domain": "code"}
    outcome = sweep(as_spec({"kind": "cache", "grid": grid}, root=tmp_path), tmp_path / "out", Here())
    assert outcome.count("ok") == 12
    misses = {(row["fields"]["policy"], row["fields"]["slots"]): row["figures"]["miss_ratio"] for row in outcome.rows}
    assert all(misses["optimal", slots] <= misses[policy, slots] for policy in ("lru", "lfu") for slots in (2, 4, 8, 16))
    assert misses["lru", 4] == replay(Events.of(trace.select(domain="code")), "lru", 4).miss_ratio
    half = as_spec({"kind": "cache", "grid": {"trace": str(trace.path), "policy": "lru", "share": "50%", "domain": "code"}}, root=tmp_path)
    assert sweep(half, tmp_path / "half", Here()).rows[0]["figures"]["miss_ratio"] == misses["lru", 8]


@pytest.mark.parametrize(
    ("kind", "grid", "said"),
    [
        ("cache", {"policy": "lru"}, "give slots, or the share"),
        ("cache", {"policy": "nothing", "slots": 1}, "'nothing' is not installed"),
        ("capacity", {"arrivals": "poisson:rate=1", "slo": "ttft=1s", "cluster": "h100x8"}, "span is missing"),
        ("capacity", {"arrivals": "nowhere.csv", "slo": "ttft=1s", "cluster": "h100x8"}, "nowhere.csv"),
        ("capacity", {"arrivals": "poisson:rate=1,span=9s,prompt=9,output=9", "slo": "ttft=1", "cluster": "h100x8", "skew": 0.5}, "skew_domain"),
        ("capacity", {"arrivals": "poisson:rate=1,span=9s,prompt=9,output=9", "slo": "soon", "cluster": "h100x8"}, "'soon' is not understood"),
    ],
)
def test_mistakes_in_other_kinds_are_said_too(trace: Trace, tmp_path: Path, kind: str, grid: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        as_spec({"kind": kind, "grid": {"trace": str(trace.path), **grid}}, root=tmp_path)


def test_without_a_spec_the_verb_lists_kinds_and_their_fields(moesim: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = moesim("sweep")
    assert code == 0
    assert all(f"{name}: " in out for name in KINDS)
    told = json.loads(moesim("sweep", "--json")[1])["kinds"]
    assert told["simulate"]["fields"]["tokens_per_device"] == 4096
