"""Capture across processes, through kills and full disks, and of scripts that know nothing of it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from capture_scripts import kill_loop, parallel_train
from capture_scripts.tiny import TinyMoE, adapt, tiny_spec, tokens

from moesim import load_trace
from moesim.capture import capture, routers
from moesim.capture.rows import RowBuffer
from moesim.capture.run import run_script
from moesim.errors import CaptureError, InputError, OutputExists
from moesim.trace.writer import TraceWriter

SCRIPTS = Path(__file__).parent / "capture_scripts"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def strange_gate_is_known() -> Any:
    adapt()
    yield
    routers._REGISTERED.clear()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What child processes need to import the project and these scripts; one thread each."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "solvers"), str(ROOT / "tests")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def python(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def columns(path: Path, *names: str) -> list[tuple[Any, ...]]:
    tables = [pq.read_table(part, columns=list(names)) for part in sorted(path.glob("part-*.parquet"))]
    return [row for table in tables for row in zip(*(table[name].to_pylist() for name in names), strict=True)]


# --- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
def test_every_ranks_tokens_are_in_one_trace_exactly_once(tmp_path: Path) -> None:
    """DDP by a script under torchrun that is captured unchanged, and FSDP2 captured by hand in the same processes."""
    command = ["torchrun", "--standalone", "--nproc-per-node=2", str(SCRIPTS / "parallel_train.py"), str(tmp_path / "fsdp")]
    assert run_script(command, tmp_path / "ddp", model_spec=tiny_spec(), domain="x") == 0
    torch.manual_seed(0)
    model = TinyMoE()
    for kind in ("ddp", "fsdp"):
        trace = load_trace(tmp_path / kind)
        rows = columns(tmp_path / kind, "rank", "step", "token_id")
        expected = [
            (rank, step, token)
            for rank in range(2) for step in range(parallel_train.STEPS) for token in tokens(100 * rank + step).flatten().tolist()
        ]  # fmt: skip
        assert sorted(rows) == sorted(expected)
        assert (tmp_path / kind / "manifest.json").exists()
        assert (tmp_path / kind / "manifest-00001.json").exists()
        assert trace.info.captured_by["world"] == 2
        assert set(trace.info.captured_by["routers"].values()) == {"layers.0.gate", "layers.1.gate", "layers.2.gate"}
        for rank in range(2):  # before the first update both ranks hold the seeded weights
            first = [i for i, row in enumerate(rows) if row[:2] == (rank, 0)]
            with torch.no_grad():
                ids = model.layers[0].gate(model.embed(tokens(100 * rank)))["chosen"].flatten(0, 1)
            np.testing.assert_array_equal(trace.experts()[first, 0], ids.numpy())


def test_ranks_share_a_directory_but_a_second_run_of_the_same_id_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        with TraceWriter(tmp_path / "t", tiny_spec(), weights=False, rank=rank, run="launch") as writer:
            writer.append(np.zeros((1, 3, 2), np.uint16))
    for rank in range(2):
        with pytest.raises(OutputExists, match=f"rank {rank} of an earlier run"):
            TraceWriter(tmp_path / "t", tiny_spec(), rank=rank, run="launch")
    with pytest.raises(OutputExists, match="not empty"):
        TraceWriter(tmp_path / "t", tiny_spec(), rank=0, run="another launch")
    assert load_trace(tmp_path / "t").tokens == 2


# --- kills and disks -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("environment")
def test_a_kill_at_any_moment_loses_at_most_what_was_not_flushed(tmp_path: Path) -> None:
    steps_done = json.loads(python(SCRIPTS / "kill_loop.py", tmp_path, "20"))
    per_step = kill_loop.BATCH * kill_loop.LENGTH
    may_miss = kill_loop.PART_ROWS * 5 // 4 + (kill_loop.RING + 1) * per_step  # a part, what is being joined, and what waits
    assert len(steps_done) == 20
    opened = 0
    for n, steps in enumerate(steps_done):
        out = tmp_path / f"run{n}"
        if steps <= kill_loop.RING + 1 and not list(out.glob("part-*")):
            continue  # killed before the first part could be written
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no manifest"
            trace = load_trace(out)
        rows = columns(out, "step", "token_id")
        kept = len(rows) // per_step
        assert rows == [(step, token) for step in range(kept) for token in tokens(step, kill_loop.BATCH, kill_loop.LENGTH).flatten().tolist()]
        assert trace.experts().shape == (len(rows), 3, 2)
        assert steps * per_step - len(rows) <= may_miss
        opened += 1
    assert opened >= 17


def run_until_error(recorder: Any, model: TinyMoE, steps: int = 400) -> int:
    for step in range(steps):
        recorder.step(step)
        model(tokens(step, 4, 32))
        time.sleep(0.002)
    return steps


@pytest.fixture
def small_disk() -> Any:
    """No file may grow beyond 60 kB: the write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_one_error_in_the_next_step_and_hooks_go(tmp_path: Path) -> None:
    model = TinyMoE()
    with (
        pytest.raises(CaptureError, match=r"cannot be written: .*File too large.*tokens are safe"),
        capture(model, tmp_path / "t", model_spec=tiny_spec(), part_rows=8192, when_full="block", ring_slots=1) as recorder,
    ):
        run_until_error(recorder, model)
    assert recorder.error is not None
    assert not model.layers[0].gate._forward_hooks
    assert not list((tmp_path / "t").glob(".part*.tmp"))
    with pytest.warns(UserWarning, match="no manifest"):
        assert load_trace(tmp_path / "t").tokens == recorder.writer.rows_written > 0


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_can_be_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    model = TinyMoE()
    with (
        pytest.warns(RuntimeWarning, match="cannot be written") as said,
        capture(model, tmp_path / "t", model_spec=tiny_spec(), part_rows=8192, on_error="warn") as recorder,
    ):
        assert run_until_error(recorder, model) == 400
    assert len(said) == 1


