"""Gathers what the routers of one stack of layers decided in one forward pass.

On a GPU: one stack and one cast, still on the device, so that one copy brings it over. On the CPU there is nothing to
bring over: references go to the writer thread, which converts many passes in a row while its code is warm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesim.capture.discover import Router
from moesim.errors import CaptureError

Kept = tuple[int, Tensor, "Tensor | None"]
Layers = Tensor | list[Tensor | None]  # [L, R, K], or L times [R, K] with None where a router is silent
_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8})


def gather(routers: Sequence[Router], kept: Sequence[Kept], *, width: int, weights: bool) -> tuple[dict[str, Layers], int, list[int]]:
    """`experts` (-1 or 65535 = none) and `weights`, the rows R, and the indices of routers that are silent.

    `kept` holds (index into `routers`, ids, weights) in order; several calls of one router (chunks of the rows) are joined.
    Raises CaptureError naming the router when ids are no whole numbers, wider than `width`, or rows differ between layers.
    """
    if _plain(kept, len(routers), width, weights):
        plain: dict[str, Layers] = {"experts": [ids for _, ids, _ in kept]}
        if weights:
            plain["weights"] = [gates.detach() for _, _, gates in kept if gates is not None]  # the graph behind them must not live on
        return plain, len(kept[0][1]), []
    return _joined(routers, kept, width=width, weights=weights)


@torch.no_grad()
def _joined(routers: Sequence[Router], kept: Sequence[Kept], *, width: int, weights: bool) -> tuple[dict[str, Layers], int, list[int]]:
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


def _plain(kept: Sequence[Kept], layers: int, width: int, weights: bool) -> bool:
    """Every router once, in order, on the CPU, as wide as the trace: nothing to join, pad or bring over."""
    if len(kept) != layers:
        return False
    shape = kept[0][1].shape
    if len(shape) != 2 or shape[1] != width:
        return False
    for index, (layer, ids, gates) in enumerate(kept):
        if layer != index or ids.dtype not in _WHOLE or not ids.is_cpu or ids.shape != shape:
            return False
        if weights and (gates is None or gates.dtype is not torch.float32 or not gates.is_cpu or gates.shape != shape):
            return False
    return True


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
