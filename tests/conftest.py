"""Fixtures: small models, synthetic routing with planted structure, traces on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from moesim.model import ModelSpec
from moesim.testing import clustered_routing
from moesim.trace import Trace, TraceWriter, load_trace

# JIT compilation makes the first example slow; the suite is timed as a whole, not by example.
settings.register_profile("moesim", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moesim")


def tiny_model(layers: int = 3, experts: int = 16, top_k: int = 2, **sizes: Any) -> ModelSpec:
    """A MoE model whose first layer is dense."""
    values = {"hidden": 64, "intermediate": 32} | sizes
    return ModelSpec(name="tiny", layers=layers + 1, moe_layers=tuple(range(1, layers + 1)), experts=experts, top_k=top_k, **values)


@pytest.fixture
def model() -> ModelSpec:
    """3 MoE layers x 16 experts, top-2."""
    return tiny_model()


@pytest.fixture
def make_trace(tmp_path: Path) -> Callable[..., Trace]:
    """Writes routing to a trace directory and opens it."""
    made = 0

    def make(model: ModelSpec, experts_TLK: NDArray[Any], **columns: Any) -> Trace:
        nonlocal made
        made += 1
        path = tmp_path / f"trace{made}"
        with TraceWriter(path, model, top_k=experts_TLK.shape[2], weights="weights" in columns) as writer:
            writer.append(experts_TLK, **columns)
        return load_trace(path)

    return make


@pytest.fixture
def trace(model: ModelSpec, make_trace: Callable[..., Trace]) -> Trace:
    """2,000 tokens of two domains."""
    ids = clustered_routing(model, 2000)
    return make_trace(model, ids, domain=np.where(np.arange(2000) % 3 == 0, "prose", "code"), position=np.arange(2000))


@pytest.fixture
def moesim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    from moesim.cli import main

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["moesim", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


__all__ = ["clustered_routing", "tiny_model"]
