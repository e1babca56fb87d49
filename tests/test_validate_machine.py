"""The device under test: absent, busy, full or broken ones are said; long measurements go on where they stopped; profiles load."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from moesim.calibrate.kernels import predict_kernel
from moesim.cost import CostModel
from moesim.cost.copies import host_path
from moesim.errors import InputError, ValidationError
from moesim.hardware import load_cluster
from moesim.hardware.profile import load_device
from moesim.validate import machine, timing
from moesim.validate.calibrate import calibrate, kernel_dict, kernel_of
from moesim.validate.ceilings import fit_copies, measure_copies, measure_launch, measure_overlap
from moesim.validate.kept import Kept
from moesim.validate.machine import check_device, check_free, clocks, hardware, on_device
from moesim.validate.profile_file import cluster_text, profile_text
from moesim.validate.timing import Graphs, measure

calibrate_room = sys.modules["moesim.validate.calibrate"]  # the package has a function of this name


def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="use cpu or cuda"):
        check_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValidationError, match="torch sees no GPU"):
            check_device("cuda")


def test_a_busy_gpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(machine, "clocks", lambda device: {"busy_percent": 63.0})
    with pytest.raises(ValidationError, match=r"cuda is 63% busy with other work \(limit 10%\)"):
        check_free("cuda")
    check_free("cpu")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1)
    check_free("cuda")  # busy with this process
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(machine, "clocks", lambda device: {"busy_percent": 2.0})
    check_free("cuda")
    monkeypatch.setattr(machine, "clocks", lambda device: {"note": "nvidia-smi is not installed"})
    check_free("cuda")


def test_clocks_are_noted_and_never_stop_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert "not installed" in clocks("cuda")["note"]
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="1980, 2619, 41, 310.5, 3, 0x0000000000000000\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: answer)
    assert clocks("cuda:0") == {
        "sm_clock_MHz": 1980, "memory_clock_MHz": 2619, "temperature_C": 41, "power_W": 310.5, "busy_percent": 3, "throttled": "0x0000000000000000"
    }  # fmt: skip

    def old(command: list[str], **_: Any) -> Any:
        if "event_reasons" in command[2]:
            raise subprocess.CalledProcessError(2, command)
        return answer

    monkeypatch.setattr(machine.subprocess, "run", old)
    assert clocks("cuda")["throttled"] == "0x0000000000000000"

    def broken(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    monkeypatch.setattr(machine.subprocess, "run", broken)
    assert "nvidia-smi failed" in clocks("cuda")["note"]
    assert clocks("cpu")


def fail(problem: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> None:
        raise problem

    return call


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 20 GiB\nmore"), "has too little memory: CUDA out of memory. Tried 20 GiB; use"),
        (RuntimeError("CUDA error: unspecified launch failure\nmore"), "failed: CUDA error: unspecified launch failure; check it with nvidia-smi"),
        (RuntimeError("no kernel image is available for execution"), "failed: no kernel image"),
    ],
)  # fmt: skip
def test_failures_of_a_device_say_what_to_do(problem: Exception, message: str) -> None:
    with pytest.raises(ValidationError, match=message), on_device("cuda", "trial"):
        raise problem
    with pytest.raises(RuntimeError, match="a bug"), on_device("cpu", "trial"):  # not the device's fault
        raise RuntimeError("a bug of ours")


def test_a_device_that_runs_full_while_calibrating_is_said_and_finished_steps_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = tmp_path / "part.json"
    wanted: dict[str, Any] = {"experts": 2, "top_k": 1, "most_tokens": 32, "loads": 7, "repeats": 2, "keep": keep}
    right, calls = calibrate_room._measure_shape, []

    def second_is_too_large(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1:3])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(*arguments, **options)

    monkeypatch.setattr(calibrate_room, "_measure_shape", second_is_too_large)
    with pytest.raises(ValidationError, match="too little memory"):
        calibrate("cpu", [(16, 16), (32, 16)], **wanted)
    kept = json.loads(keep.read_text())
    assert set(kept["steps"]) == {"peak", "experts 16x16"}
    monkeypatch.setattr(calibrate_room, "_measure_shape", right)
    found = calibrate("cpu", [(16, 16), (32, 16)], **wanted)
    assert [list(row) for row in found.samples_s[:7]] == kept["steps"]["experts 16x16"][0]  # not measured again
    with pytest.raises(InputError, match="holds steps of another measurement"):
        calibrate("cpu", [(16, 16)], **{**wanted, "loads": 8})


def test_steps_are_kept_as_they_finish(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    kept = Kept(path, {"a": 1})
    assert kept.step("one", lambda: [1.5]) == [1.5]
    with pytest.raises(ZeroDivisionError):
        kept.step("two", fail(ZeroDivisionError()))
    assert Kept(path, {"a": 1}).step("one", fail(AssertionError())) == [1.5]
    with pytest.raises(InputError, match="another measurement"):
        Kept(path, {"a": 2})
    path.write_text("[]")
    with pytest.raises(InputError, match="another measurement"):
        Kept(path, {"a": 1})
    kept.forget()
    assert not path.exists()
    assert Kept(None, {}).step("one", lambda: 2) == 2


def test_calls_are_interleaved_prepared_and_timed_each(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = [lambda i=i: order.append(f"call {i}") for i in range(3)]
    before = [lambda i=i: order.append(f"before {i}") for i in range(3)]
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "thread_time", lambda: float(next(clock)))
    threads = torch.get_num_threads()
    times = measure(calls, repeats=4, before=before, seed=1)
    assert (times == 1).all()
    assert times.shape == (3, 4)
    assert len(order) == 2 * 3 * 5  # a warm-up of each
    assert all(order[i].split()[1] == order[i + 1].split()[1] for i in range(0, len(order), 2))
    rounds = [tuple(order[1::2][3 * r : 3 * r + 3]) for r in range(1, 5)]
    assert all(sorted(each) == ["call 0", "call 1", "call 2"] for each in rounds)
    assert len(set(rounds)) > 1
    with pytest.raises(ZeroDivisionError):
        measure([lambda: 1 / 0], repeats=2)
    assert torch.get_num_threads() == threads


def test_copies_fit_latency_and_bandwidth() -> None:
    rows = [{"way": "w", "bytes": b, "seconds": 1e-5 + b / 2e9} for b in (1 << 20, 1 << 22, 1 << 24)]
    fit = fit_copies(rows)["w"]
    assert fit["latency_s"] == pytest.approx(1e-5)
    assert fit["bandwidth_Bps"] == pytest.approx(2e9)
    assert fit["median_ape"] < 1e-9
    with pytest.raises(ValidationError, match="no bandwidth can be read off"):
        fit_copies([{"way": "w", "bytes": b, "seconds": 1 / b} for b in (1, 2)])


def test_this_machine_has_ceilings() -> None:
    rows = measure_copies("cpu", sizes_B=(1 << 18, 1 << 20), repeats=3)
    assert {row["way"] for row in rows} == {"inside-device", "host-to-device pageable", "device-to-host pageable"}
    assert 0 < measure_launch("cpu") < 0.1
    overlap = measure_overlap("cpu", "fp32", size_B=1 << 20, repeats=2)
    assert 0 <= overlap["hidden"] <= 1
    assert overlap["gemm_slowdown"] > 0


def test_flushed_and_warm_calibrations_fit_what_they_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table says whether caches were written over before every call, and predictions of its rows go by that."""
    wanted: dict[str, Any] = {"experts": 2, "top_k": 1, "most_tokens": 256, "loads": 14, "repeats": 2, "flush": True}
    monkeypatch.setattr(calibrate_room, "flush_size", lambda device: 1 << 16)
    found = calibrate("cpu", [(32, 16)], **wanted)
    assert found.table["cold"].all()
    assert found.to_dict()["flush_B"] == 1 << 16
    cold, warm = (predict_kernel(found.table.assign(cold=flag), found.peak, found.fit.kernel)[0] for flag in (True, False))
    assert (warm < cold).all()  # what the cache still holds need not be read
    assert kernel_of(json.loads(json.dumps(kernel_dict(found.fit.kernel)))) == type(found.fit.kernel)(
        **{**{name: getattr(found.fit.kernel, name) for name in found.fit.kernel.__dataclass_fields__}, "valid": {}}
    )


