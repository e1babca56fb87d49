"""Cache policies and how they are found: by the entry-point group `moesim.policies`, first-party ones too.

A policy is a class made without arguments. It is either compiled (`cache(view)` gives a kernel of `replay.kernels` and its
state) or plain Python with the two hooks of `Policy`: slower, with the same meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InputError, PluginError
from moesim.plugins import made, registered

GROUP = "moesim.policies"
Made = tuple[Callable[..., None], Any]


class Event(NamedTuple):
    """What a policy sees of an event once its hits are decided: `number` counts its cache's events from 1; `experts` ascend.

    Ids are of the cache: layer·E + e when it holds all layers.
    """

    number: int
    layer: int
    step: int
    experts: tuple[int, ...]
    hits: frozenset[int]


class CacheState(NamedTuple):
    """What a policy sees of its cache: `resident` changes under its eyes; pinned experts are not in it. Sizes are slots or bytes."""

    resident: Set[int]
    used: int
    capacity: int
    layers: int
    experts: int


@runtime_checkable
class Policy(Protocol):
    """One noun, two hooks; one instance serves one cache."""

    name: str

    def admit(self, event: Event, state: CacheState) -> None:
        """Hear of an event after its hits were decided and before anything is evicted for it."""

    def victim(self, state: CacheState, protected: Set[int]) -> int | None:
        """The resident expert to give up, not a protected one; None: rather do not keep the newcomer."""


class View(NamedTuple):
    """What a compiled policy is made for: one cache of X ids."""

    feed: Any  # moesim.replay.kernels.loop.Feed
    size_X: NDArray[np.int64]
    load_X: NDArray[np.int64]
    capacity: int
    layers: int
    experts: int
    seed: int


@runtime_checkable
class Compiled(Protocol):
    """A policy whose event loop is compiled."""

    @property
    def name(self) -> str:
        """As reports call it."""

    def cache(self, view: View) -> Made:
        """(kernel, state) for one cache; the kernel has the arguments of `replay_cache`."""


def _one(size_X: NDArray[np.int64]) -> int:
    """Room for any one expert: the least that a share of a cache is."""
    return int(size_X.max(initial=1))


def _check(policy: str, **shares: float) -> None:
    if wrong := [f"{name}(={share})" for name, share in shares.items() if not 0 <= share <= 1]:
        raise InputError(f"policy {policy!r}: {wrong[0]} must be within 0..1")


@dataclass(frozen=True)
class Lru:
    """Gives up the expert whose last use is longest ago."""

    name: ClassVar[str] = "lru"

    def cache(self, view: View) -> Made:
        """One list."""
        from moesim.replay.kernels import lists, recency

        return recency.lru, lists.new_lists(len(view.size_X), 1)


@dataclass(frozen=True)
class Fifo:
    """Gives up the expert that came first."""

    name: ClassVar[str] = "fifo"

    def cache(self, view: View) -> Made:
        """One list."""
        from moesim.replay.kernels import lists, recency

        return recency.fifo, lists.new_lists(len(view.size_X), 1)


@dataclass(frozen=True)
class Lifo:
    """Gives up the expert that came last."""

    name: ClassVar[str] = "lifo"

    def cache(self, view: View) -> Made:
        """One list."""
        from moesim.replay.kernels import lists, recency

        return recency.lifo, lists.new_lists(len(view.size_X), 1)


@dataclass(frozen=True)
class Clock:
    """Gives up the expert that came first, but lets one used since then pass once (one bit; Corbato 1968)."""

    name: ClassVar[str] = "clock"

    def cache(self, view: View) -> Made:
        """One list and a bit."""
        from moesim.replay.kernels import queues

        return queues.clock, queues.new_queues(view.size_X, 1)


@dataclass(frozen=True)
class Sieve:
    """A hand goes from old to new, clears visited bits and gives up the first without (Zhang et al., NSDI 2024)."""

    name: ClassVar[str] = "sieve"

    def cache(self, view: View) -> Made:
        """One list, a bit, a hand."""
        from moesim.replay.kernels import queues

        return queues.sieve, queues.new_queues(view.size_X, 1, -1)


@dataclass(frozen=True)
class S3Fifo:
    """A small queue for newcomers, a main one for those used again, a ghost one (Yang et al., SOSP 2023)."""

    name: ClassVar[str] = "s3-fifo"
    small: float = 0.1

    def __post_init__(self) -> None:
        _check(self.name, small=self.small)

    def cache(self, view: View) -> Made:
        """The ghost remembers as much as the main queue may hold, at least one expert."""
        from moesim.replay.kernels import queues

        main = view.capacity - max(_one(view.size_X), int(self.small * view.capacity))
        return queues.s3_fifo, queues.new_queues(view.size_X, 3, main, max(main, _one(view.size_X)))


@dataclass(frozen=True)
class Arc:
    """Balances recency and frequency by what it regrets having given up (Megiddo and Modha, FAST 2003)."""

    name: ClassVar[str] = "arc"

    def cache(self, view: View) -> Made:
        """Two lists and their ghosts."""
        from moesim.replay.kernels import queues

        return queues.arc, queues.new_queues(view.size_X, 4, view.capacity, 0)


@dataclass(frozen=True)
class WTinyLfu:
    """A small window, and beyond it only what is used more than the victim (Einziger et al., ACM ToS 2017); exact counts."""

    name: ClassVar[str] = "w-tinylfu"
    window: float = 0.01
    protected: float = 0.8

    def __post_init__(self) -> None:
        _check(self.name, window=self.window, protected=self.protected)

    def cache(self, view: View) -> Made:
        """Counts are halved after ten uses per slot."""
        from moesim.replay.kernels import queues

        window = max(_one(view.size_X), int(self.window * view.capacity))
        period = 10 * max(1, view.capacity // _one(view.size_X))
        return queues.w_tinylfu, queues.new_queues(view.size_X, 3, window, self.protected * (view.capacity - window), period, 0)


@dataclass(frozen=True)
class LayerDistance:
    """In a pool of all layers, gives up experts of the layer just executed: they are needed last. LRU inside a layer."""

    name: ClassVar[str] = "layer-distance"

    def cache(self, view: View) -> Made:
        """One list per layer."""
        from moesim.replay.kernels import queues

        return queues.layer_distance, queues.new_queues(view.size_X, len(view.size_X) // view.experts, view.experts, 0)


@dataclass(frozen=True)
class Lfu:
    """Gives up the least used expert; counts outlive eviction, and of equals the least recently used goes."""

    name: ClassVar[str] = "lfu"

    def cache(self, view: View) -> Made:
        """Worth is the count."""
        from moesim.replay.kernels import counting

        return counting.lfu, counting.new_counts(len(view.size_X), view.capacity)


@dataclass(frozen=True)
class LfuAged:
    """LFU whose counts are halved every `period` steps."""

    name: ClassVar[str] = "lfu-aged"
    period: int = 256

    def __post_init__(self) -> None:
        if not self.period >= 1 or self.period != int(self.period):
            raise InputError(f"policy {self.name!r}: period(={self.period}) must be a whole number of steps >= 1")

    def cache(self, view: View) -> Made:
        """Worth is the count."""
        from moesim.replay.kernels import counting

        return counting.lfu, counting.new_counts(len(view.size_X), view.capacity, self.period * (len(view.size_X) // view.experts))


@dataclass(frozen=True)
class Lfru:
    """Gives up the expert with the fewest uses per event since its last one."""

    name: ClassVar[str] = "lfru"

    def cache(self, view: View) -> Made:
        """Count over age."""
        from moesim.replay.kernels import appraised

        return appraised.lfru, appraised.new_rates(len(view.size_X), view.capacity)


@dataclass(frozen=True)
class NextUse:
    """Gives up the expert expected back last, from which experts followed which so far in the same layer.

    `fade` had the least mean miss ratio of 0.1, 0.2 … 0.9 on the shipped `train-part` (prefill and decode; 16, 24, 32 of 64 slots).
    """

    name: ClassVar[str] = "next-use"
    fade: float = 0.2

    def __post_init__(self) -> None:
        _check(self.name, fade=self.fade)

    def cache(self, view: View) -> Made:
        """Learns as it goes."""
        from moesim.replay.kernels import appraised

        return appraised.next_use, appraised.new_chain(len(view.size_X), view.capacity, view.experts, self.fade)


@dataclass(frozen=True)
class Static:
    """Holds the hottest experts from the start and never changes; those of the replayed trace unless `load_LE` is given."""

    name: ClassVar[str] = "static"
    load_LE: NDArray[np.integer] | None = None
    pinned: ClassVar[float] = 1.0

    def cache(self, view: View) -> Made:
        """What is not pinned is streamed."""
        from moesim.replay.kernels import lists, recency

        return recency.static, lists.new_lists(1, 1)


@dataclass(frozen=True)
class PinnedLru(Lru):
    """Pins the hottest experts in a share of the room, as `static` does, and is LRU in the rest."""

    name: ClassVar[str] = "pinned-lru"
    load_LE: NDArray[np.integer] | None = None
    pinned: float = 0.5

    def __post_init__(self) -> None:
        _check(self.name, pinned=self.pinned)


@dataclass(frozen=True)
class Belady:
    """Gives up the expert needed again last (Belady 1966), among those the event does not need: the best that keeps all it loads."""

    name: ClassVar[str] = "belady"
    foresight: ClassVar[bool] = True

    def cache(self, view: View) -> Made:
        """Reads the whole trace backward first."""
        from moesim.replay.kernels import foresight

        return foresight.belady, foresight.new_future(view.feed, len(view.size_X), view.capacity)


@dataclass(frozen=True)
class Optimal:
    """Belady's rule with the choice to use an expert without keeping it: no policy loads less."""

    name: ClassVar[str] = "optimal"
    foresight: ClassVar[bool] = True

    def cache(self, view: View) -> Made:
        """Reads the whole trace backward first."""
        from moesim.replay.kernels import foresight

        return foresight.optimal, foresight.new_future(view.feed, len(view.size_X), view.capacity)


