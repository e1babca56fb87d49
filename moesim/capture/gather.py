"""Gathers what the routers of one stack of layers decided in one forward pass.

On a GPU: one stack and one cast, still on the device, so that one copy brings it over. On the CPU there is nothing to
bring over: the tensors are taken as they are, by the writer thread, many passes in a row while its code is warm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesim.capture.discover import Router
from moesim.errors import CaptureError

# index of the router in its stack, ids, weights and logits without their graph
Kept = tuple[int, Tensor, "Tensor | None", "Tensor | None"]
# `experts` (-1 or 65535 = none), `weights` and `logits`: L times [R, K] or [R, E], None where a router is silent
Layers = dict[str, list["Tensor | None"]]
_AT = {"experts": 1, "weights": 2, "logits": 3}  # in Kept
_KINDS = {"experts": (-1, torch.uint16), "weights": (0, torch.float16), "logits": (torch.nan, torch.float16)}
_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8})


def gather(routers: Sequence[Router], kept: Sequence[Kept], widths: Mapping[str, int]) -> Layers:
    """The decisions layer by layer, from `kept` in order of the calls; several calls of one router (chunks of the rows) are joined.

    `widths` are the trace's (`TraceInfo.widths`). Raises CaptureError naming the router when ids are no whole numbers or
    wider than the trace, weights or logits are missing, or rows differ between layers.
    """
    if _plain(kept, len(routers), widths):
        return {what: [one[_AT[what]] for one in kept] for what in widths}  # type: ignore[misc]
    return _joined(routers, kept, widths)


@torch.no_grad()
def stacked(layers: Layers) -> dict[str, Tensor]:
    """`experts` uint16, `weights` and `logits` float16 [L, R, K or E], on the device of the first layer that is not on the CPU."""
    return {what: _stack(values, *_KINDS[what]) for what, values in layers.items()}


def _plain(kept: Sequence[Kept], layers: int, widths: Mapping[str, int]) -> bool:
    """Every router once, in order, on the CPU, as wide as the trace: nothing to join, pad or bring over."""
    shape = kept[0][1].shape
    if len(kept) != layers or len(shape) != 2 or shape[1] != widths["experts"]:
        return False
    floats = [(_AT[what], (shape[0], width)) for what, width in widths.items() if what != "experts"]
    for index, one in enumerate(kept):
        ids = one[1]
        if one[0] != index or ids.dtype not in _WHOLE or not ids.is_cpu or ids.shape != shape:
            return False
        for at, wanted in floats:
            values = one[at]
            if not isinstance(values, Tensor) or not values.dtype.is_floating_point or not values.is_cpu or values.shape != wanted:
                return False
    return True


@torch.no_grad()
def _joined(routers: Sequence[Router], kept: Sequence[Kept], widths: Mapping[str, int]) -> Layers:
    layers: Layers = {what: [] for what in widths}
    first: tuple[str, int] | None = None
    for index, router in enumerate(routers):
        calls = [call for call in kept if call[0] == index]
        for what, width in widths.items():
            parts = [part for call in calls if isinstance(part := call[_AT[what]], Tensor)]
            if len(parts) != len(calls):
                raise CaptureError(f"{router.name} gives no {'gate weights' if what == 'weights' else 'router logits'}; capture with {what}=False")
            if not calls:
                layers[what].append(None)
                continue
            rows = _rows(router, parts, what, width)
            first = first or (router.name, len(rows))
            if len(rows) != first[1]:
                raise CaptureError(
                    f"{router.name} routed {len(rows)} tokens and {first[0]} {first[1]} in one forward pass; "
                    "a trace needs every layer to see every token once"
                )
            layers[what].append(rows)
    return layers


def _rows(router: Router, parts: Sequence[Tensor], what: str, width: int) -> Tensor:
    flat = [part if part.ndim == 2 else part.flatten(0, -2) for part in parts]
    rows = flat[0] if len(flat) == 1 else torch.cat(flat)
    kind = type(router.module).__name__
    if rows.is_floating_point() != (what != "experts") or rows.dtype == torch.bool:
        named = "ids" if what == "experts" else what
        raise CaptureError(f"{router.name} ({kind}): {named} are {rows.dtype}; adapt it with moesim.capture.register_router")
    if what == "logits" and rows.shape[1] != width:
        raise CaptureError(
            f"{router.name} ({kind}) gave logits of {rows.shape[1]} experts, the model's description says {width}; "
            "pass model_spec= with that many, or capture with logits=False"
        )
    if rows.shape[1] > width:
        raise CaptureError(
            f"{router.name} ({kind}) chose {rows.shape[1]} experts, the model's description says at most {width}; pass model_spec= with that top_k"
        )
    return rows if rows.shape[1] == width else pad(rows, (0, width - rows.shape[1]), value=-1 if what == "experts" else 0.0)


def _stack(values: list[Tensor | None], filler: float, kind: torch.dtype) -> Tensor:
    heard = [value for value in values if value is not None]
    device = next((value.device for value in heard if not value.is_cpu), heard[0].device)
    silent = torch.full_like(heard[0], filler, device=device)
    return torch.stack([silent if value is None else value.to(device) for value in values]).to(kind)
