"""Gathers what the routers of one stack of layers decided in one forward pass: one stack and one cast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesim.capture.discover import Router
from moesim.errors import CaptureError

Kept = tuple[int, Tensor, "Tensor | None"]


@torch.no_grad()
def gather(routers: Sequence[Router], kept: Sequence[Kept], *, width: int, weights: bool) -> tuple[dict[str, Tensor], list[int]]:
    """`experts` uint16 [L, R, K] (65535 = none), `weights` float16 [L, R, K], and the indices of routers that are silent.

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
    tensors = {"experts": _stack(ids, silent, -1).to(torch.uint16)}
    if weights:
        gates = []
        for router, found in zip(heard, (c for c in calls if c), strict=True):
            parts = [call[2] for call in found if call[2] is not None]
            if len(parts) != len(found):
                raise CaptureError(f"{router.name} gives no gate weights; capture with weights=False")
            gates.append(_rows(router, parts, width, floating=True))
        tensors["weights"] = _stack(gates, silent, 0).to(torch.float16)
    return tensors, silent


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


def _stack(rows: list[Tensor], silent: list[int], filler: float) -> Tensor:
    device = rows[0].device
    rows = [row if row.device == device else row.to(device) for row in rows]
    for index in silent:
        rows.insert(index, torch.full_like(rows[0], filler))
    return torch.stack(rows)
