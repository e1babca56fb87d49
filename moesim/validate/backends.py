"""How the experts' two GEMMs are executed: one pair per expert, torch's grouped_mm, or an own Triton kernel.

loop     `torch.mm` per expert with tokens: reference, everywhere; fp8 weights are widened
grouped  `torch.nn.functional.grouped_mm` (torch >= 2.9): both products of all experts in one call each, no host sync
triton   own grouped GEMM that gathers its rows itself (`moesim.validate.triton_kernel`), on CUDA

grouped_mm wants int32 ends, strides and addresses of whole 16 bytes, and leaves rows past the last end undefined.
`pick_backend` tries the wanted one on a small layer first: what cannot run or is wrong is replaced by `loop`, and said.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from moesim.errors import InputError, ValidationError
from moesim.validate.weights import DTYPES, ExpertWeights, to_fp8

Backend = Literal["loop", "grouped", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# Largest deviation from float64, relative to the largest output; fp8 rounds activations too where it multiplies in fp8.
_PROBE_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, DTYPES["fp8"]: 0.15}


def expert_rows(hidden_TH: Tensor, rows_N: Tensor, counts_E: Tensor, weights: ExpertWeights, backend: Backend) -> Tensor:
    """[N, H] outputs of the experts for rows_N (indices into hidden_TH, sorted by expert; counts_E rows each), not weighted.

    Raises InputError for an unknown back-end, ValidationError for one that this machine or torch cannot run.
    """
    if backend not in BACKENDS:
        raise InputError(f"back-end {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if not len(rows_N):
        return hidden_TH.new_zeros(0, weights.down.shape[1])
    if backend == "triton":
        return _triton(hidden_TH, rows_N, counts_E, weights)
    gathered = hidden_TH[rows_N]
    return _loop(gathered, counts_E, weights) if backend == "loop" else _grouped(gathered, counts_E, weights)


def activate(up: Tensor, gated: bool) -> Tensor:
    """SwiGLU of [gate, value] halves, or squared ReLU for plain experts."""
    if not gated:
        return functional.relu(up).square()
    gate, value = up.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _loop(rows_NH: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    """One pair of GEMMs per active expert."""
    pieces = []
    for expert, rows in enumerate(torch.split(rows_NH, counts_E.tolist())):
        if len(rows):
            up, down = weights.expert(expert, rows.dtype)
            pieces.append(activate(rows @ up.T, weights.gated) @ down.T)
    return torch.cat(pieces)


def _grouped(rows_NH: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Both products of all experts in one call each."""
    product = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)  # its name before torch 2.10
    if product is None:
        raise ValidationError(f"torch {torch.__version__} has no grouped_mm; use the loop back-end or torch >= 2.10")
    ends = counts_E.cumsum(0).to(torch.int32)
    try:
        if weights.up_scale is not None and weights.down_scale is not None:
            up = _scaled(rows_NH, weights.up, weights.up_scale, ends)
            return _scaled(activate(up, weights.gated), weights.down, weights.down_scale, ends)
        up = product(rows_NH, weights.up.transpose(1, 2), offs=ends)
        return torch.as_tensor(product(activate(up, weights.gated), weights.down.transpose(1, 2), offs=ends))
    except (RuntimeError, ValueError, NotImplementedError) as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        raise ValidationError(f"grouped_mm refused rows {tuple(rows_NH.shape)} of {rows_NH.dtype}: {problem}; use the loop back-end") from problem


def _scaled(rows_NH: Tensor, weight_EOH: Tensor, scale_EO: Tensor, ends_E: Tensor) -> Tensor:
    """fp8 x fp8 with a scale for each row of tokens and of weights (torch._scaled_grouped_mm, SM 90 and newer)."""
    rows, scale_N = to_fp8(rows_NH)
    return torch._scaled_grouped_mm(rows, weight_EOH.transpose(1, 2), scale_N, scale_EO, offs=ends_E, out_dtype=rows_NH.dtype)


def _triton(hidden_TH: Tensor, rows_N: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    if weights.up_scale is not None:
        raise ValidationError("the triton back-end has no fp8 weights; use loop or grouped")
    if not (hidden_TH.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValidationError("the triton back-end runs on CUDA, or anywhere with TRITON_INTERPRET=1; use loop or grouped")
    try:
        from moesim.validate.triton_kernel import grouped_gemm
    except ImportError as problem:
        raise ValidationError(f"triton cannot be imported ({problem}); install it with a CUDA build of torch, or use loop or grouped") from problem
    up = grouped_gemm(hidden_TH, weights.up, counts_E, rows_N)
    return grouped_gemm(activate(up, weights.gated), weights.down, counts_E)


def pick_backend(wanted: Backend, *, device: str, dtype: torch.dtype, gated: bool = True) -> tuple[Backend, tuple[str, ...]]:
    """The back-end to use, and a remark where it is not the wanted one.

    The wanted one computes a small layer with an empty expert and is compared with float64; if it raises or is wrong, `loop`
    is taken. A lack of memory is no such reason and is raised.
    """
    source = torch.Generator().manual_seed(0)
    weights = ExpertWeights.random(experts=4, hidden=64, intermediate=32, gated=gated, dtype=dtype, device=device)
    hidden = torch.randn(24, 64, generator=source).to(device, weights.activations)
    counts = torch.tensor([5, 0, 18, 1], device=device)
    rows = torch.randperm(24, generator=source).to(device)
    with torch.inference_mode():
        truth = _loop(hidden.double()[rows], counts, weights.to(torch.float64))
        try:
            found = expert_rows(hidden, rows, counts, weights, wanted).double()
        except torch.OutOfMemoryError:
            raise
        except (ValidationError, RuntimeError, NotImplementedError) as problem:
            return "loop", (f"back-end {wanted} cannot run here, loop was used: {_first(problem)}",)
    error = float((found - truth).abs().max() / truth.abs().max())
    limit = _PROBE_LIMIT[dtype]
    if not error <= limit:
        return "loop", (f"back-end {wanted} deviates from float64 by {error:.1e} (limit {limit:.0e}) on a small layer, loop was used",)
    return wanted, ()


def _first(problem: Exception) -> str:
    line = str(problem).splitlines()[0]
    return line if len(line) <= 160 else line[:159] + "…"
