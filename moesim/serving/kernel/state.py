"""What the batch loop reads and writes: named tuples of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Smalls = NDArray[np.int32]
NONE = -1
USERS, OLDER, NEWER = 0, 1, 2  # columns of Ranks.units_WU3
OLDEST, NEWEST, COUNT = 0, 1, 2  # columns of Ranks.unused_W3
BINS = 4096
FOREVER = np.inf
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Machine code, cached on disk, IEEE arithmetic (the same seed gives the same bytes in any process)."""
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return kernel


def inlined(function: F) -> F:
    """Like `compiled`, put into its callers: for small functions in hot loops."""
    kernel: F = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)(function)
    return kernel


class Requests(NamedTuple):
    """What comes in, and what happens to it; times are NaN until they are known."""

    arrival_R: Floats
    prompt_R: Ints
    output_R: Ints
    computed_R: Ints  # tokens whose keys and values are held
    made_R: Ints  # output tokens so far
    chunk_R: Ints  # tokens in the step under way
    blocks_R: Ints
    rank_R: Ints
    next_R: Ints  # behind it in its queue
    seen_R: Floats  # when a scheduler first looks at it
    start_R: Floats
    first_R: Floats
    end_R: Floats
    again_R: Ints  # times its cache was lost
    reused_R: Ints  # prompt tokens it found in the cache
    units_R: Ints  # units of its prompt in use from the prefix cache; `blocks_R` are beside them
    first_unit_R: Ints  # [R + 1] where its units begin in unit_A
    unit_A: Ints

    @classmethod
    def of(cls, arrival_R: Floats, prompt_R: Ints, output_R: Ints, first_unit_R: Ints, unit_A: Ints) -> Requests:
        """None begun."""
        count = len(arrival_R)

        def zeros() -> Ints:
            return np.zeros(count, np.int64)

        def unknown() -> Floats:
            return np.full(count, np.nan)

        return cls(
            arrival_R=arrival_R,
            prompt_R=prompt_R,
            output_R=output_R,
            computed_R=zeros(),
            made_R=zeros(),
            chunk_R=zeros(),
            blocks_R=zeros(),
            rank_R=zeros(),
            next_R=zeros(),
            seen_R=unknown(),
            start_R=unknown(),
            first_R=unknown(),
            end_R=unknown(),
            again_R=zeros(),
            reused_R=zeros(),
            units_R=zeros(),
            first_unit_R=first_unit_R,
            unit_A=unit_A,
        )


class Ranks(NamedTuple):
    """State of each rank; one more row is the queue all ranks share. A group's times are in the row of its first rank."""

    head_W: Ints
    tail_W: Ints
    waiting_W: Ints
    running_W: Ints
    used_W: Ints  # blocks
    batch_WS: Ints  # requests running, in the order they came
    end_W: Floats  # of the group's step; inf: idle
    ended_W: Floats  # of the step before
    done_W: Ints  # requests of the rank that were finished by that step
    steps_W: Ints  # of the group, so far
    port_W: Floats  # when the rank's outgoing hand-overs are done
    units_WU3: Smalls  # of a unit of prompts: requests that use it (-1: not held); of those nobody uses, the ones used before and after it
    unused_W3: Ints  # units nobody uses: the one unused for longest, the one used last, how many
    load_W5: Floats  # of the step: decode tokens, prompt tokens, cached tokens read, query-key pairs, tokens sampled

    @classmethod
    def of(cls, ranks: int, seqs: int, units: int) -> Ranks:
        """All idle."""

        def zeros() -> Ints:
            return np.zeros(ranks + 1, np.int64)

        return cls(
            head_W=zeros(),
            tail_W=zeros(),
            waiting_W=zeros(),
            running_W=zeros(),
            used_W=zeros(),
            batch_WS=np.zeros((ranks + 1, seqs), np.int64),
            end_W=np.full(ranks + 1, FOREVER),
            ended_W=np.full(ranks + 1, -1.0),
            done_W=zeros(),
            steps_W=zeros(),
            port_W=np.zeros(ranks + 1),
            units_WU3=np.full((ranks + 1, units, 3), NONE, np.int32),
            unused_W3=np.zeros((ranks + 1, 3), np.int64),
            load_W5=np.zeros((ranks + 1, 5)),
        )


class Stages(NamedTuple):
    """What each stage of the deployment allows, [stage, pool]."""

    ranks_Z2: Ints
    width_Z2: Ints
    seqs_Z2: Ints
    tokens_Z2: Ints
    blocks_Z2: Ints
    hand_Z2: Floats  # hand-over of a prompt: seconds, and seconds per token
    block_tokens: int
    unit_tokens: int  # of a unit of the prefix cache; 0: there is none
    shared: bool  # one queue before all ranks
    ahead: bool  # a step is scheduled while the one before it runs


class Laws(NamedTuple):
    """Seconds of a step of a group; see `steps.StepLaw`."""

    place_XT: Ints  # for each count of tokens: grid index at or below it, and the part of the way to the next
    part_XT: Floats
    dense_XT: Floats
    head_XT: Floats
    fixed_X: Floats
    context_X2: Floats  # of a cached token: in steps of decode tokens alone, in steps with prompts
    pair_X: Floats
    drawn_XHBDM3: Floats  # experts: slowest devices, mean device; exchange
    window_H: Floats


class Changes(NamedTuple):
    """Changes in time; see `changes.Change`."""

    at_C: Floats
    stage_C: Ints
    pause_C: Floats
    down_C: Floats
    slow_C: Floats
    slow_s_C: Floats
    keep_C: Bools
    restart_C: Bools
    lost_CW: Bools


class Found(NamedTuple):
    """Sums over the run."""

    series_5N: Floats  # integrals per interval: waiting, running, blocks; output and prompt tokens
    bin_s: Floats  # [1], doubles when time outgrows the intervals
    busy_s_X: Floats  # seconds a mean device of a group computed or exchanged
    steps_X: Ints
    parts_X5: Floats  # seconds of steps: host (what the devices do not hide), dense, experts, exchange, drawn out by a slow phase
    tokens_X2: Ints  # output tokens made, prompt tokens computed

    @classmethod
    def of(cls, laws: int, bin_s: float) -> Found:
        """Nothing yet."""
        return cls(
            series_5N=np.zeros((5, BINS)),
            bin_s=np.asarray([bin_s]),
            busy_s_X=np.zeros(laws),
            steps_X=np.zeros(laws, np.int64),
            parts_X5=np.zeros((laws, 5)),
            tokens_X2=np.zeros((laws, 2), np.int64),
        )