def test_a_directory_that_goes_away_is_said_at_close_if_no_step_follows(tmp_path: Path) -> None:
    model = TinyMoE()
    with pytest.raises(CaptureError, match="No such file"), capture(model, tmp_path / "t", model_spec=tiny_spec(), part_rows=1):  # noqa: PT012
        model(tokens(0))
        time.sleep(0.3)
        shutil.rmtree(tmp_path / "t")
        model(tokens(1))


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CaptureError, match="cannot be written there"):
        capture(TinyMoE(), tmp_path / "file" / "t", model_spec=tiny_spec())


@contextmanager
def unprivileged() -> Iterator[None]:
    """Files as an ordinary user sees them, where the tests are run by root, who may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_permission_lost_in_mid_run_is_one_error_and_what_was_written_stays(tmp_path: Path) -> None:
    model, out = TinyMoE(), tmp_path / "t"
    recorder = capture(model, out, model_spec=tiny_spec(), part_rows=1)
    model(tokens(0))
    until = time.monotonic() + 10
    while not list(out.glob("part-*")) and time.monotonic() < until:
        time.sleep(0.01)
    out.chmod(0o500)
    try:
        with unprivileged():
            with pytest.raises(CaptureError, match=r"cannot be written: .*Permission denied.*16 tokens are safe"):
                run_until_error(recorder, model)
            model(tokens(0))  # without hooks: the run goes on
            recorder.close()
    finally:
        out.chmod(0o700)
    with pytest.warns(UserWarning, match="no manifest"):
        assert load_trace(out).tokens == 16


def test_a_place_without_permission_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with unprivileged(), pytest.raises(CaptureError, match="cannot be written there: .*Permission denied"):
        capture(TinyMoE(), tmp_path / "closed" / "t", model_spec=tiny_spec())


def test_tokens_reach_the_disk_while_the_run_stands_still(tmp_path: Path) -> None:
    model = TinyMoE()
    with capture(model, tmp_path / "t", model_spec=tiny_spec(), part_seconds=0.1):
        model(tokens(0))
        model(tokens(1))
        until = time.monotonic() + 10
        while len(columns(tmp_path / "t", "step")) < 32 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(columns(tmp_path / "t", "step")) == 32


@pytest.mark.parametrize("when_full", ["block", "drop"])
def test_a_slow_disk_blocks_or_drops_whole_passes_and_counts_them(when_full: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = RowBuffer.add

    def slowly(*args: Any) -> None:
        time.sleep(0.02)
        add(*args)

    monkeypatch.setattr(RowBuffer, "add", slowly)
    model = TinyMoE()
    with capture(model, tmp_path / "t", model_spec=tiny_spec(), when_full=when_full, ring_slots=1) as recorder:
        for step in range(12):
            recorder.step(step)
            model(tokens(step))
    steps = sorted({step for (step,) in columns(tmp_path / "t", "step")})
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert len(steps) + recorder.dropped == 12
    assert manifest["forwards_dropped"] == recorder.dropped
    assert (recorder.dropped == 0) == (when_full == "block")
    assert manifest["rows"] == 16 * len(steps) == recorder.tokens


def test_an_exception_in_the_run_closes_the_trace_and_passes_through(tmp_path: Path) -> None:
    model = TinyMoE()
    with pytest.raises(KeyError), capture(model, tmp_path / "t", model_spec=tiny_spec()):  # noqa: PT012
        model(tokens(0))
        raise KeyError("mine")
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["interrupted"] == "KeyError"
    assert load_trace(tmp_path / "t").tokens == 16


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["no", "wrapped", "in-place"])
def test_a_script_is_captured_unchanged(how: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    original, argv = torch.nn.Module.__call__, sys.argv
    status = run_script([str(SCRIPTS / "plain_train.py"), "--steps", "3", "--compile", how], tmp_path / "t", model_spec=tiny_spec(), domain="x")
    torch._dynamo.reset()
    assert status == 0
    assert torch.nn.Module.__call__ is original
    assert sys.argv is argv
    expected = [(step, token, "x") for step in range(3) for token in tokens(step).flatten().tolist()]
    assert columns(tmp_path / "t", "step", "token_id", "domain") == expected


def test_a_module_is_captured_and_its_exit_status_kept(tmp_path: Path) -> None:
    status = run_script(["-m", "capture_scripts.plain_train", "--exit", "3"], tmp_path / "t", model_spec=tiny_spec(), logits=True)
    assert load_trace(tmp_path / "t").info.logits
    assert status == 3
    assert load_trace(tmp_path / "t").tokens == 32


def test_a_failing_script_leaves_its_trace_and_its_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="own fault"):
        run_script([str(SCRIPTS / "plain_train.py"), "--fail"], tmp_path / "t", model_spec=tiny_spec())
    assert json.loads((tmp_path / "t" / "manifest.json").read_text())["interrupted"] == "RuntimeError"


def test_a_script_without_a_known_router_is_an_error_that_names_candidates(tmp_path: Path) -> None:
    routers._REGISTERED.clear()
    with pytest.raises(CaptureError, match=r"modules that look like one: StrangeGate\. .*register_router"):
        run_script([str(SCRIPTS / "plain_train.py"), "--unknown"], tmp_path / "t", model_spec=tiny_spec())


def test_nothing_to_run_is_a_usage_error(tmp_path: Path) -> None:
    for argv in ([], ["-m"], [str(tmp_path / "absent.py")]):
        with pytest.raises(InputError):
            run_script(argv, tmp_path / "t")
