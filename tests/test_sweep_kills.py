"""Sweeps that are killed: no case is lost, done twice in the table, or altered. Local workers, whole sweeps and Dask workers."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moesim.sweep import load_spec, results
from moesim.sweep.crew import ATTEMPTS
from moesim.sweep.journal import PARTS, read_rows
from moesim.trace import TraceStats, TraceWriter, load_trace
from tests.conftest import clustered_routing, tiny_model
from tests.sweep_cases import Here

CASES = 160
MAIN = "from moesim.cli import main; main()"
PATIENCE_S = 90.0  # on a machine that others use, too


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small cases, no two with the same answer."""
    model, folder = tiny_model(), tmp_path_factory.mktemp("kills")
    with TraceWriter(folder / "trace", model, top_k=2, weights=False) as writer:
        writer.append(clustered_routing(model, 600))
    file = folder / "s.toml"
    sizes = list(range(1, CASES // 2 + 1))
    file.write_text(f'kind = "simulate"\n[grid]\ntrace = "trace"\ncluster = "h100x8"\nsolver = ["linear", "eplb"]\ntokens_per_device = {sizes}\n')
    return file


@pytest.fixture(scope="module")
def expected(spec: Path) -> bytes:
    """The table of the same sweep in one process, undisturbed."""
    from moesim.sweep import sweep

    sweep(load_spec(spec), spec.parent / "undisturbed", Here())
    return (spec.parent / "undisturbed" / "results.csv").read_bytes()


class Running:
    """A sweep in a process of its own."""

    def __init__(self, spec: Path, out: Path, *options: object) -> None:
        self.out = out
        command = [sys.executable, "-c", MAIN, "sweep", str(spec), "-o", str(out), *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def rows(self) -> int:
        return sum(part.read_bytes().count(b"\n") for part in self.out.glob(PARTS))

    def until(self, rows: int) -> bool:
        """Wait for so many lines on disk; false when the sweep ended before."""
        end = time.monotonic() + PATIENCE_S
        while self.rows() < rows:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "the sweep makes no progress"
            time.sleep(0.005)
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def finish(self) -> None:
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, out + err


def children(pid: int) -> list[int]:
    """Processes that work for `pid`, oldest first, without the resource tracker of multiprocessing."""
    found: list[tuple[int, int]] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            parent, began = int(stat[1]), int(stat[19])
            command = (folder / "cmdline").read_text()
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid and "spawn_main" in command:
            found.append((began, int(folder.name)))
    return [number for _, number in sorted(found)]


def whole(out: Path, expected: bytes) -> None:
    """Every case is in the table once with the figures of an undisturbed run, and no line was altered or done twice."""
    damaged: list[str] = []
    rows = list(read_rows(out, damaged))
    assert damaged == []
    assert set(Counter(row["case"] for row in rows).values()) == {1}
    assert (out / "results.csv").read_bytes() == expected
    assert results(out)["case"].is_unique


pytestmark = pytest.mark.slow
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes by /proc")


# two seeds each: 22 kills in all


@needs_proc
@pytest.mark.parametrize("seed", [0, 1])
def test_a_sweep_killed_three_times_and_its_workers_four_times_ends_as_if_nothing_had_happened(
    spec: Path, expected: bytes, tmp_path: Path, seed: int
) -> None:
    luck, out, orphans = random.Random(seed), tmp_path / "out", []
    for kill in range(3):
        sweep = Running(spec, out, "--workers", 2)
        assert sweep.until(sweep.rows() + 1 + luck.randrange(10)), "the sweep was done before it could be killed; give it more cases"
        orphans += children(sweep.process.pid)
        time.sleep(luck.random() * 0.02)
        sweep.kill()
        assert sweep.rows() < CASES, kill
    sweep = Running(spec, out, "--workers", 2)
    for _ in range(2 * (ATTEMPTS - 1)):  # the oldest each time, so in turn: no case loses more workers than it may
        assert sweep.until(sweep.rows() + 1 + luck.randrange(4))
        time.sleep(luck.random() * 0.02)
        os.kill(children(sweep.process.pid)[0], signal.SIGKILL)
    sweep.finish()
    whole(out, expected)
    end = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.monotonic() < end, "workers of killed sweeps are still there"
        time.sleep(0.05)


class Cluster:
    """A Dask scheduler and two workers, real processes; workers that are killed are replaced."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.folder = folder
        self.processes = [self._start("scheduler", "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--no-dashboard", "--no-show")]
        self.workers = [self.worker(), self.worker()]

    def _start(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"dask-{what}.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "dask", what, *options], stdout=log, stderr=log, cwd=self.folder)

    def worker(self) -> subprocess.Popen[bytes]:
        process = self._start("worker", self.address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
        self.processes.append(process)
        return process

    def kill_worker(self, index: int) -> None:
        self.workers[index].kill()
        self.workers[index].wait()
        self.workers[index] = self.worker()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    running = Cluster(tmp_path)
    try:
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize("seed", [2, 3])
def test_a_dask_cluster_whose_workers_are_killed_three_times_finds_the_same(
    spec: Path, expected: bytes, tmp_path: Path, cluster: Cluster, seed: int
) -> None:
    luck, out = random.Random(seed), tmp_path / "out"
    sweep = Running(spec, out, "--scheduler", cluster.address)
    assert sweep.until(3)
    sweep.kill()
    sweep = Running(spec, out, "--scheduler", cluster.address)
    for kill in range(3):
        assert sweep.until(sweep.rows() + 2 + luck.randrange(4))
        cluster.kill_worker(kill % 2)
    sweep.finish()
    whole(out, expected)


def test_a_scheduler_that_is_not_there_is_said_before_anything_is_written(
    moesim: Callable[..., tuple[int, str, str]], spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moesim.sweep.crew as crew

    monkeypatch.setattr(crew, "PATIENCE_S", 0.5)
    code, _, err = moesim("sweep", spec, "-o", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:1")
    assert code == 2
    assert "does not answer" in err
    assert not list((tmp_path / "out").glob(PARTS))


def test_a_dask_cluster_counts_a_trace_part_by_part_as_one_process_does(moesim: Callable[..., tuple[int, str, str]], cluster: Cluster) -> None:
    trace = Path(__file__).resolve().parents[1] / "traces" / "qwen3-moe-8x64" / "held-out"
    code, out, err = moesim("inspect", trace, "--scheduler", cluster.address, "--json")
    assert code == 0, err
    counted, stats = json.loads(out), TraceStats.of(load_trace(trace))
    assert counted["tokens"] == stats.tokens
    assert counted["load"] == stats.load_LE.tolist()
    assert counted["affinity_bits"] == pytest.approx(stats.affinity_bits.tolist(), abs=1e-12)
    code, _, err = moesim("inspect", trace, "--scheduler", cluster.address, "--tokens", "0:100")
    assert code == 2
    assert "cannot be counted part by part" in err
