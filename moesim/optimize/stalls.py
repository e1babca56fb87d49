"""How long steps take while experts are copied, in closed form: the event engine's rules without its events.

A layer is attention, gate, dispatch, experts, combine. Copies it misses begin behind its gate, beside the dispatch; copies ahead
of it begin behind the gate of an earlier layer, in order; what a layer waits for goes first. S steps, L MoE layers, G devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost import CostModel
from moesim.cost.attention import Mode
from moesim.cost.offload import Fetching
from moesim.plan import Placement
from moesim.sim.dense import dense_times
from moesim.sim.residency import Copies, Stay
from moesim.systems.routing import Plain, Routed

CHUNK_STEPS = 4096
ROUNDS = 8
Floats = NDArray[np.float64]


def routed_steps(
    cost: CostModel, placement: Placement, experts_TLK: NDArray[np.uint16], ends_S: NDArray[np.integer], tokens_per_step: float
) -> Iterator[Routed]:
    """Traffic of steps that end at the tokens `ends_S`, scaled to `tokens_per_step`, `CHUNK_STEPS` steps at a time."""
    router = Plain().router(placement, cost.cluster.node_G, gatherable=0, selections=cost.way.per_selection)
    for first in range(0, len(ends_S), CHUNK_STEPS):
        start, ends = int(ends_S[first - 1]) if first else 0, ends_S[first : first + CHUNK_STEPS]
        yield router(experts_TLK[start : ends[-1]], ends - start, tokens_per_step)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds of the parts of every layer with all experts in place; front: attention, shared experts and gate."""

    front_LG: Floats
    dispatch_SL: Floats
    compute_SLG: Floats
    combine_SL: Floats
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        cost: CostModel,
        placement: Placement,
        experts_TLK: NDArray[np.uint16],
        ends_S: NDArray[np.integer],
        *,
        tokens_per_device: int,
        mode: Mode,
        context: int,
    ) -> StepTimes:
        """Times of steps that end at the tokens `ends_S`, scaled to `tokens_per_device` as the engines scale them."""
        dense = dense_times(cost, tokens=tokens_per_device, context=context, mode=mode)
        parts = []
        for routed in routed_steps(cost, placement, experts_TLK, ends_S, float(tokens_per_device * cost.cluster.size)):
            times = cost.layer_times(routed.traffic, placement)
            parts.append((times.dispatch.time_s_N, times.compute_s_SLG, times.combine.time_s_N, times.extrapolated_SLG.any(axis=2)))
        dispatch, compute, combine, outside = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        far = int(outside.sum())
        return cls(
            front_LG=dense.attention_LG + dense.gate_G + dense.shared_G,
            dispatch_SL=dispatch,
            compute_SLG=compute,
            combine_SL=combine,
            notes=(f"extrapolated: {far} of {outside.size} layer computations lie outside the calibrated range",) if far else (),
        )

    @property
    def step_s_S(self) -> Floats:
        """Every step with all experts in place."""
        return self._run(None, np.zeros(self.compute_SLG[:, 0].shape))[0]

    def with_copies(self, stay: Stay) -> tuple[Floats, bool]:
        """step_s_S while experts are copied as a residency settled; and whether copies ahead that steps leave to the next ones
        are settled, too, after `ROUNDS` (else they pile up, and steps take longer than this says).

        Devices meet in every dispatch and combine. A demand waits for half an expert's copy where one is under way, and delays
        every copy ahead that is not done by its own length.
        """
        late_SG = np.zeros(self.compute_SLG[:, 0].shape)
        for _ in range(ROUNDS):
            step_S, left_SG = self._run(stay, late_SG)
            settled = np.allclose(left_SG[:-1], late_SG[1:], rtol=0, atol=1e-3 * float(step_S.mean()))
            if settled:
                break
            late_SG[1:] = left_SG[:-1]
        return step_S, settled

    def _run(self, stay: Stay | None, free_SG: Floats) -> tuple[Floats, Floats]:
        """Steps whose copy engines are busy until `free_SG`, and by how much they still are when the steps end."""
        steps, layers, devices = self.compute_SLG.shape
        begin_SG = np.zeros((steps, devices))
        come: dict[int, Floats] = {}  # when a layer's copies ahead are done
        for layer in range(layers):
            gate_SG = begin_SG + self.front_LG[layer]
            ready_SG = gate_SG.max(axis=1, keepdims=True) + self.dispatch_SL[:, layer, None]
            if stay is not None:
                copies, ways_G = stay.copies, stay.ways_G
                ahead_SG = come.pop(layer, gate_SG)
                sync_G = np.asarray([way.sync_s for way in ways_G])
                asks_SG = np.where(sync_G > 0, np.maximum(gate_SG, ahead_SG) + sync_G, gate_SG)
                demand_SG = _demand_s(ways_G, copies.demand_B_SLG[:, layer], copies.demand_stored_B_SLG[:, layer])
                piece_G = np.asarray([float(way.ahead_s(float(found.size_B_A.mean()) if found.size_B_A.size else 0.0, 1))
                                      for way, found in zip(ways_G, stay.found_G, strict=True)])  # fmt: skip
                wait_SG = np.where(demand_SG > 0, np.minimum(np.maximum(free_SG - asks_SG, 0.0), piece_G / 2), 0.0)
                come = {later: np.where(end_SG > asks_SG, end_SG + demand_SG, end_SG) for later, end_SG in come.items()}
                ahead_SG = np.where(ahead_SG > asks_SG, ahead_SG + demand_SG, ahead_SG)
                free_SG = np.where(demand_SG > 0, np.maximum(free_SG, asks_SG) + demand_SG, free_SG)
                ready_SG = np.maximum(ready_SG, np.maximum(asks_SG + wait_SG + demand_SG, ahead_SG))
                for later in np.flatnonzero(np.arange(layers) - self._leads(stay, layers) == layer).tolist():
                    if later > layer:
                        come[later], free_SG = _ahead(copies, ways_G, later, asks_SG, free_SG)
            end_S = (ready_SG + self.compute_SLG[:, layer]).max(axis=1) + self.combine_SL[:, layer]
            begin_SG = np.broadcast_to(end_S[:, None], (steps, devices))
        return np.asarray(begin_SG[:, 0]), np.maximum(free_SG - begin_SG, 0.0)

    @staticmethod
    def _leads(stay: Stay, layers: int) -> NDArray[np.int64]:
        """Layers by which each layer's copies ahead are asked for before it, in any step; 0: there are none."""
        return np.asarray(stay.found_G[0].lead_N[:layers], np.int64)


