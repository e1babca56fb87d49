"""Fits: how well the shipped parameters predict shapes, sizes and exchanges that were left out, as the profiles record it.

Nothing is measured here; `moesim calibrate --from TABLE --profile NAME --evaluate` scores them on a table of your own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.hardware import device_names, load_device, load_links
from tests.bench.registry import Measured, bench


def held_out(kind: str, score: str) -> Iterator[tuple[float, str]]:
    """(held-out score, name) of every shipped fit of one kind that could be cross-validated."""
    fits = [(device, fit) for device in device_names() for fit in (*load_device(device).kernels, *load_device(device).collectives)]
    fits += [(name, fit) for name, link in load_links().items() for fit in getattr(link, "collectives", ())]
    for where, fit in fits:
        if fit.kind == kind and f"held_out_{score}" in fit.residuals:
            yield fit.residuals[f"held_out_{score}"], f"{where}/{fit.name}/{fit.attributes.get('dtype') or fit.attributes.get('op', '')}"


def worst(kind: str, score: str, limit: float) -> Measured:
    """The worst of them beside the limit we set."""
    found = list(held_out(kind, score))
    value, name = max(found)
    middle = float(np.median([each for each, _ in found]))
    return Measured(value=value, unit=f"worst of {len(found)}: {name}; middle {middle:.3f}", peer="our limit", peer_value=limit)


@bench
def kernel_fit_median() -> Measured:
    """Median absolute error of expert kernels on shapes left out, worst device and dtype."""
    return worst("kernel", "median_ape", 0.04)


@bench
def kernel_fit_p90() -> Measured:
    """90th percentile of the same."""
    return worst("kernel", "p90_ape", 0.12)


@bench
def network_fit_median() -> Measured:
    """Median absolute error of collectives on sizes or exchanges left out, worst of them."""
    return worst("collective", "median_ape", 0.10)
