"""The device under test: is it there, is it free, what is it, how fast were its clocks, and is it left clean."""

from __future__ import annotations

import csv
import gc
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from moesim.errors import InputError, ValidationError

BUSY_PERCENT = 10.0  # utilisation by others above which a GPU is not measured
_QUERY = {
    "sm_clock_MHz": "clocks.sm",
    "memory_clock_MHz": "clocks.mem",
    "temperature_C": "temperature.gpu",
    "power_W": "power.draw",
    "busy_percent": "utilization.gpu",
}
_THROTTLED = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # its name, and before driver 535


def check_device(device: str) -> None:
    """Raise InputError for an unknown device, ValidationError when the device is not here."""
    if device != "cpu" and not device.startswith("cuda"):
        raise InputError(f"device {device!r} is unknown; use cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValidationError("device 'cuda': torch sees no GPU here; use --device cpu, or run where nvidia-smi lists one")


def check_free(device: str) -> None:
    """Raise ValidationError while other work keeps a GPU busy: its times would be theirs. A CPU is timed by processor time.

    Asked before this process first uses the GPU; afterwards its own work would be seen.
    """
    if not device.startswith("cuda") or torch.cuda.max_memory_allocated(device):
        return
    busy = clocks(device).get("busy_percent")
    if isinstance(busy, float) and busy > BUSY_PERCENT:
        raise ValidationError(f"{device} is {busy:.0f}% busy with other work (limit {BUSY_PERCENT:.0f}%); wait, or choose another device")


def clocks(device: str) -> dict[str, Any]:
    """Clocks, temperature and load now; {"note": why} where the machine does not tell. Never raises."""
    if not device.startswith("cuda"):
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            speeds = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
        except (OSError, ValueError):
            speeds = []
        found: dict[str, Any] = {"load_1min": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
        return found | ({"cpu_clock_MHz": sum(speeds) / len(speeds)} if speeds else {"note": "this system does not tell its clock"})
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"note": "nvidia-smi is not installed: clocks and other users are unknown"}
    index, failed = torch.device(device).index or 0, ""
    for extra in (*_THROTTLED, None):
        names = {**_QUERY, **({"throttled": extra} if extra else {})}
        command = [tool, f"--id={index}", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except subprocess.CalledProcessError as problem:  # a driver refuses the whole query for one name it does not know
            failed = str(problem)
        except (OSError, subprocess.SubprocessError) as problem:
            return {"note": f"nvidia-smi failed: {problem}"}
        else:
            values = [value.strip() for value in next(csv.reader(text.splitlines()), [])]
            return {name: _number(value) for name, value in zip(names, values, strict=False)}
    return {"note": f"nvidia-smi failed: {failed}"}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def hardware(device: str) -> dict[str, Any]:
    """What this machine is, for the record."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["cpu"] = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found["cpu"] = platform.processor() or "unknown"
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def cache_B(device: str) -> float:
    """Bytes of the last-level cache."""
    if device.startswith("cuda"):
        return float(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 50e6)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(float(text[:-1]) * {"K": 1024, "M": 1024**2}.get(text[-1], 1))
    return max(sizes, default=32e6)


@contextmanager
def on_device(device: str, what: str) -> Iterator[None]:
    """Work on a device, which is the current one meanwhile: its failures become ValidationErrors that say what to do, and its
    memory is given back after.

    Raises ValidationError for a full device, a kernel that is missing or a device that vanished.
    """
    here = torch.cuda.device(device) if device.startswith("cuda") and torch.cuda.is_available() else nullcontext()
    try:
        with here:
            yield
    except torch.OutOfMemoryError as problem:
        line = str(problem).splitlines()[0]
        raise ValidationError(f"{what}: {device} has too little memory: {line}; use fewer tokens, slots or layers") from None
    except RuntimeError as problem:
        line = str(problem).splitlines()[0]
        if any(word in str(problem) for word in ("CUDA", "cuda", "NCCL", "device-side", "kernel image", "HIP")):
            raise ValidationError(f"{what}: {device} failed: {line}; check it with nvidia-smi and run again") from problem
        raise
    finally:
        if device.startswith("cuda") and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
