"""serve(): conservation on random runs, closed forms on small ones, changes while serving."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost.attention import kv_token_B
from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.serving import Arrivals, Change, Deployment, ServingResult, Slo, StepLaw, first_devices, serve

MODEL = load_model("deepseek-v2-lite")
H100 = load_cluster("h100x8")
STEP = 1 / 64  # s; sums of it are exact


def plain(devices: int = 1, **values: Any) -> Deployment:
    """Ranks whose every step takes 1/64 s."""
    law = StepLaw.plain(step_s=STEP, tokens=devices * 8192)
    values = {"max_batch_tokens": 8192, "cache_tokens": 1 << 20, "law": law} | values
    return Deployment(model=MODEL, cluster=first_devices(H100, devices), **values)


def arrivals(*rows: tuple[float, int, int]) -> Arrivals:
    return Arrivals.of(*zip(*rows, strict=True))


def steps(seconds: Any) -> Any:
    """Seconds as steps."""
    return np.asarray(seconds) / STEP


# conservation --------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> tuple[Arrivals, Deployment, list[Change]]:
    """Small runs with little cache, so that requests are sent back; sometimes changed on the way."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 60))
    rows = Arrivals.of(rng.uniform(0, draw(st.sampled_from([0.1, 2.0])), count), rng.integers(1, 60, count), rng.integers(1, 40, count))
    shape = {
        "replicas": draw(st.integers(1, 3)),
        "max_seqs": draw(st.integers(1, 8)),
        "max_batch_tokens": draw(st.integers(1, 64)),
        "block_tokens": draw(st.sampled_from([1, 4, 16])),
        "cache_tokens": draw(st.integers(112, 400)),
        "ahead": draw(st.booleans()),
        "balance": draw(st.sampled_from(["least-loaded", "shared"])),
    }
    law = StepLaw.plain(step_s=1e-3, token_s=1e-4, tokens=8 * 64)
    separate = draw(st.booleans())

    def sized(devices: int) -> Deployment:
        ahead_of = plain(draw(st.integers(1, 2)), **shape, law=law) if separate else None
        return plain(devices, **shape, law=law, prefill=ahead_of)

    changes = [
        Change(
            at_s=at,
            to=sized(draw(st.sampled_from([1, 2, 4]))) if draw(st.booleans()) else None,
            pause_s=draw(st.sampled_from([0.0, 0.1])),
            down_s=draw(st.sampled_from([0.0, 0.05])),
            slow=2.0,
            slow_s=draw(st.sampled_from([0.0, 0.2])),
            lost=draw(st.sampled_from([(), (0,)])),
            keep_cache=draw(st.booleans()),
            restart=not separate and draw(st.booleans()),
        )
        for at in sorted(draw(st.lists(st.floats(0, 3), max_size=3)))
    ]
    return rows, sized(draw(st.sampled_from([1, 2, 4]))), changes


@given(run=runs())
def test_requests_tokens_and_time_are_conserved(run: tuple[Arrivals, Deployment, list[Change]]) -> None:
    rows, deployment, changes = run
    found = serve(rows, deployment, changes=changes)
    assert np.isfinite(found.end_s_R).all()
    assert (found.arrival_s_R <= found.start_s_R).all() and (found.start_s_R < found.first_s_R).all() and (found.first_s_R <= found.end_s_R).all()
    assert ((found.first_s_R == found.end_s_R) == (found.output_R == 1)).all()
    series, bin_s = found.series, found.series.bin_s
    assert (series.waiting_N + series.running_N).sum() * bin_s == pytest.approx(found.latency_s_R.sum(), rel=1e-9)  # Little's law
    assert series.output_tokens_per_s_N.sum() * bin_s == pytest.approx(found.output_R.sum() + found.lost_output_tokens, rel=1e-9)
    assert not found.lost_output_tokens or any(change.restart for change in changes)
    assert series.prompt_tokens_per_s_N.sum() * bin_s == pytest.approx(found.computed_prompt_tokens, rel=1e-9)
    assert found.computed_prompt_tokens >= found.prompt_R.sum()
    if not found.again_R.any():
        assert found.computed_prompt_tokens == found.prompt_R.sum()
    assert (series.cache_N <= 1 + 1e-9).all()


