"""Cache plans on tokens nobody learnt from: the shipped traces, whole and domain by domain."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.optimize.cache_problem import CacheProblem
from moesim.optimize.cache_score import score_cache
from moesim.optimize.caching import plan_cache
from moesim.testing.caching import first_device
from moesim.trace import load_trace

SHIPPED = Path(__file__).parents[1] / "traces" / "qwen3-moe-8x64"


@pytest.mark.parametrize("domain", [None, "python", "cpp", "english", "german", "french", "russian", "japanese", "chinese"])
def test_quotas_beat_equal_slots_on_held_out_tokens(domain: str | None) -> None:
    """Learnt from the trained model on its training text, judged on documents it never saw, half of the experts in memory."""
    learn, judge = (load_trace(SHIPPED / part).select(domain=domain) for part in ("train-part", "held-out"))
    problem = CacheProblem.of(learn, first_device(), "50%")
    judged = CacheProblem.like(problem, judge)
    mine, equal_slots = (plan_cache(problem, solver=name).plan for name in ("pin-set", "equal-slots"))
    assert mine is not None
    assert equal_slots is not None
    assert score_cache(judged, mine).miss_ratio < score_cache(judged, equal_slots).miss_ratio
