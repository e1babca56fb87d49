"""What a device can do at best: GEMM and copy ceilings, the cost of a launch, host copies by size, copies beside GEMMs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from moesim.cost.experts import ComputePeak
from moesim.errors import ValidationError
from moesim.validate.machine import cache_B, check_device
from moesim.validate.streams import Side
from moesim.validate.timing import cuda_seconds, flush_size, measure, one_thread
from moesim.validate.weights import ACTIVATIONS

COPY_SIZES_B = tuple(m * 2**20 for m in (1, 4, 16, 64))
_LAUNCHES = 200


def measure_peak(device: str, dtype: str, *, repeats: int = 5) -> ComputePeak:
    """Ceilings of the device: one large GEMM, one large copy. Cache and units come from the system.

    A CPU is one core with half the last-level cache: slots are filled by copying, which leaves source and slot in it.
    """
    check_device(device)
    kind, cuda = ACTIVATIONS[dtype], device.startswith("cuda")
    side = 8192 if cuda else 768
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    block = torch.empty((1 << 30 if cuda else 1 << 27) // 4, dtype=torch.float32, device=device).fill_(1.0)
    other = torch.empty_like(block)
    gemm, copy = measure([partial(torch.mm, a, b), partial(other.copy_, block)], repeats=repeats, device=device).min(axis=1)
    units = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    return ComputePeak(
        flops=float(2 * side**3 / gemm), memory_Bps=float(2 * block.nbytes / copy), cache_B=cache_B(device) / (1 if cuda else 2), units=units
    )


def measure_launch(device: str) -> float:
    """Seconds from one tiny kernel to the next when the host launches them one by one."""
    one = torch.ones(1, device=device)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            one.add_(1.0)

    return min(_one_by_one_s(launches, device) for _ in range(5)) / _LAUNCHES


def measure_copies(device: str, *, sizes_B: Sequence[int] = COPY_SIZES_B, repeats: int = 9) -> list[dict[str, Any]]:
    """Rows {way, bytes, seconds, cv}: host to device and back, from pinned and from pageable memory, and device to device.

    On a CPU "host" and "device" are two blocks of its memory that no cache holds, and nothing is pinned. Between devices: the second GPU where
    there is one, else inside the one device (`inside-device`), a bound that no link reaches.
    """
    cuda = device.startswith("cuda")
    peer = next((f"cuda:{i}" for i in range(torch.cuda.device_count()) if torch.device(f"cuda:{i}") != torch.device(device)), None) if cuda else None
    rows = []
    scratch = torch.empty(0 if cuda else flush_size(device) // 4)
    for size in sizes_B:
        there, away = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=peer or device)
        hosts = {"pageable": torch.ones(size, dtype=torch.uint8)}
        if cuda:
            hosts["pinned"] = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        ways: dict[str, Callable[[], object]] = {"device-to-device" if peer else "inside-device": partial(away.copy_, there, non_blocking=True)}
        for kind, host in hosts.items():
            ways[f"host-to-device {kind}"] = partial(there.copy_, host, non_blocking=kind == "pinned")
            ways[f"device-to-host {kind}"] = partial(host.copy_, there, non_blocking=kind == "pinned")
        for way, copy in ways.items():
            seconds = [_copy_s(copy, device, scratch, queued="pageable" not in way) for _ in range(repeats + 1)][1:]
            rows.append({"way": way, "bytes": size, "seconds": float(np.median(seconds)), "cv": float(np.std(seconds) / np.mean(seconds))})
    return rows


def fit_copies(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{way: latency_s, bandwidth_Bps, median_ape, p90_ape, n} of `latency + bytes/bandwidth`, least squares of relative errors."""
    found = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        size, seconds = (np.array([row[name] for row in rows if row["way"] == way], np.float64) for name in ("bytes", "seconds"))
        from scipy.optimize import nnls

        (latency, per_byte), _ = nnls(np.stack([1 / seconds, size / seconds], axis=1), np.ones(len(size)))
        if per_byte <= 0:
            raise ValidationError(f"copies {way!r} took {seconds.tolist()} s for {size.tolist()} bytes: no bandwidth can be read off; measure again")
        ape = np.abs((latency + size * per_byte) / seconds - 1)
        found[way] = {
            "latency_s": float(latency),
            "bandwidth_Bps": float(1 / per_byte),
            "median_ape": float(np.median(ape)),
            "p90_ape": float(np.quantile(ape, 0.9)),
            "n": float(len(size)),
        }
    return found


def measure_overlap(device: str, dtype: str, *, size_B: int = 64 * 2**20, repeats: int = 5) -> dict[str, float]:
    """A GEMM and a host copy alone and beside each other, wall-clock seconds (medians).

    hidden = (gemm + copy - both) / min(gemm, copy): 1 when the shorter one costs nothing, 0 when they take turns.
    gemm_slowdown = how much longer the GEMM takes beside the copy than alone.
    """
    cuda = device.startswith("cuda")
    side = 8192 if cuda else 1024
    a, b = (torch.randn(side, side, device=device).to(ACTIVATIONS[dtype]) for _ in range(2))
    there, host = torch.empty(size_B, dtype=torch.uint8, device=device), torch.ones(size_B, dtype=torch.uint8, pin_memory=cuda)
    copy, gemm = partial(there.copy_, host, non_blocking=True), partial(torch.mm, a, b)
    samples = []
    for _ in range(repeats + 1):
        alone = _wall_s(gemm, device), _wall_s(copy, device)
        _wait(device)
        begin = time.perf_counter()
        with Side(device) as beside:
            ticket = beside.submit(copy)
            gemm()
            if cuda:
                torch.cuda.current_stream().synchronize()
            gemm_s = time.perf_counter() - begin
            beside.wait(ticket)
        samples.append((*alone, time.perf_counter() - begin, gemm_s))
    gemm_s, copy_s, both_s, beside_s = np.median(samples[1:], axis=0)
    return {
        "gemm_s": float(gemm_s),
        "copy_s": float(copy_s),
        "both_s": float(both_s),
        "hidden": float(np.clip((gemm_s + copy_s - both_s) / min(gemm_s, copy_s), 0, 1)),
        "gemm_slowdown": float(beside_s / gemm_s),
    }


def _copy_s(copy: Callable[[], object], device: str, scratch: torch.Tensor, *, queued: bool) -> float:
    """Seconds of one copy: on CUDA between events where the host only queues it, wall clock where it takes part."""
    scratch.add_(1.0)
    return cuda_seconds(copy) if queued and device.startswith("cuda") else _one_by_one_s(copy, device)


def _one_by_one_s(call: Callable[[], object], device: str) -> float:
    """Seconds of one call: wall clock on CUDA, processor time of one thread on a CPU, which other programs do not inflate."""
    if device.startswith("cuda"):
        return _wall_s(call, device)
    with one_thread(device):
        begin = time.thread_time()
        call()
        return time.thread_time() - begin


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _wall_s(call: Callable[[], object], device: str) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - begin
