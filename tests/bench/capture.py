"""Capture: what recording every step costs the demo's training."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from tests.bench.registry import Measured, bench


@bench
def capture_share_of_training() -> Measured:
    """Share of the demo's training time spent in hooks and the writer thread (closing included) when every step is recorded."""
    from moesim.capture import capture
    from moesim.demo.corpus import load_corpus
    from moesim.demo.train import build_model, train

    corpus, model = load_corpus(), build_model()
    train(model, corpus, steps=2)  # loads code
    with tempfile.TemporaryDirectory() as folder:
        with capture(model, Path(folder) / "trace") as recorder:
            begin = time.perf_counter()
            train(model, corpus, steps=25, before=lambda step, microbatch, domain: recorder.step(step, microbatch=microbatch, domain=domain))
            spent = time.perf_counter() - begin
        share = (recorder.overhead_s + recorder.writer_s) / spent
    return Measured(value=share, unit="of training time", peer="the 1 % we allow", peer_value=0.01)