def test_a_calibration_becomes_profiles_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_room, "measure_copies", lambda device: measure_copies(device, sizes_B=(1 << 18, 1 << 20)))
    found = calibrate("cpu", [(32, 32), (64, 32)], experts=4, top_k=2, most_tokens=256, loads=8, repeats=2, links=True)
    (tmp_path / "mine.toml").write_text(profile_text(found, name="mine"))
    (tmp_path / "mine-cluster.toml").write_text(cluster_text(found, name="mine-cluster", device_file="mine.toml"))
    device = load_device(tmp_path / "mine.toml")
    assert device.flops["fp32"] == pytest.approx(found.peak.flops, rel=1e-3)
    assert device.kernels[0].residuals["n"] == 16
    assert all(fact.confidence in ("measured", "fitted") for fact in device.facts)
    cluster = load_cluster(tmp_path / "mine-cluster.toml")
    path = host_path(cluster, 0)
    fit = found.copy_fits["host-to-device pageable"]
    assert not path.notes  # measured: nothing is assumed about what copies reach
    assert path.bandwidth_Bps <= fit["bandwidth_Bps"] * 1.01
    cost = CostModel.of(cluster, tiny_model(hidden=32, intermediate=32), dtype="fp32")
    assert not any("no fitted" in note for note in cost.notes)
    document = found.to_dict()
    assert document["hardware"]["torch"] == torch.__version__ == hardware("cpu")["torch"]
    assert len(document["samples_s"]) == len(document["table"]) == 16
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    np.testing.assert_allclose([np.quantile(row, 0.25) * 1e3 for row in document["samples_s"]], [row["latency_ms"] for row in document["table"]])


class FakeCuda:
    """torch.cuda as far as captures go; `refuses` are calls that wait for the host."""

    class CUDAGraph:
        open = 0

        def capture_begin(self, pool: Any) -> None:
            FakeCuda.CUDAGraph.open += 1
            self.replay = lambda: None

        def capture_end(self) -> None:
            FakeCuda.CUDAGraph.open -= 1

    def __getattr__(self, name: str) -> Any:
        return {"stream": contextlib.nullcontext}.get(name, lambda *_: None)


def test_captures_end_in_order_and_stop_after_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.torch, "cuda", FakeCuda())
    count, done = Graphs(), []

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    capture = timing._Capture("cuda", count)
    first = capture(lambda: done.append(1))
    assert first is not None
    assert done == [1]
    assert capture(waits) is waits
    second = capture(second_call := lambda: done.append(2))
    assert second is second_call
    assert (count.captured, count.eager, FakeCuda.CUDAGraph.open) == (1, 2, 0)
