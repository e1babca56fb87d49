"""Routing transforms: what is dropped, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.systems.transforms import Capacity, TopP, top_p, within_capacity
from moesim.testing import clustered_routing
from moesim.trace import NO_EXPERT


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.1, 3), st.integers(0, 9))
def test_no_expert_takes_more_than_its_capacity_and_none_is_dropped_while_there_is_room(one: int, two: int, factor: float, seed: int) -> None:
    model = tiny_model(layers=2, experts=8, top_k=2)
    ids = clustered_routing(model, one + two, seed=seed)
    kept = within_capacity(ids, np.array([one, one + two]), 8, factor)
    for begin, end in ((0, one), (one, one + two)):
        room = int(np.ceil(factor * (end - begin) * 2 / 8))
        for layer in range(2):
            asked = np.bincount(ids[begin:end, layer].ravel(), minlength=8)
            taken = np.bincount(kept[begin:end, layer].ravel(), minlength=NO_EXPERT + 1)[:8]
            np.testing.assert_array_equal(taken, np.minimum(asked, room))
    assert ((kept == ids) | (kept == NO_EXPERT)).all()


def test_late_tokens_and_second_choices_are_dropped_first() -> None:
    ids = np.zeros((8, 1, 2), np.uint16)
    ids[:, 0, 1] = 1
    ids[4:, 0] = ids[4:, 0, ::-1]  # the later half wants expert 1 first
    kept = within_capacity(ids, np.array([8]), 4, 1.0)  # room for four each
    assert (kept[:, 0, 0] != NO_EXPERT).all()
    assert (kept[:, 0, 1] == NO_EXPERT).all()
    rates = np.mean(within_capacity(np.zeros((100, 1, 1), np.uint16), np.array([100]), 2, 1.0)[:, 0, 0].reshape(4, 25) == NO_EXPERT, axis=1)
    assert rates.tolist() == [0, 0, 1, 1]


def test_capacity_for_everybody_drops_nothing() -> None:
    ids = clustered_routing(tiny_model(layers=2, experts=8, top_k=2), 50)
    np.testing.assert_array_equal(within_capacity(ids, np.array([20, 50]), 8, 8.0), ids)


@given(st.integers(1, 6), st.floats(0.05, 1), st.integers(0, 99))
def test_top_p_uses_the_fewest_choices_that_reach_the_share(width: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(width), size=(5, 2))
    ids = np.broadcast_to(np.arange(width, dtype=np.uint16), weights.shape)
    used = top_p(ids, weights, share) != NO_EXPERT
    reached = np.where(used, weights, 0).sum(axis=2)
    assert (reached >= share - 1e-6).all()
    lightest = np.where(used, weights, np.inf).min(axis=2)
    assert ((reached - lightest < share) | (used.sum(axis=2) == 1)).all()
    assert (np.where(used, np.inf, weights).min(axis=2) >= 0).all()
    assert (np.where(used, 0, weights).max(axis=2) <= lightest + 1e-12).all()


def test_a_smaller_share_never_uses_more() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(8), size=(200, 3))
    ids = np.broadcast_to(np.arange(8, dtype=np.uint16), weights.shape)
    sizes = [(top_p(ids, weights, share) != NO_EXPERT).sum() for share in (0.2, 0.5, 0.9, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == ids.size


def test_impossible_settings_and_weights_are_refused() -> None:
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="capacity factor"):
            Capacity(factor=wrong)
        with pytest.raises(InputError, match="top-p share"):
            TopP(share=wrong)
    with pytest.raises(InputError, match="weights >= 0"):
        top_p(np.zeros((1, 1, 2), np.uint16), np.array([[[0.5, -0.1]]]), 0.5)
