"""Constraints: what a plan must keep beside its slots, whether that is possible at all, and who contradicts whom if not.

E experts, G devices, P slots, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PlanError
from moesim.files import read_json, validated
from moesim.plan import Placement

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

FILL_S = 10.0  # for the integer program that looks for slots where the greedy filling gets stuck
MOST_RULES = 64  # more than this and the smallest conflict is not searched for


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Device `device` holds a replica of each of `experts`, in MoE layers `layers` (absolute indices; None: all)."""

    experts: tuple[int, ...]
    device: int
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"experts {list(self.experts)} pinned to device {self.device}"


@dataclass(frozen=True, kw_only=True)
class Apart:
    """No device holds two of `experts`, in MoE layers `layers` (absolute indices; None: all)."""

    experts: tuple[int, ...]
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"experts {list(self.experts)} kept apart"


@dataclass(frozen=True, kw_only=True, eq=False)
class Constraints:
    """Rules of a placement, and the live plan it starts from.

    rules           pins and sets kept apart
    memory_B_G      bytes each device can give to experts of all layers
    current         the live placement: staying with it is always an answer, and moves are counted from it
    most_moves      experts that may be copied to a device that lacks them, over all layers
    horizon_steps   steps over which the time of the copies must pay off
    """

    rules: tuple[Pin | Apart, ...] = ()
    memory_B_G: NDArray[np.float64] | None = None
    current: Placement | None = None
    most_moves: int | None = None
    horizon_steps: float | None = None

    def __post_init__(self) -> None:
        if self.current is None and (self.most_moves is not None or self.horizon_steps is not None):
            raise PlanError("most_moves and horizon_steps count from the live plan; give current, too")
        if self.most_moves is not None and self.most_moves < 0:
            raise PlanError(f"most_moves {self.most_moves} is negative; give 0 or more")
        if self.horizon_steps is not None and not (np.isfinite(self.horizon_steps) and self.horizon_steps > 0):
            raise PlanError(f"horizon_steps {self.horizon_steps} must be finite and above 0")

    def check(self, layers: Sequence[int], experts: int, devices: int) -> None:
        """PlanError for a rule about an expert, device or layer that is not there, or a live plan of another shape."""
        for rule in self.rules:
            if strange := [e for e in rule.experts if not 0 <= e < experts]:
                raise PlanError(f"{rule}: expert {strange[0]} is outside 0..{experts - 1}; correct the rule")
            if len(set(rule.experts)) < len(rule.experts):
                raise PlanError(f"{rule}: an expert is named twice; name each once")
            if isinstance(rule, Pin) and not 0 <= rule.device < devices:
                raise PlanError(f"{rule}: device {rule.device} is outside 0..{devices - 1}; correct the rule")
            if strange := [layer for layer in rule.layers or () if layer not in layers]:
                raise PlanError(f"{rule}: layer {strange[0]} is no MoE layer; MoE layers: {list(layers)}")
        if self.memory_B_G is not None and self.memory_B_G.shape != (devices,):
            raise PlanError(f"memory of {self.memory_B_G.size} devices, the cluster has {devices}; give one number each")
        if (live := self.current) and (live.layers, live.experts, live.devices) != (tuple(layers), experts, devices):
            raise PlanError(
                f"the live plan has {len(live.layers)} layers x {live.experts} experts on {live.devices} devices, the problem "
                f"{len(layers)} x {experts} on {devices}; give the plan that serves this model on this cluster"
            )

    def at(self, layer: int) -> tuple[Pin | Apart, ...]:
        """Rules of one MoE layer (absolute index)."""
        return tuple(rule for rule in self.rules if rule.layers is None or layer in rule.layers)

    def by_rules(self, layers: Sequence[int]) -> dict[tuple[Pin | Apart, ...], list[int]]:
        """Layers that have the same rules, by those rules; layers without any are left out."""
        found: dict[tuple[Pin | Apart, ...], list[int]] = {}
        for layer in layers if self.rules else ():
            if rules := self.at(layer):
                found.setdefault(rules, []).append(layer)
        return found

    def broken(self, placement: Placement) -> str | None:
        """The first rule that a placement breaks, with its layer, or None."""
        for index, layer in enumerate(placement.layers):
            pinned_GE, apart_EE = tables(self.at(layer), placement.experts, placement.devices)
            held_GE = placement.holds_LGE[index]
            if (pinned_GE & ~held_GE).any():
                device, expert = np.argwhere(pinned_GE & ~held_GE)[0]
                return f"layer {layer}: expert {expert} is pinned to device {device}, which does not hold it"
            for device, held_E in enumerate(held_GE):
                here = np.flatnonzero(held_E)
                if (clash := np.argwhere(apart_EE[np.ix_(here, here)])).size:
                    return f"layer {layer}: device {device} holds experts {here[clash[0]].tolist()}, which are to be kept apart"
        return None


def tables(rules: Sequence[Pin | Apart], experts: int, devices: int) -> tuple[Bools, Bools]:
    """pinned_GE and apart_EE (symmetric, False on its diagonal) of one layer's rules."""
    pinned_GE, apart_EE = np.zeros((devices, experts), bool), np.zeros((experts, experts), bool)
    for rule in rules:
        if isinstance(rule, Pin):
            pinned_GE[rule.device, list(rule.experts)] = True
        else:
            apart_EE[np.ix_(rule.experts, rule.experts)] = True
    np.fill_diagonal(apart_EE, False)
    return pinned_GE, apart_EE


