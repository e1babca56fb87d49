"""Weights of a layer's experts, in fp32, bf16, fp16 or fp8 with a scale per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesim.errors import ValidationError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
# What tokens are held in beside weights of each dtype: fp8 is a format of weights.
ACTIVATIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# Largest relative deviation between two orders of the same sums that rounding explains, at sizes of real layers.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertWeights:
    """Weights of the resident experts of one layer: `up` [E, N, H] (N = 2F gated, F plain), `down` [E, H, F].

    fp8 weights carry one fp32 scale per output row: up_scale [E, N], down_scale [E, H].
    """

    up: Tensor
    down: Tensor
    gated: bool
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    def __post_init__(self) -> None:
        experts, wide, hidden = self.up.shape
        width = wide // 2 if self.gated else wide
        if tuple(self.down.shape) != (experts, hidden, width):
            raise ValidationError(
                f"down weights {tuple(self.down.shape)} do not fit up weights {tuple(self.up.shape)}; expected {(experts, hidden, width)}"
            )
        if (self.up.dtype == DTYPES["fp8"]) != (self.up_scale is not None) or (self.up_scale is None) != (self.down_scale is None):
            raise ValidationError(f"{self.up.dtype} weights: fp8 ones need both scales, others none; make them with ExpertWeights.random or .to")

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
        drawn = torch.bfloat16 if dtype == DTYPES["fp8"] else dtype

        def draw(rows: int, columns: int) -> Tensor:
            found = torch.empty(experts, rows, columns, dtype=drawn, device=device)
            for expert in range(experts):  # one expert in fp32 at a time: a layer of a large model would not fit twice
                found[expert] = torch.randn(rows, columns, generator=source, device=device) / columns**0.5
            return found

        return cls(up=draw((2 if gated else 1) * intermediate, hidden), down=draw(hidden, intermediate), gated=gated).to(dtype)

    @property
    def expert_B(self) -> int:
        """Bytes of one expert, scales included."""
        return sum(part[0].nbytes for part in self.parts)

    @property
    def activations(self) -> torch.dtype:
        """What tokens are held in beside these weights: their own dtype, but fp8 is a format of weights."""
        return torch.bfloat16 if self.up.dtype == DTYPES["fp8"] else self.up.dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, experts first."""
        return tuple(part for part in (self.up, self.down, self.up_scale, self.down_scale) if part is not None)

    def like(self, experts: int, *, device: str | torch.device | None = None, pinned: bool = False) -> ExpertWeights:
        """Room for `experts` experts of the same kind; its contents are undefined. `pinned` memory is the host's, for fast copies."""

        place = "cpu" if pinned else device or self.up.device

        def room(part: Tensor) -> Tensor:
            return torch.empty((experts, *part.shape[1:]), dtype=part.dtype, device=place, pin_memory=pinned)

        scales = [None if scale is None else room(scale) for scale in (self.up_scale, self.down_scale)]
        return ExpertWeights(up=room(self.up), down=room(self.down), gated=self.gated, up_scale=scales[0], down_scale=scales[1])

    def put(self, slot: int, source: ExpertWeights, expert: int, *, non_blocking: bool = False) -> None:
        """Copy one expert of `source` into a slot."""
        for mine, theirs in zip(self.parts, source.parts, strict=True):
            mine[slot].copy_(theirs[expert], non_blocking=non_blocking)

    def first(self, experts: int) -> ExpertWeights:
        """The first experts, not copied."""
        scales = [None if scale is None else scale[:experts] for scale in (self.up_scale, self.down_scale)]
        return ExpertWeights(up=self.up[:experts], down=self.down[:experts], gated=self.gated, up_scale=scales[0], down_scale=scales[1])

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights in another dtype; fp8 is scaled row by row to its largest value."""
        if dtype == self.up.dtype:
            return self
        if self.up_scale is not None or dtype != DTYPES["fp8"]:
            pairs = [self.expert(e, dtype) for e in range(len(self.up))]
            return ExpertWeights(up=torch.stack([up for up, _ in pairs]), down=torch.stack([down for _, down in pairs]), gated=self.gated)
        (up, up_scale), (down, down_scale) = to_fp8(self.up), to_fp8(self.down)
        return ExpertWeights(up=up, down=down, gated=self.gated, up_scale=up_scale, down_scale=down_scale)

    def expert(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`up` [N, H] and `down` [H, F] of one expert in `dtype`, fp8 widened."""
        up, down = self.up[expert].to(dtype), self.down[expert].to(dtype)
        if self.up_scale is not None and self.down_scale is not None:
            up, down = up * self.up_scale[expert, :, None].to(dtype), down * self.down_scale[expert, :, None].to(dtype)
        return up, down

    def take(self, experts: Sequence[int]) -> ExpertWeights:
        """The weights of some experts, copied: what one rank holds."""
        found = self.like(len(experts))
        for slot, expert in enumerate(experts):
            found.put(slot, self, expert)
        return found


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values as fp8 (e4m3) and the fp32 scale of each last-axis row: values = fp8 x scale."""
    kind = DTYPES["fp8"]
    scale = values.float().abs().amax(dim=-1).clamp_min(1e-12) / torch.finfo(kind).max
    return (values.float() / scale[..., None]).to(kind), scale


def pinned(weights: ExpertWeights) -> ExpertWeights:
    """The same weights in pinned host memory: these, if they are."""
    if weights.up.is_pinned():
        return weights
    found = weights.like(len(weights.up), pinned=True)
    for expert in range(len(weights.up)):
        found.put(expert, weights, expert)
    return found
