from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.kernel_tables import sample_counts
from moesim.cost.experts import PARAMETERS, WEIGHT_B, ComputePeak, ExpertKernel, ExpertTime, expert_time_s
from moesim.errors import InputError, ProfileError
from moesim.hardware.profile import Fitted

PEAK = ComputePeak(flops=989e12, memory_Bps=4.8e12, cache_B=50e6, units=132)
TRITON = ExpertKernel(name="triton", style="fused", dtype="bf16", tile_rows=(16, 32, 64, 128), by_tokens=(32, 96, 512))
CPU = ExpertKernel(name="cpu", style="loop", dtype="fp32", tile_rows=(16,))
# No overheads, perfect efficiency, and an overlap so sharp that only the slower of memory and compute counts.
IDEAL = ExpertKernel(
    name="ideal",
    style="fused",
    dtype="bf16",
    launch_s=0,
    token_s=0,
    memory_efficiency=1,
    activation_efficiency=1e9,
    flops_efficiency=1,
    tile_overhead=0,
    masked_rows=0,
    overlap=400,
    wave_tail=0,
    reread=0,
    tile_rows=(64,),
)
COUNTS = st.lists(st.lists(st.integers(0, 300), min_size=6, max_size=6), min_size=1, max_size=5)


def run(tokens: object, kernel: ExpertKernel = TRITON, peak: ComputePeak = PEAK, **other: object) -> ExpertTime:
    shape = {"hidden": 2048, "intermediate": 768, "gated": True, "top_k": 2} | other
    return expert_time_s(tokens, peak=peak, kernel=kernel, **shape)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.permutations(range(6)), st.sampled_from([TRITON, CPU]))
def test_experts_have_no_order(counts: list[list[int]], order: list[int], kernel: ExpertKernel) -> None:
    np.testing.assert_allclose(run(np.array(counts)[:, order], kernel).time_s_N, run(counts, kernel).time_s_N, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.sampled_from(["flops", "memory_Bps", "cache_B"]), st.floats(1, 10), st.sampled_from([TRITON, CPU]))
def test_a_better_device_is_never_slower(counts: list[list[int]], what: str, gain: float, kernel: ExpertKernel) -> None:
    better = replace(PEAK, **{what: getattr(PEAK, what) * gain})
    assert (run(counts, kernel, better).time_s_N <= run(counts, kernel).time_s_N * (1 + 1e-12)).all()


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.integers(0, 5), st.integers(1, 50))
def test_more_tokens_in_the_same_tiles_are_never_faster(counts: list[list[int]], expert: int, more: int) -> None:
    kernel = replace(TRITON, tile_rows=(64,), by_tokens=())
    busier = np.array(counts)
    busier[:, expert] += more
    assert (run(busier, kernel).time_s_N >= run(counts, kernel).time_s_N * (1 - 1e-12)).all()


@settings(max_examples=40, deadline=None)
@given(COUNTS)
def test_cases_do_not_see_each_other(counts: list[list[int]]) -> None:
    together = run(counts)
    for case, alone in enumerate(counts):
        assert run(alone).time_s_N[0] == pytest.approx(together.time_s_N[case], rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=4, max_size=4))
def test_a_loop_is_the_sum_of_its_experts_but_permutes_once(counts: list[int]) -> None:
    kernel = replace(CPU, by_tokens=(), token_s=3e-9)
    apart = sum(run([count], kernel).time_s_N[0] for count in counts)
    again = max(0, sum(count > 0 for count in counts) - 1)  # apart, every busy expert permutes and combines: four launches
    assert run(counts, kernel).time_s_N[0] == pytest.approx(apart - again * 4 * kernel.launch_s, rel=1e-12)


def test_few_tokens_cost_the_weights_of_active_experts() -> None:
    for counts, active in (([1, 0, 0, 0], 1), ([1, 1, 1, 0], 3), ([5, 5, 5, 5], 4)):
        weights_s = active * 3 * 2048 * 768 * 2 / PEAK.memory_Bps
        assert run(counts, IDEAL).time_s_N[0] == pytest.approx(weights_s, rel=1e-6)


