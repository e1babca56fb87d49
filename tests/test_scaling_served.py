"""A scaling plan served: capacities, headroom, traffic that doubles, devices that die. Steps take a fixed time here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.hardware import load_cluster
from moesim.optimize import Status
from moesim.optimize.scale import Scaling, doubled, scale, with_failure
from moesim.serving import Arrivals, Deployment, Slo, StepLaw, generate
from moesim.serving.failures import recovery
from moesim.serving.sizes import Sizes
from tests.conftest import tiny_model

LAW = StepLaw.plain(step_s=0.05, tokens=64)
SLO = Slo(ttft_s=1.0, share=0.95)
FAILURE = (140.0, 5)


def sizes(**more: Any) -> Sizes:
    """2, 4 and 8 devices; a rank runs one request of ten steps at a time: 2 requests per second and device."""
    one = Deployment(model=tiny_model(), cluster=load_cluster("h100x8"), max_seqs=1, max_batch_tokens=64, cache_tokens=10_000, price_per_hour=2.0)
    found = Sizes.of(one, [2, 4, 8], **more)
    return replace(found, deployments=tuple(replace(each, law=LAW) for each in found.deployments))


def requests(*rates: float, each_s: float = 100.0) -> Arrivals:
    """Stretches of Poisson traffic, one after the other."""
    parts = [
        n * each_s + generate("poisson", requests_per_s=rate, span_s=each_s, prompt=8, output=10, seed=n).arrival_s_R for n, rate in enumerate(rates)
    ]
    times = np.concatenate(parts)
    return Arrivals(arrival_s_R=times, prompt_R=np.full(len(times), 8), output_R=np.full(len(times), 10))


@cache
def scaled() -> Scaling:
    found, _ = scale(requests(1.0, 13.0, 1.0), sizes(), SLO, interval_s=50.0, seed=3, failures=[FAILURE])
    assert found is not None
    return found


def test_sizes_follow_the_traffic() -> None:
    found = scaled()
    capacity = [each.requests_per_s for each in found.capacities]
    for devices, rate in zip((2, 4, 8), capacity, strict=True):
        assert 0.6 * 2 * devices < rate < 2.1 * devices  # below what the servers can do, by what randomness costs
    assert found.plan.devices_N.tolist() == [2, 2, 8, 8, 2, 2]
    assert found.served.meets_slo
    assert found.bills["optimal"].total == min(bill.total for bill in found.bills.values())
    assert found.bills["optimal"].total < found.bills["static-minimum"].total
    assert set(found.bills) >= {"optimal", "predictive", "reactive", "static-minimum"}


def test_what_if_is_worse_than_what_is() -> None:
    plan, twice, planned, _ = scaled().outlooks
    assert twice.served.attainment < plan.served.attainment
    assert twice.cost.missed > plan.cost.missed
    assert planned.served.attainment >= twice.served.attainment
    assert planned.plan.devices_N.sum() >= plan.plan.devices_N.sum()


def test_everything_is_in_the_document() -> None:
    found = scaled()
    data = found.to_dict()
    assert [row["devices"] for row in data["timeline"]] == found.plan.devices_N.tolist()
    assert data["solvers"]["optimal"]["total"] == data["plan"]["solution"]["bill"]["total"]
    assert {(each["from"], each["to"]) for each in data["transitions"]} == {(a, b) for a in (2, 4, 8) for b in (2, 4, 8) if a != b}
    assert data["currency"] == "$"
    again, _ = scale(requests(1.0, 13.0, 1.0), sizes(), SLO, interval_s=50.0, seed=3, failures=[FAILURE])
    assert again is not None
    timeless = [{**each.to_dict(), "plan": None} for each in (found, again)]
    assert timeless[0] == timeless[1]
    assert again.plan.digest == found.plan.digest


def test_no_size_can_is_a_status() -> None:
    found, solution = scale(requests(1.0), sizes(), Slo(ttft_s=1e-6), interval_s=50.0)
    assert (found, solution.status) == (None, Status.INFEASIBLE)


def test_without_a_price_device_hours_are_counted_and_said() -> None:
    given = sizes()
    unpriced = replace(given, deployments=tuple(replace(each, price_per_hour=None) for each in given.deployments))
    if unpriced.cluster.devices[0].rent_per_hour is not None:
        pytest.skip("this profile has a rent")
    found, _ = scale(requests(1.0), unpriced, SLO, interval_s=50.0)
    assert found is not None
    assert found.currency == "device-hours"
    assert found.bills["optimal"].rent == found.bills["optimal"].device_hours
    assert "device-hours" in found.notes[0]


def test_changes_longer_than_an_interval_are_refused() -> None:
    with pytest.raises(InputError, match="intervals no shorter"):
        scale(requests(1.0), sizes(), SLO, interval_s=0.5)
    for failure in ((1e4, 0), (10.0, 8)):
        with pytest.raises(InputError, match="name one of them then"):
            scale(requests(1.0), sizes(), SLO, interval_s=50.0, failures=[failure])


def test_a_death_costs_service_and_survivors_go_on() -> None:
    found = scaled()
    changes, recovered = with_failure(found.plan, found.sizes, *FAILURE)
    (death,) = [change for change in changes if change.kind == "failure"]
    assert (death.at_s, death.lost, death.to) == (140.0, (5,), recovered.deployment)
    assert death.down_s == recovered.transition.seconds > 0
    assert recovered.deployment.cluster.size == 7
    assert [change.to.cluster.size for change in changes if change.to and change.at_s > 140] == [2]
    assert found.outlooks[-1].served.attainment < found.served.attainment
    assert found.outlooks[-1].to_dict()["failures"][0]["experts_lost"] > 0
    for at_s, device in ((140.0, 8), (10.0, 2)):
        with pytest.raises(InputError, match="not in use"):
            with_failure(found.plan, found.sizes, at_s, device)


def test_a_size_that_no_longer_exists_is_served_by_survivors() -> None:
    found = scaled()
    changes, _ = with_failure(found.plan, found.sizes, 30.0, 1)
    assert [change.to.cluster.size for change in changes if change.to] == [1, 7, 2]


def test_recovery_of_the_smallest_deployment() -> None:
    left = recovery(sizes().deployment(2), 0)
    assert left.deployment.cluster.size == 1
    assert left.deployment.experts.slots_G.tolist() == [16]


def test_doubled_traffic_keeps_its_clock() -> None:
    once = requests(2.0, 5.0)
    twice = doubled(once, seed=1)
    assert len(twice) == 2 * len(once)
    assert twice.span_s == once.span_s
    np.testing.assert_allclose(twice.per_second(100.0), 2 * once.per_second(100.0), rtol=0.05)
