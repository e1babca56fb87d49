"""`moesim cache` and `CacheProblem` at the edges: no room, more room than experts, traces of next to nothing, weights that are no numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_routing, tiny_model

from moesim.errors import InputError
from moesim.optimize.cache_problem import CacheProblem
from moesim.plan import load_cache_plan
from moesim.testing.caching import first_device
from moesim.trace import Trace

Run = Callable[..., tuple[int, str, str]]
Make = Callable[..., Trace]
FAST = ("--cluster", "rtx-4090x8-pcie", "--event-steps", 0)


@pytest.mark.parametrize("memory", ["0", "0 GB", "0%", "1"])
def test_room_for_no_expert_is_infeasible(moesim: Run, trace: Trace, tmp_path: Path, memory: str) -> None:
    code, out, err = moesim("cache", trace.path, *FAST, "--memory", memory, "-o", tmp_path / "c.json", "--json")
    assert code == 1
    assert json.loads(out)["status"] == "infeasible"
    assert "holds no expert" in err
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("memory", ["nan", "inf", "-1", "1e999", "", "50 %%", "two"])
def test_memory_that_is_no_size_is_refused(moesim: Run, trace: Trace, tmp_path: Path, memory: str) -> None:
    code, _, err = moesim("cache", trace.path, *FAST, f"--memory={memory}", "-o", tmp_path / "c.json")
    assert code == 2
    assert "give bytes >= 0, such as '24 GB', or a share of all experts" in " ".join(err.split())
    assert not (tmp_path / "c.json").exists()


def test_no_tokens_are_refused(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    code, _, err = moesim("cache", trace.path, *FAST, "--memory", "50%", "--tokens", "0:0", "-o", tmp_path / "c.json")
    assert code == 2
    assert "holds no tokens" in err


def test_more_room_than_experts_and_one_expert(moesim: Run, make_trace: Make, tmp_path: Path) -> None:
    one = tiny_model(experts=8, top_k=1)
    ids = np.zeros((20, 3, 1), np.uint16)  # of eight experts one is asked for
    code, _, err = moesim("cache", make_trace(one, ids).path, *FAST, "--memory", "900%", "-o", tmp_path / "c.json")
    assert code == 0, err
    assert load_cache_plan(tmp_path / "c.json").slots_LG.tolist() == [[1] * 8] * 3


def test_gate_weights_have_no_say(make_trace: Make) -> None:
    """A cache is asked for experts whatever they weigh, NaN included."""
    model = tiny_model()
    ids = clustered_routing(model, 50)
    plain, strange = make_trace(model, ids), make_trace(model, ids, weights=np.full(ids.shape, np.nan, np.float16))
    one, two = (CacheProblem.of(each, first_device(), "50%") for each in (plain, strange))
    assert one.asked_LE.tolist() == two.asked_LE.tolist()


@pytest.mark.parametrize("memory", [None, [1], True, float("nan")])
def test_memory_of_another_kind_is_refused(trace: Trace, memory: Any) -> None:
    with pytest.raises(InputError, match="give bytes >= 0"):
        CacheProblem.of(trace, first_device(), memory)
