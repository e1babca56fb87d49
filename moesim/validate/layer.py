"""The real MoE layer: permute tokens to experts, two GEMMs per expert, weighted combine. Runs on CPU and CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from moesim.errors import ValidationError

Backend = Literal["loop", "grouped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertWeights:
    """Weights of the resident experts of one layer: `up` [E, N, H] (N = 2F gated, F plain), `down` [E, H, F]."""

    up: Tensor
    down: Tensor
    gated: bool

    def __post_init__(self) -> None:
        experts, wide, hidden = self.up.shape
        width = wide // 2 if self.gated else wide
        if tuple(self.down.shape) != (experts, hidden, width):
            raise ValidationError(
                f"down weights {tuple(self.down.shape)} do not fit up weights {tuple(self.up.shape)}; expected {(experts, hidden, width)}"
            )

    @classmethod
    def random(
        cls,
        *,
        experts: int,
        hidden: int,
        intermediate: int,
        gated: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> ExpertWeights:
        """Normal weights scaled to keep activations near one, at distinct addresses."""
        source = torch.Generator(device=device).manual_seed(seed)

        def draw(rows: int, columns: int) -> Tensor:
            normal: Tensor = torch.randn(experts, rows, columns, generator=source, device=device)
            return torch.div(normal, columns**0.5).to(dtype)

        return cls(up=draw((2 if gated else 1) * intermediate, hidden), down=draw(hidden, intermediate), gated=gated)

    def take(self, experts: list[int]) -> ExpertWeights:
        """The weights of some experts, copied: what one rank holds."""
        chosen = torch.as_tensor(experts, device=self.up.device)
        return ExpertWeights(up=self.up[chosen].clone(), down=self.down[chosen].clone(), gated=self.gated)


def moe_layer(hidden_TH: Tensor, slots_N: Tensor, tokens_N: Tensor, gates_N: Tensor, weights: ExpertWeights, *, backend: Backend = "loop") -> Tensor:
    """Sum over N selections of gate x expert(token): [T, H], zero for tokens nobody selected.

    slots_N int64   index of the chosen expert in `weights`, tokens_N int64 row of hidden_TH, gates_N its weight.
    A device that holds some of the experts is given the selections of those only; the sum of all devices' outputs is the
    layer's. Raises ValidationError for a back-end that this build of torch cannot run.
    """
    experts = weights.up.shape[0]
    order = torch.argsort(slots_N, stable=True)
    rows = tokens_N[order]
    counts = torch.bincount(slots_N, minlength=experts)
    gathered = hidden_TH[rows]
    found = _loop(gathered, counts, weights) if backend == "loop" else _grouped(gathered, counts, weights)
    return torch.zeros_like(hidden_TH).index_add_(0, rows, found * gates_N[order, None].to(found.dtype))


def _activate(up: Tensor, gated: bool) -> Tensor:
    if not gated:
        return functional.relu(up).square()
    gate, value = up.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _loop(rows_NH: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    """One pair of GEMMs per active expert."""
    pieces = []
    for expert, rows in enumerate(torch.split(rows_NH, counts_E.tolist())):
        if len(rows):
            pieces.append(_activate(rows @ weights.up[expert].T, weights.gated) @ weights.down[expert].T)
    return torch.cat(pieces) if pieces else rows_NH.new_zeros(0, weights.down.shape[1])


def _grouped(rows_NH: Tensor, counts_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Both products of all experts in one call each (torch.nn.functional.grouped_mm, torch >= 2.10)."""
    if not hasattr(functional, "grouped_mm"):
        raise ValidationError(f"torch {torch.__version__} has no grouped_mm; use the loop back-end or torch >= 2.10")
    if not len(rows_NH):
        return rows_NH.new_zeros(0, weights.down.shape[1])
    ends = counts_E.cumsum(0).to(torch.int32)
    try:
        up = functional.grouped_mm(rows_NH, weights.up.transpose(1, 2), offs=ends)
        return functional.grouped_mm(_activate(up, weights.gated), weights.down.transpose(1, 2), offs=ends)
    except RuntimeError as problem:
        raise ValidationError(f"grouped_mm refused rows {tuple(rows_NH.shape)} of {rows_NH.dtype}: {problem}; use the loop back-end") from problem