@given(run=runs(), seed=st.integers(0, 5))
def test_time_has_no_unit(run: tuple[Arrivals, Deployment, list[Change]], seed: int) -> None:
    """Everything twice as slow, arrivals included, is the same run at half speed, exactly."""
    rows, deployment, _ = run

    def slowed(one: Deployment) -> Deployment:
        law = StepLaw.plain(step_s=2e-3, token_s=2e-4, tokens=8 * 64)
        hand_over = {"hand_over_Bps": 1e30} if one.prefill else {}
        return replace(one, law=law, prefill=slowed(one.prefill) if one.prefill else None, **hand_over)

    if deployment.prefill:
        return
    once = serve(rows, deployment, seed=seed)
    twice = serve(replace(rows, arrival_s_R=rows.arrival_s_R * 2), slowed(deployment), seed=seed)
    assert np.array_equal(once.end_s_R * 2, twice.end_s_R) and np.array_equal(once.again_R, twice.again_R)


SCRIPT = """
import numpy as np
from moesim.files import digest
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.serving import Arrivals, Deployment, first_devices, serve
from dataclasses import replace
model = replace(load_model("olmoe-1b-7b"), moe_layers=(0, 1))
rng = np.random.default_rng(0)
rows = Arrivals.of(rng.uniform(0, 5, 400), rng.integers(1, 500, 400), rng.integers(1, 50, 400))
found = serve(rows, Deployment(model=model, cluster=first_devices(load_cluster("h100x8"), 4), max_batch_tokens=512), seed=3)
print(digest(found.end_s_R.tobytes(), found.first_s_R.tobytes(), found.series.waiting_N.tobytes()))
"""


def test_same_seed_same_bytes_in_any_process() -> None:
    other = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    here: dict[str, Any] = {"print": lambda text: here.setdefault("said", f"{text}\n")}
    exec(SCRIPT, here)
    assert here["said"] == other


# closed forms --------------------------------------------------------------------------------------


def test_one_request_takes_its_chunks_and_its_tokens() -> None:
    found = serve(arrivals((0.5, 100, 7)), plain(max_batch_tokens=30))
    assert steps(found.ttft_s_R) == 4 and steps(found.latency_s_R) == 4 + 6 and found.tpot_s_R == STEP
    assert found.steps == 10


def test_decoding_goes_before_prompts() -> None:
    """The second prompt gets what the budget leaves: 3 tokens a step beside one decoding request."""
    found = serve(arrivals((0, 4, 50), (STEP, 12, 1)), plain(max_batch_tokens=4))
    assert steps(found.first_s_R).tolist() == [1, 1 + 4]
    assert found.tpot_s_R[0] == STEP


def test_no_more_requests_run_than_allowed() -> None:
    found = serve(arrivals(*[(0, 1, 4)] * 6), plain(max_seqs=2))
    assert sorted(steps(found.end_s_R).tolist()) == [4, 4, 8, 8, 12, 12]
    assert found.series.running_N.max() == pytest.approx(2)


def test_replicas_share_the_requests() -> None:
    found = serve(arrivals(*[(0, 1, 4)] * 6), plain(max_seqs=1, replicas=3))
    assert sorted(steps(found.end_s_R).tolist()) == [4, 4, 4, 8, 8, 8]


