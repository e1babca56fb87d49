"""Gathers what the routers of one stack of layers decided in one forward pass.

On a GPU: one stack and one cast, still on the device, so that one copy brings it over. On the CPU there is nothing to
bring over: the tensors are taken as they are, by the writer thread, many passes in a row while its code is warm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesim.capture.discover import Router
from moesim.errors import CaptureError

Kept = tuple[int, Tensor, "Tensor | None"]  # index of the router in its stack, ids, weights without their graph
Layers = dict[str, list["Tensor | None"]]  # `experts` (-1 or 65535 = none) and `weights`: L times [R, K], None where a router is silent
_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8})


def gather(routers: Sequence[Router], kept: Sequence[Kept], *, width: int, weights: bool) -> Layers:
    """The decisions layer by layer, from `kept` in order of the calls; several calls of one router (chunks of the rows) are joined.

    Raises CaptureError naming the router when ids are no whole numbers, wider than `width`, or rows differ between layers.
    """
    if _plain(kept, len(routers), width, weights):
        experts: list[Tensor | None] = [ids for _, ids, _ in kept]
        return {"experts": experts, "weights": [gates for *_, gates in kept]} if weights else {"experts": experts}
    return _joined(routers, kept, width=width, weights=weights)


@torch.no_grad()
def stacked(layers: Layers) -> dict[str, Tensor]:
    """`experts` uint16 and `weights` float16 [L, R, K], on the device of the first layer that is not on the CPU."""
    kinds = {"experts": (-1, torch.uint16), "weights": (0, torch.float16)}
    return {what: _stack(values, *kinds[what]) for what, values in layers.items()}


def _plain(kept: Sequence[Kept], layers: int, width: int, weights: bool) -> bool:
    """Every router once, in order, on the CPU, as wide as the trace: nothing to join, pad or bring over."""
    shape = kept[0][1].shape
    if len(kept) != layers or len(shape) != 2 or shape[1] != width:
        return False
    for index, (layer, ids, gates) in enumerate(kept):
        if layer != index or ids.dtype not in _WHOLE or not ids.is_cpu or ids.shape != shape:
            return False
        if weights and (gates is None or not gates.dtype.is_floating_point or not gates.is_cpu or gates.shape != shape):
            return False
    return True


@torch.no_grad()
def _joined(routers: Sequence[Router], kept: Sequence[Kept], *, width: int, weights: bool) -> Layers:
    ids: list[Tensor | None] = []
    gates: list[Tensor | None] = []
    first: tuple[str, int] | None = None
    for index, router in enumerate(routers):
        calls = [call for call in kept if call[0] == index]
        if not calls:
            ids.append(None)
            gates.append(None)
            continue
        rows = _rows(router, [call[1] for call in calls], width)
        first = first or (router.name, len(rows))
        if len(rows) != first[1]:
            raise CaptureError(
                f"{router.name} routed {len(rows)} tokens and {first[0]} {first[1]} in one forward pass; "
                "a trace needs every layer to see every token once"
            )
        ids.append(rows)
        if weights:
            parts = [call[2] for call in calls if call[2] is not None]
            if len(parts) != len(calls):
                raise CaptureError(f"{router.name} gives no gate weights; capture with weights=False")
            gates.append(_rows(router, parts, width, floating=True))
    return {"experts": ids, "weights": gates} if weights else {"experts": ids}


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


def _stack(values: list[Tensor | None], filler: float, kind: torch.dtype) -> Tensor:
    heard = [value for value in values if value is not None]
    device = next((value.device for value in heard if not value.is_cpu), heard[0].device)
    silent = torch.full_like(heard[0], filler, device=device)
    return torch.stack([silent if value is None else value.to(device) for value in values]).to(kind)
