"""Capture: what recording every step costs the demo's training."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.registry import Measured, bench

STEPS, RUNS, BLOCK, PAIRS = 25, 5, 5, 10


@bench
def capture_share_of_training() -> Measured:
    """Share of the demo's training time spent in hooks and the writer thread when every step is recorded, closing included.

    The median of runs of 25 steps: a process' first run takes up to twice as much, as its memory is new. Seconds in hooks are by the wall clock, so
    on a busy machine they count what other programs took meanwhile. What opening takes is no part of a step: about 5 ms, in which Arrow's code is
    loaded; `capture-slows-training` counts it.
    """
    model, corpus = _prepared()
    shares = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            recorder, spent = _captured(model, corpus, Path(folder) / "trace", STEPS)
        shares.append((recorder.overhead_s + recorder.writer_s) / spent[0])
    return Measured(value=statistics.median(shares), unit="of training time", peer="the 1 % we allow", peer_value=0.01)


@bench
def capture_slows_training() -> Measured:
    """Wall-clock time of training with capture, closing included, against the same without: median of alternating short blocks."""
    from moesim.demo.train import train

    model, corpus = _prepared()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(PAIRS):
            seconds = {}
            for captured in (pair % 2 == 0, pair % 2 == 1):  # neither is always the first
                if captured:
                    seconds[captured] = _captured(model, corpus, Path(folder) / str(pair), BLOCK)[1][1]
                else:
                    begin = time.perf_counter()
                    train(model, corpus, steps=BLOCK)
                    seconds[captured] = time.perf_counter() - begin
            ratios.append(seconds[True] / seconds[False])
    return Measured(value=statistics.median(ratios), unit="x of the time without", peer="no capture", peer_value=1.0)


def _prepared() -> tuple[Any, Any]:
    """The demo's model and corpus, code loaded."""
    from moesim.demo.corpus import load_corpus
    from moesim.demo.train import build_model, train

    corpus, model = load_corpus(), build_model()
    train(model, corpus, steps=2)
    return model, corpus


def _captured(model: Any, corpus: Any, path: Path, steps: int) -> tuple[Any, tuple[float, float]]:
    """The closed recorder, and the seconds of training without and with opening and closing."""
    from moesim.capture import capture
    from moesim.demo.train import train

    opened = time.perf_counter()
    with capture(model, path) as recorder:
        begin = time.perf_counter()
        train(model, corpus, steps=steps, before=lambda step, microbatch, domain: recorder.step(step, microbatch=microbatch, domain=domain))
        spent = time.perf_counter() - begin
    return recorder, (spent, time.perf_counter() - opened)