def test_the_youngest_request_is_sent_back_for_lack_of_cache() -> None:
    """Two requests of 8 + 8 tokens in a cache of 24: both run until 24 are held, then the second computes again."""
    found = serve(arrivals((0, 8, 8), (0, 8, 8)), plain(cache_tokens=24, block_tokens=1))
    assert found.again_R.tolist() == [0, 1]
    assert steps(found.end_s_R[0]) == 8
    assert found.computed_prompt_tokens == 24
    # held after step n: 2*(8 + n - 1); the step that needs a 25th block is the 6th: 5 tokens made, 3 left from step 9 on
    assert steps(found.end_s_R[1]) == 8 + 3


def test_too_long_a_request_is_refused_and_said() -> None:
    found = serve(arrivals((0, 8, 8), (0, 80, 8)), plain(cache_tokens=32))
    assert found.refused == 1 and np.isnan(found.end_s_R[1]) and found.attainment == 0.5
    assert any("1 of 2 requests exceed" in note for note in found.notes)
    with pytest.raises(InputError, match="no request fits"):
        serve(arrivals((0, 80, 8)), plain(cache_tokens=32))


def test_scheduled_ahead_a_request_waits_one_step_more() -> None:
    rows = arrivals((0, 1, 20), (2.5 * STEP, 1, 1))
    now, ahead = (serve(rows, plain(ahead=flag)) for flag in (False, True))
    assert steps(now.seen_s_R[1]) == steps(ahead.seen_s_R[1]) == 3
    assert steps(now.first_s_R[1]) == 4 and steps(ahead.first_s_R[1]) == 5
    assert now.first_s_R[0] == ahead.first_s_R[0]  # an idle engine begins at once


def test_scheduled_ahead_the_longer_of_host_and_devices_counts() -> None:
    """Of 10 steps the first finds an idle engine; the host's part is 1/64 s, the devices' of a token so many of them."""
    for devices in (0.25, 3.0):
        law = StepLaw.plain(step_s=STEP, token_s=devices * STEP, tokens=8192)
        now, ahead = (serve(arrivals((0, 1, 10)), plain(law=law, ahead=flag)) for flag in (False, True))
        assert steps(now.end_s) == pytest.approx(10 * (1 + devices)) and steps(ahead.end_s) == pytest.approx(1 + devices + 9 * max(1, devices))
        assert ahead.step_parts_s["host"] == pytest.approx((1 + 9 * max(0, 1 - devices)) * STEP)


def test_cached_tokens_may_cost_more_in_steps_with_prompts() -> None:
    """One request decodes with 100, 101, … cached tokens; in the step that takes the other's prompt each costs as much more as the law says."""
    rows, at = arrivals((0, 100, 40), (10 * STEP, 50, 1)), 12
    law = replace(StepLaw.plain(step_s=STEP, tokens=8192), context_s=0.0, mixed_s=STEP / 128)
    found, alone = (serve(each, plain(law=law)) for each in (rows, rows.first(1)))
    assert steps(alone.end_s) == pytest.approx(40)
    assert steps(found.end_s_R[0]) == pytest.approx(40 + (100 + at - 2) / 128, abs=1 / 100)


def test_scheduled_ahead_a_free_place_is_known_one_step_later() -> None:
    rows = arrivals((0, 1, 3), (0, 1, 3), (0, 1, 1))
    assert steps(serve(rows, plain(max_seqs=2)).first_s_R[2]) == 4
    rows = arrivals((0, 1, 9), (0, 1, 3), (0, 1, 1))
    assert steps(serve(rows, plain(max_seqs=2, ahead=True)).first_s_R[2]) == 5


def test_ranks_of_an_instance_step_together_and_idle_ones_run_along() -> None:
    """Experts take 1 ms a token of the whole group, a token of an idle rank included."""
    grid = np.asarray([1, 1024])
    table = np.zeros((1, 2, 2, 1)) + grid[:, None] * 1e-3
    none = np.zeros_like(table)
    law = replace(StepLaw.plain(tokens=1024), grid_B=grid, compute_s_HMBD=table, busy_s_HMBD=table, exchange_s_HMBD=none)
    alone = serve(arrivals((0, 1, 2)), plain(4, law=law))
    assert alone.end_s_R[0] == pytest.approx(2 * 4e-3)
    both = serve(arrivals((0, 100, 2), (0, 1, 2)), plain(4, law=law))
    assert both.first_s_R == pytest.approx([0.103, 0.103])  # the short prompt waits for the long one on another rank


