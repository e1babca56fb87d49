"""Energy of a step, from board power and how busy devices are. An estimate: no power was measured.

    energy = sum over devices of board power * busy seconds,    busy = computing or moving data
    most   = sum over devices of board power * step seconds     (no less power while waiting)

Board power is the datasheet's limit: kernels bound by memory draw less, and hosts, NICs and switches are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError
from moesim.hardware import Cluster

Floats = NDArray[np.float64]
ASSUMPTION = "board power while busy, none while waiting; hosts, NICs and switches are not counted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Joules per token: estimate and most; utilisation of each device; confidence of the weakest input."""

    token_J: float
    most_token_J: float
    utilisation_G: Floats
    confidence: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "token_J": self.token_J,
            "most_token_J": self.most_token_J,
            "utilisation": self.utilisation_G.tolist(),
            "confidence": self.confidence,
            "assumption": ASSUMPTION,
        }


def energy_of(busy_s_SG: Floats, step_s_S: Floats, tokens_per_step: float, cluster: Cluster) -> Energy:
    """Energy of S steps in which device g is busy for busy_s_SG seconds of step_s_S.

    Shapes: [S, G], [S]. The confidence is "assumed" at best: what a busy device draws is an assumption. Raises InputError
    on shapes, busy above step seconds, tokens below 0 or a device whose profile has no board power (it is named).
    """
    busy, step = np.asarray(busy_s_SG, np.float64), np.asarray(step_s_S, np.float64)
    if busy.shape != (len(step), cluster.size) or tokens_per_step <= 0:
        raise InputError(f"busy {busy.shape}, steps {step.shape}, {tokens_per_step} tokens: pass [S, {cluster.size}], [S] and tokens > 0")
    if (busy < 0).any() or (busy > step[:, None] * (1 + 1e-9)).any():
        raise InputError("a device is busy for longer than its step, or for negative time; pass seconds of the same steps")
    lacking = sorted({device.name for device in cluster.devices if device.power_W is None})
    if lacking:
        raise InputError(f"no board power in the profile of {', '.join(lacking)}; add a [power] table")
    power_G = np.asarray([device.power_W for device in cluster.devices], np.float64)
    tokens = tokens_per_step * len(step)
    weak = any(".power." in fact.path for device in cluster.devices for fact in device.weak_facts)
    return Energy(
        token_J=float((busy.sum(axis=0) * power_G).sum() / tokens),
        most_token_J=float(step.sum() * power_G.sum() / tokens),
        utilisation_G=busy.sum(axis=0) / step.sum(),
        confidence="unverified" if weak else "assumed",
        notes=(f"energy is an estimate: {ASSUMPTION}",),
    )