def _demand_s(ways_G: Sequence[Fetching], bytes_SG: Floats, stored_SG: Floats) -> Floats:
    """Seconds of copies that a layer waits for; `stored` bytes are read from the SSD before."""
    return np.stack([way.demand_s(bytes_SG[:, g]) + stored_SG[:, g] / way.storage_Bps for g, way in enumerate(ways_G)], axis=1)


def _ahead(copies: Copies, ways_G: Sequence[Fetching], layer: int, asks_SG: Floats, free_SG: Floats) -> tuple[Floats, Floats]:
    """When a layer's copies ahead are done, and when those in vain behind them are: asked for at `asks_SG`, after all before them."""
    done, free = [], []
    for g, way in enumerate(ways_G):
        begin_S = np.maximum(free_SG[:, g], asks_SG[:, g])
        known_S = (
            way.ahead_s(copies.known_B_SLG[:, layer, g], copies.known_SLG[:, layer, g]) + copies.known_stored_B_SLG[:, layer, g] / way.storage_Bps
        )
        vain_S = way.ahead_s(copies.vain_B_SLG[:, layer, g], copies.vain_SLG[:, layer, g]) + copies.vain_stored_B_SLG[:, layer, g] / way.storage_Bps
        done.append(np.where(known_S > 0, begin_S + known_S, 0.0))
        free.append(np.where(known_S + vain_S > 0, begin_S + known_S + vain_S, free_SG[:, g]))
    return np.stack(done, axis=1), np.stack(free, axis=1)


__all__ = ["StepTimes", "routed_steps"]