def test_a_prompt_is_handed_over_at_the_speed_of_the_fabric() -> None:
    rate = kv_token_B(MODEL) * MODEL.layers * 1000  # a thousand tokens a second
    ahead_of = plain()
    found = serve(arrivals((0, 500, 2), (0, 500, 2)), plain(prefill=ahead_of, hand_over_Bps=rate))
    latency = ahead_of.cluster.intra_G[0].latency_s
    assert found.first_s_R == pytest.approx([STEP, STEP])
    assert found.end_s_R == pytest.approx([STEP + 0.5 + latency + STEP, STEP + 1.0 + latency + STEP])  # one port, one after the other
    assert found.device_s == pytest.approx(2 * found.span_s)


def test_slo_counts_every_limit() -> None:
    rows = arrivals((0, 1, 5), (0, 1, 1), (0, 8192, 5))
    found = serve(rows, plain(max_seqs=2), slo=Slo(ttft_s=1.5 * STEP, tpot_s=STEP, share=0.6))
    assert found.met_R.tolist() == [True, True, False] and found.meets_slo
    assert not replace(found, slo=Slo(ttft_s=1.5 * STEP, share=0.7)).meets_slo
    assert found.summary()["goodput_per_s"] == pytest.approx(2 / found.span_s)


def test_result_is_json_and_prices_devices() -> None:
    found = serve(arrivals((0, 10, 5), (1.0, 10, 5)), plain(price_per_hour=3600.0))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["kind"] == "serving" and data["summary"]["cost"] == pytest.approx(found.span_s)
    assert data["inputs"]["arrivals"] and len(data["requests"]["end_s"]) == 2
    assert serve(arrivals((0, 10, 5)), plain()).cost is None


# changes -------------------------------------------------------------------------------------------


def many(count: int = 40, output: int = 64) -> Arrivals:
    return arrivals(*[(0, 1, output)] * count)


def served(changes: list[Change], rows: Arrivals | None = None, **values: Any) -> ServingResult:
    return serve(rows or many(), plain(2, **({"max_seqs": 32} | values)), changes=changes)


def test_nothing_changes_without_changes() -> None:
    assert np.array_equal(served([]).end_s_R, served([Change(at_s=0.1)]).end_s_R)


def test_a_pause_stops_intake_and_nothing_else() -> None:
    found = served([Change(at_s=0.0, pause_s=10 * STEP)], arrivals((0, 1, 64), (2 * STEP, 1, 4)))
    assert steps(found.start_s_R).tolist() == [10, 10]
    found = served([Change(at_s=STEP, pause_s=10 * STEP)], arrivals((0, 1, 64), (2 * STEP, 1, 4)), max_seqs=8)
    assert steps(found.end_s_R[0]) == 64 and steps(found.start_s_R[1]) == 11


def test_down_and_slow_phases_shift_the_steps() -> None:
    assert steps(served([Change(at_s=4 * STEP, down_s=100 * STEP)]).end_s_R).max() == 64 + 100
    assert steps(served([Change(at_s=4 * STEP, slow=3.0, slow_s=6 * STEP)]).end_s_R).max() == 64 + 2 * 2
    assert served([Change(at_s=4 * STEP, slow=3.0, slow_s=6 * STEP)]).step_parts_s["slow"] == pytest.approx(4 * STEP)


