"""Traces: writing, size, reading one layer, starting up."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from moesim.model import load_model
from moesim.trace import TraceStats, TraceWriter, load_trace
from tests.bench.registry import Measured, bench, best_of

MODEL = load_model("deepseek-v2-lite")


def routing(tokens: int, seed: int = 0) -> np.ndarray:
    """Skewed choices of top-6 of 64 in 26 layers."""
    rng = np.random.default_rng(seed)
    liking = rng.random((26, 64))
    return np.argsort(-(liking + rng.random((tokens, 26, 64))), axis=2)[:, :, :6].astype(np.uint16)


@bench
def trace_write() -> Measured:
    """Ids written per second, against numpy.savez_compressed of the same ids."""
    ids = routing(16_384)
    with tempfile.TemporaryDirectory() as folder:
        turn = iter(range(100))

        def write() -> None:
            with TraceWriter(Path(folder) / f"t{next(turn)}", MODEL, weights=False) as writer:
                writer.append(ids)

        seconds = best_of(write)
        peer = best_of(lambda: np.savez_compressed(Path(folder) / "peer.npz", ids=ids.astype(np.uint8)), repeats=2)
    return Measured(value=ids.size / seconds, unit="ids/s", peer="numpy.savez_compressed", peer_value=ids.size / peer)


@bench
def trace_size() -> Measured:
    """Bytes on disk per id, against one byte per id in memory."""
    ids = routing(16_384)
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(Path(folder) / "t", MODEL, weights=False) as writer:
            writer.append(ids)
        size = sum(path.stat().st_size for path in (Path(folder) / "t").iterdir())
    return Measured(value=size / ids.size, unit="B/id", peer="uint8 in memory", peer_value=1.0)


@bench
def trace_read_one_layer() -> Measured:
    """Tokens per second when one of 26 layers is read, against reading all."""
    ids = routing(65_536)
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(Path(folder) / "t", MODEL, weights=False) as writer:
            writer.append(ids)
        trace = load_trace(Path(folder) / "t")
        one, everything = best_of(lambda: trace.experts(layers=[5])), best_of(trace.experts, repeats=2)
    return Measured(value=len(ids) / one, unit="tokens/s", peer="reading all layers", peer_value=len(ids) / everything)


@bench
def trace_statistics() -> Measured:
    """Tokens per second through TraceStats (loads, co-activation, transitions)."""
    ids = routing(8_192)
    return Measured(value=len(ids) / best_of(lambda: TraceStats.from_experts(ids, MODEL)), unit="tokens/s")


@bench
def import_moesim() -> Measured:
    """Seconds of `import moesim` beyond an empty interpreter."""
    empty = best_of(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    full = best_of(lambda: subprocess.run([sys.executable, "-c", "import moesim"], check=True))
    return Measured(value=full - empty, unit="s", peer="empty interpreter", peer_value=empty)


@bench
def help_screen() -> Measured:
    """Seconds of `moesim --help`."""
    code = "import sys; sys.argv = ['moesim', '--help']; from moesim.cli import main; main()"
    empty = best_of(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    return Measured(
        value=best_of(lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)),
        unit="s",
        peer="empty interpreter",
        peer_value=empty,
    )