def test_plain_experts_have_two_matrices_and_narrow_weights_fewer_bytes() -> None:
    gated = run([1, 1], IDEAL).time_s_N[0]
    assert run([1, 1], IDEAL, gated=False).time_s_N[0] == pytest.approx(gated * 2 / 3, rel=1e-6)
    for dtype, size_B in WEIGHT_B.items():
        narrow = replace(IDEAL, dtype=dtype)
        assert run([1, 1], narrow).weights_s_N[0] == pytest.approx(gated * size_B / 2, rel=1e-6)


def test_many_tokens_cost_padded_flops() -> None:
    tiles = 16 + 17  # of 64 rows: 1024 and 1025 tokens
    flops_s = tiles * 64 * 6 * 2048 * 768 / PEAK.flops
    assert run([1024, 1025], IDEAL).time_s_N[0] == pytest.approx(flops_s, rel=1e-6)


def test_an_expert_larger_than_the_cache_is_read_again_by_every_tile() -> None:
    big = {"hidden": 8192, "intermediate": 32768}
    kernel = replace(IDEAL, reread=1.0, reread_cache=0.001)
    read_once = run([64], kernel, **big).weights_s_N[0]
    assert run([256], kernel, **big).weights_s_N[0] == pytest.approx(4 * read_once, rel=1e-6)
    assert run([256], replace(kernel, reread=0.0), **big).weights_s_N[0] == pytest.approx(read_once, rel=1e-6)
    assert run([256], replace(kernel, reread_cache=1e6), **big).weights_s_N[0] == pytest.approx(read_once, rel=1e-6)


def test_a_warm_cache_only_helps_weights_that_fit() -> None:
    def gain(active: int) -> float:
        counts = [1] * active + [0] * (64 - active)
        return float(run(counts, IDEAL, warm_cache=True).weights_s_N[0] / run(counts, IDEAL).weights_s_N[0])

    assert gain(1) < 0.01  # 9 MB in a cache of 50 MB
    assert gain(64) > 0.99  # 604 MB
    assert run([0, 0], IDEAL, warm_cache=True).time_s_N[0] == 0


def test_the_soft_maximum_lies_between_maximum_and_sum() -> None:
    for overlap in (1.0, 2.0, 4.0):
        kernel = replace(IDEAL, overlap=overlap)
        found = run([100, 130], kernel)
        weights, compute = found.weights_s_N[0], found.compute_s_N[0]
        assert max(weights, compute) <= found.time_s_N[0] <= (weights + compute) * (1 + 1e-9)
    assert run([100, 130], replace(IDEAL, overlap=1.0)).time_s_N[0] == pytest.approx(weights + compute, rel=1e-6)


def test_skew_helps_few_tokens_and_hurts_many() -> None:
    def ratio(tokens: int) -> float:
        drawn = [sample_counts(experts=128, top_k=8, tokens=tokens, distribution=name) for name in ("power_law_1.2", "balanced")]
        skewed, even = (run(counts_DE, top_k=8).time_s_N.mean() for counts_DE in drawn)
        return float(skewed / even)

    assert ratio(16) < 0.8
    assert ratio(2048) > 1.1
    assert ratio(200_000) == pytest.approx(1, abs=0.05)


def test_tiles_of_a_group_walk_once() -> None:
    big = {"hidden": 8192, "intermediate": 32768}
    kernel = replace(IDEAL, reread=1.0, reread_cache=0.001, tile_groups=(1, 8), groups_by_tokens_per_expert=(256,))
    alone, few, many = (run([tokens * 2], kernel, **big).weights_s_N[0] for tokens in (32, 256, 512))
    assert few == pytest.approx(8 * alone, rel=1e-6)  # 8 tiles of 64 rows, each by itself
    assert many == pytest.approx(2 * alone, rel=1e-6)  # 16 tiles in two groups


