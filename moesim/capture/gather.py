"""Gathers what the routers of one stack of layers decided in one forward pass.

On a GPU: one stack and one cast, still on the device, so that one copy brings it over. On the CPU there is nothing to
bring over: references go to the writer thread, which stacks many passes in a row while its code is warm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from moesim.capture.discover import Router
from moesim.errors import CaptureError

Kept = tuple[int, Tensor, "Tensor | None"]
Layers = Tensor | list[Tensor | None]  # [L, R, K], or L times [R, K] with None where a router is silent
_KINDS = {"experts": (np.uint16, 65535), "weights": (np.float16, 0)}


@torch.no_grad()
def gather(routers: Sequence[Router], kept: Sequence[Kept], *, width: int, weights: bool) -> tuple[dict[str, Layers], int, list[int]]:
    """`experts` (-1 or 65535 = none) and `weights`, the rows R, and the indices of routers that are silent; see `stacked`.

    `kept` holds (index into `routers`, ids, weights) in order; several calls of one router (chunks of the rows) are joined.
    Raises CaptureError naming the router when ids are no whole numbers, wider than `width`, or rows differ between layers.
    """
    calls: list[list[Kept]] = [[] for _ in routers]
    for item in kept:
        calls[item[0]].append(item)
    silent = [index for index, found in enumerate(calls) if not found]
    if len(silent) == len(routers):
        raise CaptureError(f"no router fired in this forward pass, first of them {routers[0].name}; is it run by something else?")
    ids = [_rows(router, [call[1] for call in found], width) for router, found in zip(routers, calls, strict=True) if found]
    heard = [router for router, found in zip(routers, calls, strict=True) if found]
    for router, rows in zip(heard, ids, strict=True):
        if len(rows) != len(ids[0]):
            raise CaptureError(
                f"{router.name} routed {len(rows)} tokens and {heard[0].name} {len(ids[0])} in one forward pass; "
                "a trace needs every layer to see every token once"
            )
    found: dict[str, Layers] = {"experts": _layers(ids, silent, -1, torch.uint16)}
    if weights:
        gates = []
        for router, heard_calls in zip(heard, (c for c in calls if c), strict=True):
            parts = [call[2] for call in heard_calls if call[2] is not None]
            if len(parts) != len(heard_calls):
                raise CaptureError(f"{router.name} gives no gate weights; capture with weights=False")
            gates.append(_rows(router, parts, width, floating=True))
        found["weights"] = _layers(gates, silent, 0, torch.float16)
    return found, len(ids[0]), silent


def stacked(what: str, values: NDArray[Any] | list[NDArray[Any] | None]) -> NDArray[Any]:
    """[L, R, K] of `experts` (uint16) or `weights` (float16) as they came over."""
    if isinstance(values, np.ndarray):
        return values
    kind, filler = _KINDS[what]
    rows, width = next(value.shape for value in values if value is not None)
    made = np.empty((len(values), rows, width), kind)
    for layer, value in enumerate(values):
        made[layer] = filler if value is None else value.astype(kind)  # by way of astype: -1 becomes 65535
    return made


def _rows(router: Router, parts: Sequence[Tensor], width: int, *, floating: bool = False) -> Tensor:
    flat = [part if part.ndim == 2 else part.flatten(0, -2) for part in parts]
    rows = flat[0] if len(flat) == 1 else torch.cat(flat)
    kind = type(router.module).__name__
    if rows.is_floating_point() != floating or rows.dtype == torch.bool:
        what = "weights" if floating else "ids"
        raise CaptureError(f"{router.name} ({kind}): {what} are {rows.dtype}; adapt it with moesim.capture.register_router")
    if rows.shape[1] > width:
        raise CaptureError(
            f"{router.name} ({kind}) chose {rows.shape[1]} experts, the model's description says at most {width}; pass model_spec= with that top_k"
        )
    return rows if rows.shape[1] == width else pad(rows, (0, width - rows.shape[1]), value=0.0 if floating else -1)


def _layers(rows: list[Tensor], silent: list[int], filler: float, kind: torch.dtype) -> Layers:
    if all(row.device.type == "cpu" for row in rows):
        listed: list[Tensor | None] = [row.detach() for row in rows]  # the graph behind them must not live on
        for index in silent:
            listed.insert(index, None)
        return listed
    device = rows[0].device
    rows = [row if row.device == device else row.to(device) for row in rows]
    for index in silent:
        rows.insert(index, torch.full_like(rows[0], filler))
    return torch.stack(rows).to(kind)
