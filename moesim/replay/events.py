"""Events: what every step asks of every layer's expert cache, as flat arrays.

T tokens, L MoE layers, K selections, E experts, N events, A accesses (one expert of one event). An event is the set of
distinct experts one step needs at one layer: a token's own for `tokens_per_step=1`, the union of a batch's otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.trace import Trace
from moesim.trace.schema import NO_EXPERT


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """N events in the order they happen: step after step, and inside a step layer after layer.

    experts_A   int32, the accesses; distinct and ascending inside an event
    starts_N    int64 [N+1], event n asks for `experts_A[starts_N[n]:starts_N[n+1]]`; an event may ask for none
    layer_N     int32, row of the MoE layer, 0..layers-1
    step_N      int32, never falls
    tokens      of the model that asked; None: one per step

    Raises TraceError where the arrays contradict this or name an expert or layer outside the model.
    """

    experts_A: NDArray[np.int32]
    starts_N: NDArray[np.int64]
    layer_N: NDArray[np.int32]
    step_N: NDArray[np.int32]
    layers: int
    experts: int
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.layers < 1 or not 1 <= self.experts <= NO_EXPERT:
            raise TraceError(f"events of {self.layers} layers x {self.experts} experts: both must be >= 1, experts at most {NO_EXPERT}")
        for name, kind in (("experts_A", np.int32), ("starts_N", np.int64), ("layer_N", np.int32), ("step_N", np.int32)):
            values = np.array(getattr(self, name))
            if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
                raise TraceError(f"events: {name} must be one row of whole numbers, got {values.dtype} of shape {values.shape}")
            if values.size and not np.iinfo(kind).min <= values.min() <= values.max() <= np.iinfo(kind).max:
                raise TraceError(f"events: {name} holds {values.min()}..{values.max()}, more than {np.dtype(kind)} has room for")
            values = values.astype(kind)
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        events = len(self.layer_N)
        if len(self.step_N) != events or len(self.starts_N) != events + 1:
            raise TraceError(f"events: {events} layers, {len(self.step_N)} steps and {len(self.starts_N)} starts; starts must be one more")
        if self.starts_N[0] != 0 or self.starts_N[-1] != len(self.experts_A) or (np.diff(self.starts_N) < 0).any():
            raise TraceError(f"events: starts_N must rise from 0 to {len(self.experts_A)}, the number of accesses")
        if (np.diff(self.step_N) < 0).any():
            raise TraceError("events: step_N falls; put the events in the order they happen")
        for name, most in (("experts_A", self.experts), ("layer_N", self.layers)):
            values = getattr(self, name)
            if values.size and (values.min() < 0 or values.max() >= most):
                raise TraceError(f"events: {name} holds {values.min()}..{values.max()}, outside 0..{most - 1}")
        rises = np.diff(self.experts_A) > 0
        rises[self.starts_N[(self.starts_N > 0) & (self.starts_N < len(self.experts_A))] - 1] = True  # another event begins
        if not rises.all():
            raise TraceError("events: the experts of an event must be distinct and ascending; build with Events.from_experts")

    def __len__(self) -> int:
        return len(self.layer_N)

    @property
    def accesses(self) -> int:
        """A, experts asked for by all events together."""
        return len(self.experts_A)

    @cached_property
    def steps(self) -> int:
        """Steps with an event."""
        return int(np.count_nonzero(np.diff(self.step_N))) + 1 if len(self) else 0

    @cached_property
    def layer_A(self) -> NDArray[np.int32]:
        """Layer row of every access."""
        return np.repeat(self.layer_N, np.diff(self.starts_N))

    @cached_property
    def load_LE(self) -> NDArray[np.int64]:
        """Accesses of every expert."""
        flat = self.layer_A.astype(np.int64) * self.experts + self.experts_A
        return np.bincount(flat, minlength=self.layers * self.experts).reshape(self.layers, self.experts)

    @classmethod
    def from_experts(
        cls, experts_TLK: NDArray[np.integer], *, experts: int, tokens_per_step: int = 1, step_T: NDArray[np.integer] | None = None
    ) -> Events:
        """Events of tokens in memory: runs of `tokens_per_step` tokens, or of equal `step_T`, are one step.

        65535 is no selection. Raises TraceError for an id outside the model. Cost: O(T·L·K) and a little per event.
        """
        from moesim.replay.kernels.gather import gather

        experts_TLK = np.asarray(experts_TLK)
        if experts_TLK.ndim != 3 or experts_TLK.shape[1] < 1 or experts_TLK.dtype.kind not in "iu":
            raise TraceError(f"routing must be whole numbers [tokens, layers, selections], got {experts_TLK.dtype} of shape {experts_TLK.shape}")
        if tokens_per_step < 1:
            raise TraceError(f"tokens_per_step(={tokens_per_step}) must be >= 1")
        tokens, layers, _ = experts_TLK.shape
        chosen = experts_TLK[experts_TLK != NO_EXPERT]
        if chosen.size and (chosen.min() < 0 or chosen.max() >= experts):
            raise TraceError(f"routing names expert {chosen.max() if chosen.max() >= experts else chosen.min()}, outside 0..{experts - 1}")
        if step_T is None:
            first_S = np.arange(0, tokens, tokens_per_step)
            number_S: NDArray[np.integer] = np.arange(len(first_S))
        else:
            if step_T.shape != (tokens,) or step_T.dtype.kind not in "iu":
                raise TraceError(f"step numbers are {step_T.dtype} of shape {step_T.shape}; give one whole number for each of {tokens} tokens")
            if (np.diff(step_T) < 0).any():
                order = np.argsort(step_T, kind="stable")
                experts_TLK, step_T = experts_TLK[order], step_T[order]
            first_S = np.flatnonzero(np.diff(step_T, prepend=-1 if not tokens else int(step_T[0]) - 1))
            number_S = step_T[first_S]
        bounds = np.append(first_S, tokens).astype(np.int64)
        flat, starts = gather(np.ascontiguousarray(experts_TLK, np.uint16), bounds, experts)
        return cls(
            experts_A=flat,
            starts_N=starts,
            layer_N=np.tile(np.arange(layers, dtype=np.int32), len(first_S)),
            step_N=np.repeat(number_S, layers),
            layers=layers,
            experts=experts,
            tokens=tokens,
        )

    @classmethod
    def of(cls, trace: Trace, *, tokens_per_step: int = 1, limit: int | None = None) -> Events:
        """Events of a trace's selected tokens in order, at most the first `limit` (a cache needs neighbours, so none are skipped)."""
        batches, taken = [], 0
        for batch in trace.batches():
            batches.append(batch.experts_TLK[: None if limit is None else limit - taken])
            taken += len(batches[-1])
            if limit is not None and taken >= limit:
                break
        return cls.from_experts(np.concatenate(batches), experts=trace.model.experts, tokens_per_step=tokens_per_step)

    def sequential(self) -> Events:
        """Every access as an event of its own, in order: plain cache replay, kept as a diagnostic."""
        times = np.diff(self.starts_N)
        return Events(
            experts_A=self.experts_A,
            starts_N=np.arange(self.accesses + 1),
            layer_N=np.repeat(self.layer_N, times),
            step_N=np.repeat(self.step_N, times),
            layers=self.layers,
            experts=self.experts,
            tokens=self.tokens,
        )

    def part(self, first: int, last: int) -> Events:
        """Events first..last-1 alone. Raises TraceError unless 0 <= first <= last <= N."""
        if not 0 <= first <= last <= len(self):
            raise TraceError(f"events {first}..{last} of {len(self)}: give 0 <= first <= last <= {len(self)}")
        lo, hi = self.starts_N[[first, last]]
        return Events(
            experts_A=self.experts_A[lo:hi],
            starts_N=self.starts_N[first : last + 1] - lo,
            layer_N=self.layer_N[first:last],
            step_N=self.step_N[first:last],
            layers=self.layers,
            experts=self.experts,
        )

    def split(self, device_LE: NDArray[np.integer], devices: int) -> tuple[Events, ...]:
        """What each of `devices` caches sees when expert (l, e) lives on `device_LE[l, e]`; all keep the same N events.

        Raises TraceError for an owner outside 0..devices-1.
        """
        if device_LE.shape != (self.layers, self.experts):
            raise TraceError(f"owners have shape {device_LE.shape}, the events {self.layers} layers x {self.experts} experts")
        if device_LE.min() < 0 or device_LE.max() >= devices:
            raise TraceError(f"owners {device_LE.min()}..{device_LE.max()} outside 0..{devices - 1}")
        owner_A = device_LE[self.layer_A, self.experts_A]
        return tuple(self.where(owner_A == device) for device in range(devices))

    def where(self, keep_A: NDArray[np.bool_]) -> Events:
        """The same N events with some of their accesses."""
        before = np.concatenate([[0], np.cumsum(keep_A)])
        return Events(
            experts_A=self.experts_A[keep_A],
            starts_N=before[self.starts_N],
            layer_N=self.layer_N,
            step_N=self.step_N,
            layers=self.layers,
            experts=self.experts,
            tokens=self.tokens,
        )