def test_growing_serves_the_queue_sooner() -> None:
    rows = many(64)
    stays, grows = (served(changes, rows, max_seqs=8) for changes in ([], [Change(at_s=STEP, to=plain(4, max_seqs=8))]))
    assert steps(stays.end_s).tolist() == 64 * 4
    assert steps(grows.end_s).tolist() == pytest.approx(64 * 2, abs=2)
    assert grows.device_s == pytest.approx(2 * STEP + 4 * (grows.end_s - STEP))


def test_shrinking_hands_requests_on_with_or_without_their_cache() -> None:
    smaller = plain(1, max_seqs=64)
    kept, lost = (served([Change(at_s=10 * STEP, to=smaller, keep_cache=keep)]) for keep in (True, False))
    assert kept.again_R.sum() == 0 and lost.again_R.sum() == 20
    assert steps(kept.end_s_R).max() <= 65 and kept.computed_prompt_tokens == 40 and lost.computed_prompt_tokens == 60


def test_a_restart_begins_again_what_was_under_way() -> None:
    """Ten steps are done and a half, then five pass without any: every request takes its 64 steps from there, as if it had just come."""
    rows = arrivals((0, 1, 64), (0, 1, 64), (0, 1, 64))
    found = served([Change(at_s=10.5 * STEP, down_s=5 * STEP, restart=True)], rows, max_seqs=2)
    assert found.lost_output_tokens == 3 * 10 and found.again_R.tolist() == [1, 1, 1]
    assert steps(found.end_s_R) == pytest.approx([15.5 + 64] * 3) and steps(found.first_s_R) == pytest.approx([16.5] * 3)
    assert steps(found.start_s_R).tolist() == [0, 0, 0] and any("restarts lost 30 output tokens" in note for note in found.notes)
    kept = served([Change(at_s=10.5 * STEP, down_s=5 * STEP)], rows, max_seqs=2)
    assert not kept.lost_output_tokens and (kept.end_s_R < found.end_s_R).all()


def test_a_restart_is_the_same_run_once_more_whoever_was_waiting() -> None:
    """The younger of two was sent back for lack of cache before the restart: what it had made is lost all the same."""
    rows, small = arrivals((0, 16, 40), (0, 16, 40)), plain(max_seqs=2, block_tokens=4, cache_tokens=64)
    once = serve(rows, small)
    assert once.again_R.tolist() == [0, 1]
    again = serve(rows, small, changes=[Change(at_s=30.5 * STEP, restart=True)])
    assert np.array_equal(again.end_s_R, once.end_s_R + 30.5 * STEP) and np.array_equal(again.first_s_R, once.first_s_R + 30.5 * STEP)
    assert 30 < again.lost_output_tokens < 2 * 30


def test_a_restart_of_separate_instances_is_refused() -> None:
    with pytest.raises(InputError, match="restart of instances with separate prefill"):
        serve(many(), plain(prefill=plain()), changes=[Change(at_s=1, restart=True)])


def test_a_lost_rank_computes_again_what_it_held() -> None:
    found = served([Change(at_s=10.5 * STEP, lost=(1,), kind="failure")])
    assert found.again_R.sum() == 20 and np.isfinite(found.end_s_R).all()
    assert found.changes[0]["kind"] == "failure"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([Change(at_s=2), Change(at_s=1)], "not in the order"),
        ([Change(at_s=1, lost=(9,))], "beyond the 2"),
        ([Change(at_s=1, to=plain(prefill=plain()))], "separate prefill"),
        ([Change(at_s=1, to=replace(plain(), model=load_model("olmoe-1b-7b")))], "model"),
    ],
)
def test_impossible_changes_are_named(changes: list[Change], message: str) -> None:
    with pytest.raises(InputError, match=message):
        served(changes)


@pytest.mark.parametrize(
    "values", [{"at_s": -1}, {"at_s": float("nan")}, {"at_s": 0, "slow": 0}, {"at_s": 0, "lost": (-1,)}, {"at_s": 0, "down_s": float("inf")}]
)
def test_impossible_numbers_of_a_change_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Change(**values)
