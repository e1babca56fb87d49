"""Calibrates a live device: measures its ceilings and its expert GEMMs over shapes and loads, fits the cost model."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from moesim.calibrate.kernel_tables import check_table
from moesim.calibrate.kernels import KernelFit, fit_kernel
from moesim.cost.experts import ComputePeak, ExpertKernel
from moesim.errors import InputError, ValidationError
from moesim.validate.layer import Backend, ExpertWeights, moe_layer
from moesim.validate.ranks import measure

Progress = Callable[[float, str], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on a live device and what was fitted to it."""

    device: str
    backend: Backend
    dtype: str
    peak: ComputePeak
    fit: KernelFit
    table: pd.DataFrame
    hardware: dict[str, Any]
    date: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the raw table included."""
        kernel = self.fit.kernel
        return {
            "device": self.device,
            "backend": self.backend,
            "dtype": self.dtype,
            "date": self.date,
            "seconds": self.seconds,
            "hardware": self.hardware,
            "peak": {name: getattr(self.peak, name) for name in ("flops", "memory_Bps", "cache_B", "units")},
            "kernel": kernel_dict(kernel),
            **{name: float(value) for name, value in self.fit.residuals.items()},
            "measured_on": f"{len(self.table)} random loads over {len(self.table.drop_duplicates(['hidden_size', 'inter_size']))} expert shapes",
            "table": self.table.to_dict("records"),
        }


def kernel_dict(kernel: ExpertKernel) -> dict[str, Any]:
    """Parameters of a kernel, JSON-ready."""
    from moesim.cost.experts import PARAMETERS, TILING

    return {
        "name": kernel.name,
        "style": kernel.style,
        "dtype": kernel.dtype,
        **{name: getattr(kernel, name) for name in PARAMETERS},
        **{name: list(getattr(kernel, name)) for name in TILING if name != "tile_columns"},
    }


def profile_text(found: Calibration, *, name: str, source: str) -> str:
    """Device profile (TOML) of the measured ceilings; the fitted kernel is appended by `calibrate.kernels.profile_fragment`."""
    kind, memory = ("gpu", "hbm") if found.device.startswith("cuda") else ("cpu", "ddr")
    capacity = (
        torch.cuda.get_device_properties(found.device).total_memory if kind == "gpu" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    clean = json.dumps(source)
    return "\n".join(
        [
            f"name = {json.dumps(name)}",
            f"title = {json.dumps(str(found.hardware.get('gpu') or found.hardware['cpu']))}",
            f'kind = "{kind}"',
            "",
            "[compute]",
            f"source = {clean}",
            'confidence = "measured"',
            f"flops = {{ {found.dtype} = {found.peak.flops:.4g} }}",
            f"units = {found.peak.units}",
            f"cache = {found.peak.cache_B:.4g}",
            "",
            "[[memories]]",
            f'name = "{memory}"',
            f"capacity = {capacity:d}",
            f"bandwidth = {found.peak.memory_Bps:.4g}",
            f"source = {clean}",
            'confidence = "measured"',
            "",
        ]
    )


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


def check_device(device: str) -> None:
    """Raise InputError for an unknown device, ValidationError when the device is not here."""
    if device != "cpu" and not device.startswith("cuda"):
        raise InputError(f"device {device!r} is unknown; use cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValidationError("device 'cuda': torch sees no GPU here; use --device cpu, or run where nvidia-smi lists one")


def measure_peak(device: str, dtype: str, *, repeats: int = 5) -> ComputePeak:
    """Ceilings of the device: one large GEMM, one large copy. Cache and units come from the system."""
    check_device(device)
    kind = DTYPES[dtype]
    side = 8192 if device.startswith("cuda") else 768
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    block = torch.empty((1 << 30 if device.startswith("cuda") else 1 << 27) // 4, dtype=torch.float32, device=device).fill_(1.0)
    other = torch.empty_like(block)
    gemm, copy = measure([partial(torch.mm, a, b), partial(other.copy_, block)], repeats=repeats, device=device).min(axis=1)
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        cache, units = float(getattr(properties, "L2_cache_size", 0) or 50e6), properties.multi_processor_count
    else:
        cache, units = _cpu_cache(), 1
    return ComputePeak(flops=float(2 * side**3 / gemm), memory_Bps=float(2 * block.nbytes / copy), cache_B=cache, units=units)


def _cpu_cache() -> float:
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(float(text[:-1]) * {"K": 1024, "M": 1024**2}.get(text[-1], 1))
    return max(sizes, default=32e6)


def calibrate(
    device: str,
    shapes: Sequence[tuple[int, int]],
    *,
    experts: int,
    top_k: int,
    most_tokens: int,
    backend: Backend = "loop",
    dtype: str = "fp32",
    gated: bool = True,
    loads: int = 24,
    repeats: int = 9,
    seed: int = 1,
    progress: Progress = lambda share, what: None,
) -> Calibration:
    """Measure expert layers of the given (hidden, intermediate) shapes under random loads, and fit a kernel.

    Each load gives `experts` resident experts between 1 and `most_tokens` selections in all, from balanced to very
    skewed (Dirichlet draws), some experts empty. A time is the median of interleaved repeats. `top_k` only tells the
    layer's tokens from its selections. Raises ValidationError when the device cannot be used.
    """
    begin = time.perf_counter()
    peak = measure_peak(device, dtype)
    rng = np.random.default_rng(seed)
    measured: list[Callable[[Backend], object]] = []
    rows: list[dict[str, Any]] = []
    for hidden, intermediate in shapes:
        weights = ExpertWeights.random(
            experts=experts, hidden=hidden, intermediate=intermediate, gated=gated, dtype=DTYPES[dtype], device=device, seed=seed
        )
        for _ in range(loads):
            selections = round(float(np.exp(rng.uniform(np.log(top_k), np.log(most_tokens)))))
            tokens = -(-selections // top_k)
            counts = rng.multinomial(tokens * top_k, rng.dirichlet(np.full(experts, np.exp(rng.uniform(-1.5, 3)))))
            measured.append(_call(counts, tokens, hidden, weights, device, DTYPES[dtype]))
            rows.append(
                {
                    "kernel_source": backend,
                    "moe_dtype": dtype,
                    "num_tokens": tokens,
                    "hidden_size": hidden,
                    "inter_size": intermediate,
                    "topk": min(top_k, experts),
                    "num_experts": experts,
                    "distribution": "counts",
                    "counts": " ".join(map(str, counts.tolist())),
                    "gated": gated,
                }
            )
    calls = [partial(call, backend) for call in measured]
    times = measure(calls, repeats=repeats, seed=seed, device=device, progress=progress)
    for row, seconds in zip(rows, times, strict=True):
        row["latency_ms"] = float(np.median(seconds)) * 1e3
        row["cv"] = float(seconds.std() / seconds.mean())
    table = check_table(pd.DataFrame(rows), place=f"measurements on {device}")
    template = ExpertKernel(
        name=f"torch-{backend}", style=backend, dtype=dtype, launch_s=3e-5, tile_rows=(8,) if device == "cpu" else (64,), partial_tile=0.0, reread=0.0
    )
    return Calibration(
        device=device,
        backend=backend,
        dtype=dtype,
        peak=peak,
        fit=fit_kernel(table, peak, template=template),
        table=table,
        hardware=hardware(device),
        date=datetime.date.today().isoformat(),
        seconds=time.perf_counter() - begin,
    )


def _call(counts: Any, tokens: int, hidden: int, weights: ExpertWeights, device: str, dtype: torch.dtype) -> Callable[[Backend], object]:
    total = int(counts.sum())
    order = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    slots = torch.repeat_interleave(torch.arange(len(counts)), torch.as_tensor(counts))[order].to(device)
    rows = torch.arange(total, device=device) % tokens
    gates = torch.full((total,), 0.5, device=device)
    inputs = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def call(backend: Backend) -> object:
        with torch.inference_mode():
            return moe_layer(inputs, slots, rows, gates, weights, backend=backend)

    return call
