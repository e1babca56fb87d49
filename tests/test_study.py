"""The study of published systems: what it says is computed, and the committed report is what the command writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.studies import systems
from moesim.studies.cases import Bench, cluster_of, even_ids, exchange_share, model_of, placed, slowed_to, zipf_ids
from moesim.studies.claims import Claim, Section, band, headline, structure
from moesim.studies.stages import best_of, stage_grid
from moesim.systems import SYSTEMS
from moesim.systems.pipelining import best_degree, linear_span

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("moe++", "lsh-moe", "plain")


@pytest.fixture(scope="module")
def quick() -> list[Section]:
    """A reduced study: the quickest systems, whole."""
    return systems.study(QUICK)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as opened:
        yield opened


def test_every_system_has_a_study() -> None:
    assert set(systems.STUDIES) == {*SYSTEMS, "elasticmoe"}  # which changes a deployment's size, and no layer


def test_the_committed_report_is_what_the_command_writes(quick: list[Section]) -> None:
    committed = (ROOT / "reports" / "systems.md").read_text(encoding="utf-8")
    assert committed.startswith(systems.HEAD)
    reduced = systems.report(quick)
    for section in quick:
        assert systems.section_text(section) in committed
        (row,) = re.findall(rf"^\| {re.escape(section.name)} \| .* \|$", reduced, re.MULTILINE)
        assert row in committed
    assert re.findall(r"^## (\S+)$", committed, re.MULTILINE) == list(systems.STUDIES)
    assert "DOES NOT HOLD |" not in committed
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert systems.COMMAND.removeprefix("python ") in makefile


def test_the_same_study_gives_the_same_bytes(quick: list[Section]) -> None:
    again = systems.study(("moe++",))
    assert systems.section_text(again[0]) == systems.section_text(next(s for s in quick if s.name == "moe++"))


def test_verdicts_follow_the_figures_and_a_band_is_no_reproduction() -> None:
    assert structure("a", True, "1").verdict == "holds"
    assert structure("a", False, "1").verdict == "DOES NOT HOLD"
    for ok in (True, False):
        assert "reprod" not in band("a", "2x", "1x", ok).verdict
    assert Claim(kind="Q", what="a", published="1", simulated="2", ok=False).verdict == "does not agree"


def test_headlines_are_no_checks_and_are_listed_apart(quick: list[Section]) -> None:
    claims = [band("speed", "9x", "1.50x at most", False), headline("latency", "7x", "2.00x", False), headline("memory", "2x", "3.00x", True)]
    text = systems.report([replace(quick[0], name="plain", claims=claims)])
    checks, headlines = text.split("## Checks that do not pass")[1].split("## plain")[0].split("## Headlines that are not reached")
    assert "**plain**, speed: published 9x, simulated 1.50x at most." in checks
    assert "latency" not in checks
    assert "**plain**, latency: published 7x, simulated 2.00x." in headlines
    assert "memory" not in headlines
    assert "| plain | – | – | 0 of 1 | 1 of 2 |" in text
    assert "| H | memory | 2x | 3.00x | reached |" in text


def test_the_committed_report_names_every_check_that_does_not_pass() -> None:
    """What fails is known: a longer list is a change of what the project claims."""
    committed = (ROOT / "reports" / "systems.md").read_text(encoding="utf-8")
    checks = committed.split("## Checks that do not pass")[1].split("## Headlines")[0]
    found = re.findall(r"\*\*(\S+)\*\*, ([^:]+):", checks)
    assert set(found) <= {("elasticmoe", "during the change, concurrent")}
    rows = [line for line in committed.splitlines() if line.startswith("| ")]
    assert sum(line.endswith(("DOES NOT HOLD |", "does not agree |", "NOT REACHED |")) for line in rows) == len(found)


def test_a_structural_check_that_fails_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: list[Section]) -> None:
    broken = replace(quick[0], name="plain", claims=[structure("the sky stays up", False, "fallen")])
    monkeypatch.setattr(systems, "STUDIES", {"plain": lambda bench: broken})
    monkeypatch.setattr("sys.argv", ["systems", "-o", str(tmp_path / "out" / "systems.md")])
    with pytest.raises(SystemExit, match="the sky stays up"):
        systems.main()
    assert "DOES NOT HOLD" in (tmp_path / "out" / "systems.md").read_text()


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_slowed_network_gives_the_share_asked_for(bench: Bench, share: float) -> None:
    model = model_of(intermediate=1024)
    trace = bench.trace(model, zipf_ids(512, model, 0.3))
    cluster = slowed_to(bench, trace, share, nodes=2, local=2, tokens_per_device=4096)
    assert exchange_share(bench.run(trace, cluster, tokens_per_device=4096)) == pytest.approx(share, abs=1e-3)


def test_impossible_cases_are_named(bench: Bench) -> None:
    model = model_of()
    with pytest.raises(InputError, match="change the case's tokens or sizes"):
        slowed_to(bench, bench.trace(model, zipf_ids(64, model, 0.3)), 0.9, nodes=1, local=2)
    with pytest.raises(InputError, match="link 'usb' is not known"):
        cluster_of("a100-80", 1, 2, link="usb")


def test_even_routing_is_even_and_skewed_routing_is_skewed(bench: Bench) -> None:
    model, cluster = model_of(), cluster_of("a100-80", 2, 4)
    even, skewed = (bench.run(bench.trace(model, ids), cluster, tokens_per_device=64) for ids in (even_ids(64, model), zipf_ids(2048, model, 1.0)))
    np.testing.assert_allclose(even.load_ratio_L, 1.0)
    assert (skewed.load_ratio_L > 1.5).all()
    turns = placed(model, 8, turns=True)
    assert turns.slots_LP[0, :4].tolist() == [0, 8, 16, 24]


def test_the_search_over_all_layers_at_once_equals_one_by_one() -> None:
    grid = stage_grid(12.5e9 / 4, 6e9, 40e12, 1e-4)[0][:12]
    degree_N, span_N = best_of(grid)
    assert degree_N.tolist() == [best_degree(stages) for stages in grid]
    np.testing.assert_allclose(span_N, [linear_span(stages, r) for stages, r in zip(grid, degree_N.tolist(), strict=True)])