@dataclass(frozen=True)
class Lookahead:
    """Belady's rule over what is queued: the next `window` events of every layer are known, and beyond them it is LRU.

    What a system can do whose router runs before the model (Read-ME, arXiv 2410.19123). Raises InputError for a negative window.
    """

    name: ClassVar[str] = "lookahead"
    foresight: ClassVar[bool] = True
    window: int = 2

    def __post_init__(self) -> None:
        if self.window < 0:
            raise InputError(f"policy {self.name!r}: window(={self.window}) must be >= 0 steps")

    def cache(self, view: View) -> Made:
        """Events come into sight one by one."""
        from moesim.replay.kernels import lookahead

        layers = len(view.size_X) // view.experts
        return lookahead.lookahead, lookahead.new_ahead(view.feed, len(view.size_X), view.capacity, self.window * layers)


@cache
def _points() -> dict[str, EntryPoint]:  # kept: a look through all installed packages takes longer than a small replay
    return registered(GROUP, "policy")


def policies() -> list[str]:
    """Names of the registered policies, sorted."""
    return list(_points())


def load_policy(name: str) -> Policy | Compiled:
    """The policy called `name`; InputError lists the installed ones, PluginError names what is broken."""
    points = _points()
    if name not in points:
        raise InputError(f"policy {name!r} is not installed; installed: {', '.join(points)}")
    policy: Policy | Compiled = made(points[name], "policy")
    if not isinstance(policy, (Policy, Compiled)):
        raise PluginError(
            f"policy {name!r} ({points[name].value}) has neither the hooks admit and victim nor a compiled cache; see the Policy protocol"
        )
    return policy
