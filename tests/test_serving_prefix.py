"""Prefix cache: what prompts share is computed once, in bounded room; oracles, conservation, the log's form."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.serving import Arrivals, Prefixes, Slo, StepLaw, load_arrivals, serve
from moesim.serving.capacity import capacity
from tests.test_serving import plain, runs

UNIT = 16


def alike(prompts: list[list[int]], *, gap_s: float = 100.0, rest: int = 1, output: int = 2) -> Arrivals:
    """Requests `gap_s` apart whose prompts are these units and `rest` tokens more."""
    starts = np.concatenate([[0], np.cumsum([len(units) for units in prompts])])
    ids = np.asarray([unit for units in prompts for unit in units], np.int64)
    prefixes = Prefixes(ids_A=ids, starts_R=starts, tokens=UNIT)
    tokens = np.diff(starts) * UNIT + rest
    return Arrivals.of(gap_s * np.arange(len(prompts)), tokens, np.full(len(prompts), output), prefixes=prefixes)


def chains(rng: np.random.Generator, count: int, kinds: int) -> list[list[int]]:
    """Prompts that go on from one of `kinds` beginnings: a unit's id follows from all units before it."""
    known: dict[tuple[int, ...], int] = {}
    return [
        [known.setdefault(tuple(path[: i + 1]), len(known)) for i in range(len(path))]
        for path in (rng.integers(kinds, size=rng.integers(0, 7)).tolist() for _ in range(count))
    ]


def lru(prompts: list[list[int]], room: int, *, beside: int) -> list[int]:
    """Tokens each prompt finds when prompts come one by one: `room` units, of which a request takes `beside` for what is no unit."""
    held: list[int] = []  # oldest first
    found = []
    for units in prompts:
        hits = next((i for i, unit in enumerate(units) if unit not in held), len(units))
        found.append(hits * UNIT)
        held = [unit for unit in held if unit not in units]
        held = held[max(0, len(held) + len(units) + beside - room) :]
        held += units[::-1]  # its end is forgotten before its beginning
    return found


@given(seed=st.integers(0, 2**32 - 1), room=st.integers(9, 40), kinds=st.integers(1, 3))
def test_one_by_one_it_is_an_lru_cache(seed: int, room: int, kinds: int) -> None:
    prompts = chains(np.random.default_rng(seed), 40, kinds)
    found = serve(alike(prompts), plain(prefix_cache=True, block_tokens=UNIT, cache_tokens=room * UNIT))
    assert found.reused_R.tolist() == lru(prompts, room, beside=1)
    more = serve(alike(prompts), plain(prefix_cache=True, block_tokens=UNIT, cache_tokens=(room + 1) * UNIT))
    assert (more.reused_R >= found.reused_R).all()
    assert found.computed_prompt_tokens + found.reused_R.sum() == found.prompt_R.sum()


@given(run=runs(), seed=st.integers(0, 2**32 - 1), kinds=st.integers(1, 4))
def test_tokens_are_conserved_whatever_happens(run: tuple[Arrivals, object, list], seed: int, kinds: int) -> None:  # type: ignore[type-arg]
    rows, deployment, changes = run
    prompts = chains(np.random.default_rng(seed), len(rows), kinds)
    given_ids = alike(prompts, output=1).prefixes
    assert given_ids is not None
    rows = replace(rows, prompt_R=np.maximum(rows.prompt_R, np.diff(given_ids.starts_R) * UNIT), prefixes=given_ids)
    room = {"cache_tokens": 20 * UNIT, "prefix_cache": True}

    def sized(one: object) -> object:
        return replace(one, **room, prefill=sized(one.prefill) if one.prefill else None)  # type: ignore[attr-defined, type-var]

    changes = [replace(change, to=sized(change.to)) if change.to else change for change in changes]
    found = serve(rows, sized(deployment), changes=changes)  # type: ignore[arg-type]
    assert np.isfinite(found.end_s_R).all() and (found.series.cache_N <= 1 + 1e-9).all()
    assert found.computed_prompt_tokens + found.reused_R.sum() >= found.prompt_R.sum()
    if not found.again_R.any():
        assert found.computed_prompt_tokens + found.reused_R.sum() == found.prompt_R.sum()
        assert (found.reused_R < found.prompt_R).all()  # one token is always computed
    assert found.series.cache_N[-1] * 20 < len(rows) * 5  # nothing is held for good
    off = serve(rows, plain(4, cache_tokens=20 * UNIT))
    assert not off.reused_R.any() and any("off" in note for note in off.notes)


