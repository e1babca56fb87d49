"""Calibrates a live device: measures its ceilings and its expert GEMMs over shapes and loads, fits the cost model."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from moesim.calibrate.kernel_tables import check_table
from moesim.calibrate.kernels import KernelFit, fit_kernel
from moesim.cost.experts import PARAMETERS, TILING, ComputePeak, ExpertKernel, Style
from moesim.validate.backends import Backend, pick_backend
from moesim.validate.ceilings import fit_copies, measure_copies, measure_launch, measure_overlap, measure_peak
from moesim.validate.kept import Kept
from moesim.validate.layer import moe_layer
from moesim.validate.machine import check_device, check_free, clocks, hardware, on_device
from moesim.validate.timing import HOW, Call, Graphs, Progress, flush_size, measure, typical
from moesim.validate.weights import ACTIVATIONS, DTYPES, ExpertWeights

PEAK = ("flops", "memory_Bps", "cache_B", "units")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured on a live device and what was fitted to it.

    copies      rows of `ceilings.measure_copies`, copy_fits what was fitted to them; empty unless `links` was asked for
    overlap     `ceilings.measure_overlap`
    graphs      calls {captured, eager} of CUDA graphs (`timing.Graphs`)
    samples_s   every repeat of every row of `table`
    """

    device: str
    backend: Backend
    dtype: str
    peak: ComputePeak
    fit: KernelFit
    table: pd.DataFrame
    hardware: dict[str, Any]
    date: str
    seconds: float
    flush_B: int = 0
    launch_s: float = 0.0
    copies: Sequence[Mapping[str, Any]] = ()
    copy_fits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    overlap: Mapping[str, float] = field(default_factory=dict)
    samples_s: Sequence[Sequence[float]] = ()
    clocks: Sequence[Mapping[str, Any]] = ()
    graphs: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the raw table included."""
        shapes = self.table.drop_duplicates(["hidden_size", "inter_size"])
        return {
            "device": self.device,
            "backend": self.backend,
            "dtype": self.dtype,
            "date": self.date,
            "seconds": self.seconds,
            "timing": HOW[self.device.split(":")[0]],
            "flush_B": self.flush_B,
            "hardware": self.hardware,
            "clocks": [dict(each) for each in self.clocks],
            "peak": {name: getattr(self.peak, name) for name in PEAK},
            "launch_s": self.launch_s,
            "copies": [dict(row) for row in self.copies],
            "copy_fits": {way: dict(fit) for way, fit in self.copy_fits.items()},
            "overlap": dict(self.overlap),
            "kernel": kernel_dict(self.fit.kernel),
            **{name: float(value) for name, value in self.fit.residuals.items()},
            "measured_on": f"{len(self.table)} random loads over {len(shapes)} expert shapes",
            "table": self.table.to_dict("records"),
            "samples_s": [list(row) for row in self.samples_s],
            "graphs": dict(self.graphs),
            "notes": list(self.notes),
        }


def kernel_dict(kernel: ExpertKernel) -> dict[str, Any]:
    """Parameters of a kernel, JSON-ready."""
    return {
        "name": kernel.name,
        "style": kernel.style,
        "dtype": kernel.dtype,
        **{name: getattr(kernel, name) for name in PARAMETERS},
        **{name: list(value) if isinstance(value, tuple) else value for name in TILING for value in [getattr(kernel, name)]},
    }


def kernel_of(data: Mapping[str, Any]) -> ExpertKernel:
    """Inverse of `kernel_dict`."""
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    return ExpertKernel(**given)


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
    flush: bool | None = None,
    links: bool = False,
    seed: int = 1,
    keep: Path | None = None,
    progress: Progress = lambda share, what: None,
) -> Calibration:
    """Measure expert layers of the given (hidden, intermediate) shapes under random loads, and fit a kernel.

    Each load gives `experts` resident experts between 1 and `most_tokens` selections in all, from balanced to very
    skewed (Dirichlet draws), some experts empty. A time is that of interleaved repeats (`timing.typical`). `top_k` only tells the
    layer's tokens from its selections. `flush` writes over the caches before every call (default: on a GPU, where layers
    run in between); `links` measures copies, launches and their overlap with GEMMs, too. Finished steps are kept in the
    file `keep`, if given, and are not measured again. Raises ValidationError when the device cannot be used or is busy.
    """
    begin = time.perf_counter()
    check_device(device)
    check_free(device)
    cold = device.startswith("cuda") if flush is None else flush
    used, notes = pick_backend(backend, device=device, dtype=DTYPES[dtype], gated=gated)
    settings = {
        "what": "calibration", "device": device, "hardware": hardware(device), "backend": used, "dtype": dtype, "gated": gated, "experts": experts,
        "top_k": top_k, "most_tokens": most_tokens, "loads": loads, "repeats": repeats, "cold": cold, "links": links, "seed": seed,
        "graphs": "counted",
    }  # fmt: skip
    kept = Kept(keep, settings)
    seen = [clocks(device)]
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    graphs = Graphs()
    with on_device(device, "calibration"):
        progress(0.0, "ceilings")
        peak = ComputePeak(**kept.step("peak", lambda: _values(measure_peak(device, dtype))))
        launch_s, copies, overlap = kept.step("links", lambda: _links(device, dtype)) if links else (0.0, [], {})
        for index, (hidden, intermediate) in enumerate(shapes):
            drawn = [_draw(rng, experts, top_k, most_tokens) for _ in range(loads)]
            share = partial(_part, progress, index, len(shapes), f"experts {hidden}x{intermediate}")
            step = partial(
                _measure_shape, drawn, hidden, intermediate, device=device, backend=used, dtype=dtype, gated=gated,
                repeats=repeats, flush_B=flush_size(device) if cold else 0, seed=seed, progress=share,
            )  # fmt: skip
            times, captured, eager = kept.step(f"experts {hidden}x{intermediate}", step)
            graphs = Graphs(captured=graphs.captured + captured, eager=graphs.eager + eager)
            for (counts, tokens), seconds in zip(drawn, times, strict=True):
                rows.append(
                    {
                        "kernel_source": used,
                        "moe_dtype": dtype,
                        "num_tokens": tokens,
                        "hidden_size": hidden,
                        "inter_size": intermediate,
                        "topk": min(top_k, experts),
                        "num_experts": experts,
                        "distribution": "counts",
                        "counts": " ".join(map(str, counts.tolist())),
                        "gated": gated,
                        "cold": cold,
                        "latency_ms": float(typical(seconds, device)) * 1e3,
                        "cv": float(np.std(seconds) / np.mean(seconds)),
                        "samples_s": seconds,
                    }
                )
    samples = [row.pop("samples_s") for row in rows]
    table = check_table(pd.DataFrame(rows), place=f"measurements on {device}")
    return Calibration(
        device=device,
        backend=used,
        dtype=dtype,
        peak=peak,
        fit=fit_best(table, peak, templates(used, dtype, device)),
        table=table,
        hardware=hardware(device),
        date=datetime.date.today().isoformat(),
        seconds=time.perf_counter() - begin,
        flush_B=flush_size(device) if cold else 0,
        launch_s=launch_s,
        copies=copies,
        copy_fits=fit_copies(copies),
        overlap=overlap,
        samples_s=samples,
        clocks=[*seen, clocks(device)],
        graphs=asdict(graphs),
        notes=(*notes, *graphs.note("calibration")),
    )


def templates(backend: Backend, dtype: str, device: str) -> list[ExpertKernel]:
    """Kernels to start a fit from: the tile rules the back-end may follow. A CPU's GEMM has small blocks of rows, or none to see."""
    style: Style = "loop" if backend == "loop" else "grouped"
    start: dict[str, Any] = {"name": f"torch-{backend}", "style": style, "dtype": dtype, "launch_s": 3e-5, "partial_tile": 0.0, "reread": 0.0}
    if device == "cpu":  # one token is a product with a vector; for more, MKL and oneDNN copy the weights into blocks first
        rules: list[dict[str, Any]] = [{"tile_rows": (1,), "repack": 1.0}, {"tile_rows": (8,), "repack": 1.0}]
    elif backend == "triton":  # its own rule: `tiles.tile_rows`
        rules = [{"tile_rows": (16, 32, 64, 128), "by_selections_per_expert": (16, 32, 64)}]
    else:
        rules = [{"tile_rows": (64,)}, {"tile_rows": (128,)}, {"tile_rows": (64,), "reread": 0.3}, {"tile_rows": (128,), "reread": 0.3}]
    return [ExpertKernel(**(start | rule)) for rule in rules]