def test_tuned_shapes_have_their_own_tiles() -> None:
    kernel = replace(IDEAL, tile_rows=(512,), tuned=(2, 768), tile_overhead=1.0, load_stall=1.0)
    for selections, rows, columns in ((11, 16, 128), (12, 32, 128), (26, 64, 128), (51, 128, 256)):
        width = (columns + 64) / (columns * 1.5)
        wanted_s = 2 * (rows * width + 1) * 6 * 2048 * 768 / PEAK.flops
        assert run([selections] * 2, kernel).compute_s_N[0] == pytest.approx(wanted_s, rel=1e-9)
    assert run([51] * 2, kernel, intermediate=769).compute_s_N[0] > 3 * run([51] * 2, kernel).compute_s_N[0]
    assert run([51] * 3, kernel).compute_s_N[0] > 3 * run([51] * 2, kernel).compute_s_N[0]


def test_short_loads_slow_all_but_the_first_tiles() -> None:
    kernel = replace(IDEAL, tile_rows=(16, 64), by_tokens=(16,))
    for tokens, slower in ((16, 1.0), (17, 1.5)):
        plain, stalled = (run([tokens, tokens], each).weights_s_N[0] for each in (kernel, replace(kernel, load_stall=0.5)))
        assert stalled == pytest.approx(slower * plain)


def test_an_empty_row_saves_its_share() -> None:
    full, half = run([[64], [32]], replace(IDEAL, masked_rows=0.4)).compute_s_N
    assert half == pytest.approx(0.8 * full)


def test_narrow_tiles_cost_more_and_wide_ones_less() -> None:
    times = [run([640, 640], replace(IDEAL, tile_columns=columns)).compute_s_N[0] for columns in (32, 64, 128, 256, 10**9)]
    assert times == sorted(times, reverse=True)
    assert times[2] == pytest.approx(1.5 * times[-1], rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "at_step", "beyond"),
    [({"by_tokens": (8,)}, 16, 18), ({"by_tokens_per_expert": (4,)}, 16, 18), ({"by_selections_per_expert": (8,)}, 16, 18)],
)
def test_the_tile_rule_steps_after_its_limit(rule: dict[str, tuple[float, ...]], at_step: int, beyond: int) -> None:
    kernel = replace(IDEAL, flops_efficiency=1e-6, tile_rows=(16, 128), **rule)
    few, many = (run([selections / 2] * 2, kernel).compute_s_N[0] for selections in (at_step, beyond))
    assert many == pytest.approx(8 * few)


def test_tokens_can_be_given_where_a_device_holds_few_of_the_chosen_experts() -> None:
    kernel = replace(IDEAL, token_s=1e-6)
    assert run([4, 4], kernel).launch_s_N[0] == pytest.approx(4e-6)
    assert run([4, 4], kernel, tokens_N=[8]).launch_s_N[0] == pytest.approx(8e-6)


def test_launches_are_paid_once_or_per_active_expert_with_four_for_the_layer_and_never_for_nothing() -> None:
    assert run([3, 0, 5], replace(IDEAL, launch_s=1e-5)).launch_s_N[0] == pytest.approx(1e-5)
    assert run([3, 0, 5], replace(IDEAL, launch_s=1e-5, style="loop")).launch_s_N[0] == pytest.approx(6e-5)
    assert run([0, 0, 0], TRITON).time_s_N[0] == 0
    assert run([0, 0, 0], CPU).time_s_N[0] == 0


def test_permuting_rows_outside_the_kernel_costs_memory_traffic() -> None:
    kernel = replace(IDEAL, activation_efficiency=1.0)
    fused, grouped = (run([500, 500], replace(kernel, style=style)).activations_s_N[0] for style in ("fused", "grouped"))
    assert grouped - fused == pytest.approx(1000 * 4 * 2048 * 2 / PEAK.memory_Bps)