def test_what_requests_share_takes_room_once() -> None:
    """Eight prompts of 10 units, 9 of them alike, at once: 9 + 8*2 blocks, not 8*11."""
    prompts = [[*range(9), 100 + i] for i in range(8)]
    first = alike([list(range(9))], gap_s=0.0)
    together = alike([list(range(9)), *prompts], gap_s=1e-9)
    rows = replace(together, arrival_s_R=np.asarray([0.0] + [50.0] * 8), output_R=np.asarray([2] + [8] * 8))
    found = serve(rows, plain(prefix_cache=True, block_tokens=UNIT, cache_tokens=(9 + 8 * 2) * UNIT, max_batch_tokens=8192))
    assert len(first) == 1 and found.reused_R.tolist() == [0] + [9 * UNIT] * 8
    assert not found.again_R.any() and len(set(found.start_s_R[1:].tolist())) == 1
    alone = serve(rows, plain(block_tokens=UNIT, cache_tokens=(9 + 8 * 2) * UNIT, max_batch_tokens=8192))
    assert alone.again_R.any() or len(set(alone.start_s_R[1:].tolist())) > 1


@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(1, 4))
def test_copies_share_among_themselves_what_the_requests_do_and_nothing_else(seed: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    once = alike(chains(rng, 12, 2))
    times = rng.uniform(0, 100, 12 * copies - 3)  # the last copy is cut short
    many = once.copied(times, "many")
    assert many.prefixes is not None and once.prefixes is not None and (np.diff(many.arrival_s_R) >= 0).all()
    order = np.argsort(times, kind="stable")
    assert np.array_equal(many.prompt_R, once.prompt_R[order % 12])
    for a, b in itertools.combinations(range(len(many)), 2):
        same = shared(many.prefixes, a, b)
        assert same == (shared(once.prefixes, order[a] % 12, order[b] % 12) if order[a] // 12 == order[b] // 12 else 0)


def shared(prefixes: Prefixes, a: int, b: int) -> int:
    """Units that two prompts begin with alike."""
    one, other = (prefixes.ids_A[prefixes.starts_R[r] : prefixes.starts_R[r + 1]].tolist() for r in (a, b))
    return sum(1 for x, y in zip(one, other, strict=False) if x == y)


def test_capacity_grows_with_what_prompts_share() -> None:
    """Prompts of 40 units, 36 of them alike: with a cache they cost a tenth, and many more a second keep the limit."""
    rows = alike([[*range(36), *range(100 + 4 * i, 104 + 4 * i)] for i in range(50)], gap_s=1.0)
    law = StepLaw.plain(token_s=1e-4, tokens=8192)
    without, cached = (capacity(rows, plain(law=law, block_tokens=UNIT, prefix_cache=on), Slo(ttft_s=0.3)) for on in (False, True))
    assert cached.requests_per_s > 4 * without.requests_per_s > 0


def test_reused_tokens_take_no_time() -> None:
    """Steps cost their tokens: a prompt of 65 tokens, 64 of them known, is done after one."""
    law = plain().law
    assert law is not None
    rows = alike([[1, 2, 3, 4], [1, 2, 3, 4]], rest=1, output=1)
    found = serve(rows, plain(prefix_cache=True, block_tokens=UNIT, law=type(law).plain(token_s=1.0, tokens=8192), max_batch_tokens=8192))
    assert (found.end_s_R - found.arrival_s_R).tolist() == [65.0, 1.0]


def test_hash_ids_of_a_log_are_units_of_512_tokens(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 3]},
        {"timestamp": 2000, "input_length": 0, "output_length": 0, "hash_ids": [1]},
    ]
    path = tmp_path / "mooncake.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = load_arrivals(path)
    assert rows.prefixes is not None and rows.prefixes.tokens == 512
    assert rows.prefixes.ids_A.tolist() == [7, 3, 7, 8, 9] and rows.prefixes.starts_R.tolist() == [0, 2, 5]
    found = serve(rows, plain(prefix_cache=True))
    assert found.reused_R.tolist() == [0, 512] and found.summary()["reused_prompt_tokens"] == 512
    assert rows.first(1).prefixes.ids_A.tolist() == [7, 3] and rows.digest != replace(rows, prefixes=None).digest  # type: ignore[union-attr]
    assert rows.take(np.asarray([1]), "mine").prefixes.ids_A.tolist() == [7, 8, 9]  # type: ignore[union-attr]
    for bad in ('"x"', "[-1]", "[1.5]", "[true]", f"[{2**63}]"):
        path.write_text(f'{{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": {bad}}}')
        with pytest.raises(InputError, match="line 1: hash_ids"):
            load_arrivals(path)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="which prompts begin alike"):
        serve(Arrivals.of([0.0], [5], [5]), plain(prefix_cache=True))
    with pytest.raises(InputError, match="no whole blocks of 5"):
        serve(alike([[1], [1]]), plain(prefix_cache=True, block_tokens=5))
    with pytest.raises(InputError, match="prefix blocks of 1 prompts"):
        replace(alike([[1], [1]]), prefixes=alike([[1]]).prefixes)
    with pytest.raises(InputError, match="starts must rise"):
        Prefixes(ids_A=np.zeros(2, np.int64), starts_R=np.asarray([0, 1]), tokens=512)