def fit_best(table: pd.DataFrame, peak: ComputePeak, starts: Sequence[ExpertKernel]) -> KernelFit:
    """The fit of least mean error, each from one of the given kernels."""
    fits = [fit_kernel(table, peak, template=template) for template in starts]
    return min(fits, key=lambda fit: fit.residuals["mape"])


def _values(peak: ComputePeak) -> dict[str, Any]:
    return {name: getattr(peak, name) for name in PEAK}


def _links(device: str, dtype: str) -> list[Any]:
    return [measure_launch(device), measure_copies(device), measure_overlap(device, dtype)]


def _part(progress: Progress, index: int, parts: int, what: str, share: float, _: str) -> None:
    progress((index + share) / parts, what)


def _draw(rng: np.random.Generator, experts: int, top_k: int, most: int) -> tuple[Any, int]:
    """Selections of each expert, and the tokens that made them."""
    selections = round(float(np.exp(rng.uniform(np.log(top_k), np.log(most)))))
    tokens = -(-selections // top_k)
    return rng.multinomial(tokens * top_k, rng.dirichlet(np.full(experts, np.exp(rng.uniform(-1.5, 3))))), tokens


def _measure_shape(
    drawn: Sequence[tuple[Any, int]], hidden: int, intermediate: int, *, device: str, backend: Backend, dtype: str, gated: bool,
    repeats: int, flush_B: int, seed: int, progress: Progress,
) -> list[Any]:  # fmt: skip
    """[seconds of every repeat of every load of one expert shape, calls captured in CUDA graphs, calls not], JSON-ready."""
    experts = len(drawn[0][0])
    source = ExpertWeights.random(
        experts=experts, hidden=hidden, intermediate=intermediate, gated=gated, dtype=DTYPES[dtype], device=device, seed=seed
    )
    resident = source.like(experts)

    def fill() -> None:  # as a rank's experts are put in place before it is executed, so that caches have seen the same
        for expert in range(experts):
            resident.put(expert, source, expert, non_blocking=True)

    calls = [partial(_call(counts, tokens, hidden, resident, device, ACTIVATIONS[dtype]), backend) for counts, tokens in drawn]
    graphs = Graphs()
    found: list[list[float]] = measure(
        calls, repeats=repeats, seed=seed, device=device, flush_B=flush_B, before=[fill] * len(calls),
        awake=awakener(device, backend, dtype, gated), graphs=graphs, progress=progress,
    ).tolist()  # fmt: skip
    return [found, graphs.captured, graphs.eager]


def awakener(device: str, backend: Backend, dtype: str, gated: bool) -> Call | None:
    """A tiny layer that brings a processor's code back into its caches after a flush; None on a GPU, where a graph needs none."""
    if device.startswith("cuda"):
        return None
    weights = ExpertWeights.random(experts=2, hidden=64, intermediate=64, gated=gated, dtype=DTYPES[dtype], device=device)
    return partial(_call(np.array([1, 16]), 17, 64, weights, device, ACTIVATIONS[dtype]), backend)


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