def conflict(rules: Sequence[Pin | Apart], slots_G: NDArray[np.integer], experts: int) -> str | None:
    """Why no slots of one layer can keep these rules, naming a smallest set that contradicts itself, or None.

    Slots must hold every expert and no device an expert twice. What counting shows is said in its terms; anything else is
    decided by an integer program, and rules are dropped one by one until every one left is needed for the contradiction.
    """
    pinned_GE, apart_EE = tables(rules, experts, len(slots_G))
    for device in np.flatnonzero(pinned_GE.sum(axis=1) > slots_G).tolist():
        here = np.flatnonzero(pinned_GE[device])
        return f"{len(here)} experts are pinned to device {device}, which offers {slots_G[device]} slots: {here.tolist()}"
    for device, held_E in enumerate(pinned_GE):
        here = np.flatnonzero(held_E)
        if (clash := np.argwhere(apart_EE[np.ix_(here, here)])).size:
            return f"experts {here[clash[0]].tolist()} are pinned to device {device} and are to be kept apart"
    live, needed = int(np.count_nonzero(slots_G)), int(np.maximum(pinned_GE.sum(axis=0), 1).sum())
    for rule in rules:
        if isinstance(rule, Apart) and len(rule.experts) > live:
            return f"{rule}: {len(rule.experts)} experts on {live} devices that offer slots"
    if needed > slots_G.sum():
        return f"pins ask for {needed} slots, {slots_G.sum()} are offered"
    if not rules or filled(rules, slots_G, np.ones(experts)) is not None:
        return None
    core = list(rules)
    if len(core) <= MOST_RULES:
        for rule in rules:
            rest = [other for other in core if other is not rule]
            if filled(rest, slots_G, np.ones(experts)) is None:
                core = rest
    return f"these rules contradict each other on slots {slots_G.tolist()}: {'; '.join(map(str, core))}"


def filled(rules: Sequence[Pin | Apart], slots_G: NDArray[np.integer], load_E: NDArray[np.floating]) -> Ints | None:
    """Slots [P] of one layer that keep the rules, no expert twice on a device; None if there are none (or none in 10 s).

    Pinned experts first, then the heaviest to the lightest device that may take it; spare slots to the largest load per
    replica. Where that gets stuck, an integer program decides.
    """
    devices, experts = len(slots_G), len(load_E)
    pinned_GE, apart_EE = tables(rules, experts, devices)
    held_GE = pinned_GE.copy()
    room_G = np.asarray(slots_G, np.int64) - held_GE.sum(axis=1)
    if (room_G < 0).any() or any((apart_EE & here_E & here_E[:, None]).any() for here_E in held_GE):
        return None
    load_E = np.asarray(load_E, np.float64)

    def put(expert: int) -> bool:
        free_G = (room_G > 0) & ~held_GE[:, expert] & ~(held_GE & apart_EE[expert]).any(axis=1)
        if not free_G.any():
            return False
        load_G = held_GE @ (load_E / np.maximum(held_GE.sum(axis=0), 1))
        best = int(np.argmin(np.where(free_G, load_G, np.inf)))
        held_GE[best, expert] = True
        room_G[best] -= 1
        return True

    order = np.lexsort((-load_E, -apart_EE.sum(axis=1)))
    stuck = not all(put(int(e)) for e in order if not held_GE[:, e].any())
    while not stuck and room_G.sum():
        shares = np.argsort(-load_E / held_GE.sum(axis=0), kind="stable")
        stuck = not any(put(int(e)) for e in shares)
    if stuck:
        found_GE = _solved(pinned_GE, apart_EE, np.asarray(slots_G, np.int64))
        if found_GE is None:
            return None
        held_GE = found_GE
    return np.asarray(np.nonzero(held_GE)[1], np.int64)


def _solved(pinned_GE: Bools, apart_EE: Bools, slots_G: Ints) -> Bools | None:
    """Which device holds which expert, by an integer program: Σ_g z >= 1, Σ_e z = slots, z_e + z_f <= 1 for e, f apart."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array, eye_array, kron

    devices, experts = pinned_GE.shape
    e_A, f_A = np.nonzero(np.triu(apart_EE))
    pair_AE = coo_array((np.ones(2 * len(e_A)), (np.tile(np.arange(len(e_A)), 2), np.concatenate([e_A, f_A]))), shape=(len(e_A), experts))
    limits = [
        LinearConstraint(kron(np.ones((1, devices)), eye_array(experts)), 1, np.inf),
        LinearConstraint(kron(eye_array(devices), np.ones((1, experts))), slots_G, slots_G),
    ]
    if len(e_A):
        limits.append(LinearConstraint(kron(eye_array(devices), pair_AE), -np.inf, 1))
    bounds = Bounds(pinned_GE.ravel().astype(float), 1.0)
    size = pinned_GE.size
    found = milp(np.zeros(size), constraints=limits, integrality=np.ones(size, np.int64), bounds=bounds, options={"time_limit": FILL_S})
    return None if found.x is None else found.x.reshape(pinned_GE.shape) > 0.5


def load_rules(path: str | Path) -> tuple[Pin | Apart, ...]:
    """Rules from a JSON file, as in `{"pinned": [{"experts": [3], "device": 0}], "apart": [{"experts": [1, 2], "layers": [4]}]}`.

    Raises PlanError listing every mistake with its path in the file.
    """
    from moesim.optimize.schema import ApartEntry, PinEntry, RulesFile

    file = Path(path)
    parsed = validated(RulesFile, read_json(file, PlanError), place=str(file), error=PlanError)

    def layers(entry: PinEntry | ApartEntry) -> tuple[int, ...] | None:
        return None if entry.layers is None else tuple(entry.layers)

    return (
        *(Pin(experts=tuple(entry.experts), device=entry.device, layers=layers(entry)) for entry in parsed.pinned),
        *(Apart(experts=tuple(entry.experts), layers=layers(entry)) for entry in parsed.apart),
    )