def test_cases_outside_the_fitted_range_are_flagged() -> None:
    kernel = replace(TRITON, valid={"tokens": (1, 100), "hidden": (1024, 4096), "experts": (2, 64)})
    assert run([[10, 10], [300, 300]], kernel).extrapolated_N.tolist() == [False, True]
    assert run([10, 10], kernel, hidden=8192).extrapolated_N.all()
    assert run([10], kernel).extrapolated_N.all()


@pytest.mark.parametrize("bad", [[-1, 2], [np.nan, 1], [[[1.0]]], []])
def test_impossible_counts_are_refused(bad: object) -> None:
    with pytest.raises(InputError, match="finite counts"):
        run(bad)


def test_impossible_sizes_kernels_and_peaks_are_refused() -> None:
    with pytest.raises(InputError, match="hidden=0"):
        run([1], hidden=0)
    with pytest.raises(ProfileError, match="flops"):
        replace(PEAK, flops=0.0)
    for change, message in (
        ({"style": "magic"}, "styles are"),
        ({"dtype": "bf17"}, "bf17"),
        ({"memory_efficiency": 0.0}, "memory_efficiency"),
        ({"overlap": 0.5}, "overlap"),
        ({"tile_rows": (16,)}, "tile_rows"),
        ({"by_tokens_per_expert": (1,)}, "at most one rule"),
        ({"by_tokens": (96, 32, 512)}, "rising"),
        ({"masked_rows": 1.5}, "masked_rows"),
        ({"tile_groups": (1, 8)}, "tile_groups"),
        ({"tuned": (8.0,)}, "pairs"),
        ({"valid": {"colour": (0, 1)}}, "colour"),
    ):
        with pytest.raises(ProfileError, match=message):
            replace(TRITON, **change)  # type: ignore[arg-type]


def profile(**parameters: object) -> Fitted:
    return Fitted(
        kind="kernel",
        name="vllm-triton",
        attributes={"style": "fused", "dtype": "bf16"},
        parameters=parameters,
        residuals={},
        valid={"tokens": (1.0, 16384.0)},
        source="test",
        date="2026-11-22",
    )


def test_a_profile_gives_back_its_kernel() -> None:
    numbers = {name: getattr(TRITON, name) for name in PARAMETERS}
    facts = {"tile_rows": [16, 32, 64, 128], "by_tokens": [32, 96, 512], "tile_columns": 256, "tuned": [8, 14336], "masked_rows": 0.5}
    found = ExpertKernel.from_profile(profile(**numbers, **facts))
    assert found == replace(TRITON, name="vllm-triton", tile_columns=256, tuned=(8, 14336), masked_rows=0.5, valid={"tokens": (1.0, 16384.0)})
    with pytest.raises(ProfileError, match="colour"):
        ExpertKernel.from_profile(profile(**numbers, colour=1.0))
    del numbers["overlap"]
    with pytest.raises(ProfileError, match="overlap"):
        ExpertKernel.from_profile(profile(**numbers))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.floats(0, 3))
def test_a_library_copies_the_weights_of_experts_of_several_rows_first(counts: list[int], repack: float) -> None:
    """As long as memory alone counts: one pass for every active expert, `repack` more for those of more than one row."""
    fast = replace(PEAK, flops=1e30)
    loop = replace(IDEAL, style="loop", tile_rows=(1,), repack=repack)
    pass_s = (2 + 1) * 2048 * 768 * WEIGHT_B["bf16"] / PEAK.memory_Bps
    expected = sum((1 + (repack if count > 1 else 0)) * pass_s for count in counts if count)
    assert run(counts, loop, fast).time_s_N[0] == pytest.approx(expected, rel=1e-6)
    if max(counts) == 1:
        assert run(counts, loop, fast).time_s_N[0] == run(counts, replace(loop, repack=0.0), fast).time_s_N[0]
