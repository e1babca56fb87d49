"""What an expert kernel is: the peaks of a device, and the numbers and facts that turn them into time.

The formula is in `cost.experts`, the fits in `calibrate.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moesim.errors import ProfileError
from moesim.hardware.profile import Fitted

Style = Literal["loop", "grouped", "fused"]

STYLES = ("loop", "grouped", "fused")
# fp8_block carries one fp32 scale per 128x128 weights, int4 one fp16 scale per 128 weights.
WEIGHT_B = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1 + 4 / 128**2,
    "int8": 1.0,
    "int4": 0.5 + 2 / 128,
    "fp4": 0.5 + 1 / 16,
}
VALID_KEYS = ("tokens", "hidden", "intermediate", "experts", "top_k")
_MAY_BE_ZERO = frozenset({"launch_s", "token_s", "tile_overhead", "wave_tail", "partial_tile", "load_stall", "reread", "repack"})
_SHARES = ("masked_rows", "reread")  # 0 to 1
_ABSENT = frozenset({"load_stall", "repack"})  # 0 where a profile names none


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePeak:
    """Datasheet facts of a device at the arithmetic of one dtype: dense FLOP/s, memory, last-level cache, units (SMs, cores)."""

    flops: float
    memory_Bps: float
    cache_B: float
    units: int

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (math.isfinite(value) and value > 0):
                raise ProfileError(f"ComputePeak.{item.name}={value!r}: must be finite and > 0; correct the device profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernel:
    """How one kernel turns peaks into time; the defaults are a typical fused GPU kernel, before any fit.

    Fitted numbers (`cost.experts` has the formula; `memory_efficiency`, `activation_efficiency` and `flops_efficiency` are
    shares of the peak, the last for tiles without overhead, `tile_overhead` is in rows; a profile leaves out a `load_stall` or
    `repack` of 0), of which a fit frees at most twelve, and facts of the implementation: `tile_rows` with the steps of the rule
    that picks it, `tile_columns`, `tile_groups` (row tiles that walk together), `tuned`, `masked_rows` (share of a row's
    cost that an empty one saves; fits lie between 0 and 0.9 and gain nothing over 0.3), and `style`:

    - fused: one launch, rows gathered inside the kernel (vLLM, SGLang, TensorRT-LLM).
    - grouped: one launch per product over all experts, rows permuted in memory before and after (torch grouped_mm).
    - loop: one launch per active expert, nothing shared between experts (CPU, naive loops); permuting and combining
      cost a layer with any token as much as four more.

    `tile_rows[i]` is used while the rule's quantity is <= its i-th step, the last beyond; one rule of: `by_tokens`
    (tokens of the layer), `by_tokens_per_expert` (tokens / experts), `by_selections_per_expert` (tokens*top_k / experts);
    `tile_groups` goes by `groups_by_tokens_per_expert`. `tuned` lists pairs (experts, intermediate, experts, ...) for which the
    engine ships tuned tiles. `valid` maps tokens, hidden, intermediate, experts and top_k to the fitted (least, most).
    """

    name: str
    style: Style
    dtype: str
    launch_s: float = 15e-6
    token_s: float = 10e-9
    memory_efficiency: float = 0.9
    activation_efficiency: float = 0.6
    flops_efficiency: float = 0.8
    tile_overhead: float = 80.0
    overlap: float = 3.0
    wave_tail: float = 1.0
    partial_tile: float = 0.0
    load_stall: float = 0.0
    reread: float = 0.5
    reread_cache: float = 0.7
    repack: float = 0.0
    tile_rows: tuple[float, ...] = (64,)
    by_tokens: tuple[float, ...] = ()
    by_tokens_per_expert: tuple[float, ...] = ()
    by_selections_per_expert: tuple[float, ...] = ()
    tile_columns: int = 128
    tile_groups: tuple[float, ...] = (1,)
    groups_by_tokens_per_expert: tuple[float, ...] = ()
    tuned: tuple[float, ...] = ()
    masked_rows: float = 0.3
    valid: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"kernel {self.name!r}"
        if self.style not in STYLES or self.dtype not in WEIGHT_B:
            raise ProfileError(f"{where}: style {self.style!r}, dtype {self.dtype!r}; styles are {', '.join(STYLES)}, dtypes {', '.join(WEIGHT_B)}")
        for name in PARAMETERS:
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name in _MAY_BE_ZERO))):
                raise ProfileError(f"{where}: {name}={value!r} must be finite and {'>= 0' if name in _MAY_BE_ZERO else '> 0'}; fit the kernel again")
        if self.overlap < 1 or any(not 0 <= getattr(self, name) <= 1 for name in _SHARES):
            told = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SHARES)
            raise ProfileError(f"{where}: overlap={self.overlap!r} must be >= 1 and {told} from 0 to 1; fit the kernel again")
        rules = [steps for steps in (self.by_tokens, self.by_tokens_per_expert, self.by_selections_per_expert) if steps]
        if len(rules) > 1 or not _steps_fit(self.tile_rows, rules[0] if rules else ()) or self.tile_columns < 1:
            raise ProfileError(f"{where}: tile_rows={self.tile_rows} with steps {rules}: give at most one rule, rising, one step fewer than rows")
        if not _steps_fit(self.tile_groups, self.groups_by_tokens_per_expert):
            raise ProfileError(f"{where}: tile_groups={self.tile_groups} with steps {self.groups_by_tokens_per_expert}: rising, one step fewer")
        if len(self.tuned) % 2 or any(not (size >= 1) for size in self.tuned):
            raise ProfileError(f"{where}: tuned={self.tuned} must be pairs of experts and intermediate size >= 1")
        if unknown := set(self.valid) - set(VALID_KEYS):
            raise ProfileError(f"{where}: valid names {sorted(unknown)}; known are {', '.join(VALID_KEYS)}")

    @classmethod
    def from_profile(cls, fitted: Fitted) -> ExpertKernel:
        """Kernel of a device profile's `[[kernels]]` table; ProfileError names a parameter that is unknown or impossible."""
        known = {*PARAMETERS, *TILING}
        if unknown := sorted(set(fitted.parameters) - known):
            raise ProfileError(f"kernel {fitted.name!r}: unknown parameters {unknown}; known are {', '.join(sorted(known))}")
        if missing := sorted(set(PARAMETERS) - set(fitted.parameters) - _ABSENT):
            raise ProfileError(f"kernel {fitted.name!r}: parameters {missing} are missing; fit the kernel again")
        given: dict[str, Any] = {name: float(fitted.parameters[name]) for name in PARAMETERS if name in fitted.parameters}
        for name in TILING:
            if name in fitted.parameters:
                value = fitted.parameters[name]
                given[name] = tuple(value) if isinstance(value, (list, tuple)) else int(value) if name == "tile_columns" else float(value)
        return cls(
            name=fitted.name,
            style=fitted.attributes["style"],
            dtype=fitted.attributes["dtype"],
            valid={name: (float(least), float(most)) for name, (least, most) in fitted.valid.items()},
            **given,
        )


def _steps_fit(values: tuple[float, ...], steps: tuple[float, ...]) -> bool:
    return len(values) == len(steps) + 1 and list(steps) == sorted(set(steps)) and min(values) >= 1


PARAMETERS = (
    "launch_s",
    "token_s",
    "memory_efficiency",
    "activation_efficiency",
    "flops_efficiency",
    "tile_overhead",
    "overlap",
    "wave_tail",
    "partial_tile",
    "load_stall",
    "reread",
    "reread_cache",
    "repack",
)
TILES = (
    "tile_rows",
    "by_tokens",
    "by_tokens_per_expert",
    "by_selections_per_expert",
    "tile_columns",
    "tile_groups",
    "groups_by_tokens_per_expert",
    "tuned",
)
TILING = (*TILES, "masked_rows")
