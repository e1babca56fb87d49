"""What a placement makes of loads alone: busiest over mean device, under the dispatch rule that runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.plan import Placement


def imbalance_L(placement: Placement, load_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Load of the busiest device over that of the mean one, per layer; 1 is perfect.

    `static-source` with tokens that start evenly on all devices; other rules split a load evenly over its replicas
    (what engines book-keep). A layer without load counts as 1.
    """
    share_LP = _static_LP(placement) if placement.dispatch == "static-source" else _even_LP(placement)
    layers = np.arange(len(placement.layers))[:, None]
    load_LP = share_LP * load_LE[layers, placement.slots_LP]
    load_LG = np.zeros((len(placement.layers), placement.devices))
    np.add.at(load_LG, (layers, placement.device_P[None, :]), load_LP)
    mean_L = load_LG.mean(axis=1)
    return np.asarray(np.divide(load_LG.max(axis=1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0))


def _even_LP(placement: Placement) -> NDArray[np.float64]:
    layers = np.arange(len(placement.layers))[:, None]
    return np.asarray(1.0 / placement.replicas_LE[layers, placement.slots_LP])


def _static_LP(placement: Placement) -> NDArray[np.float64]:
    """Share of an expert's tokens each slot gets: every source takes its own replica, else the lowest slot."""
    devices, slots = placement.devices, placement.slots_LP.shape[1]
    share_LP = np.zeros(placement.slots_LP.shape)
    for layer, row in enumerate(placement.slots_LP):
        chosen_GE = np.full((devices, placement.experts), slots)
        np.minimum.at(chosen_GE, (placement.device_P, row), np.arange(slots))
        lowest_E = chosen_GE.min(axis=0)
        chosen_GE = np.where(chosen_GE == slots, lowest_E, chosen_GE)
        np.add.at(share_LP[layer], chosen_GE.ravel(), 1.0 / devices)
    return share_LP
