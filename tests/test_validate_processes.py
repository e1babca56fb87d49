"""One process per rank: outputs as unplaced, copies between ranks as simulated, and failures that do not hang."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError, ValidationError
from moesim.plan import Placement, slots_per_device
from moesim.trace import NO_EXPERT
from moesim.validate import processes
from moesim.validate.processes import execute_processes

SIZES: dict[str, Any] = {"hidden": 16, "intermediate": 8, "repeats": 2}


def setting(devices: int = 2, tokens: int = 21) -> tuple[Placement, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    slots = np.stack([rng.permutation(np.concatenate([np.arange(8), rng.integers(0, 8, devices)])) for _ in range(2)])
    placement = Placement(slots_LP=slots, slots_G=slots_per_device(8 + devices, devices), experts=8, layers=(1, 2))
    ids = np.stack([np.argsort(rng.random((tokens, 8)), axis=1)[:, :3] for _ in range(2)], axis=1).astype(np.uint16)
    ids[:4, 1] = NO_EXPERT
    return placement, ids, rng.random(ids.shape)


def test_two_ranks_compute_what_one_does_and_send_what_was_simulated() -> None:
    placement, ids, gates = setting()
    found = execute_processes(placement, 1, ids, gates, **SIZES)
    assert found["copies_equal_simulated"]
    assert found["transport"] == "gloo"
    assert found["deviation"] < 1e-5
    assert len(found["per_rank"]) == 2
    assert all(rank[name] > 0 for rank in found["per_rank"] for name in ("dispatch_s", "compute_s", "combine_s"))
    copies = np.array(found["copies"])
    assert copies.sum() <= 2 * (len(ids) - 4)  # a token goes at most once to each rank
    assert np.array(found["bytes"]).sum() == (copies.sum() - np.trace(copies)) * 16 * 4


def test_a_rank_that_fails_or_dies_is_named_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    placement, ids, gates = setting()
    with pytest.raises(ValidationError, match=r"rank [01] failed: InputError: back-end 'magic'"):
        execute_processes(placement, 0, ids, gates, backend="magic", **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="did not answer within"):
        execute_processes(placement, 0, ids, gates, patience_s=0.2, **SIZES)
    import multiprocessing

    assert multiprocessing.active_children() == []


def test_another_count_than_the_simulators_cannot_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    placement, ids, gates = setting()
    answer = {"copies": [0, 0], "deviation": 0.0, "dispatch_s": 0.0, "compute_s": 0.0, "combine_s": 0.0}
    monkeypatch.setattr(processes, "_spawn", lambda world, job, patience_s: dict.fromkeys(range(world), answer))
    with pytest.raises(ValidationError, match=r"rank 0 sent 0 token copies to rank 0, the simulator says"):
        execute_processes(placement, 0, ids, gates, **SIZES)


def test_gpus_that_are_not_there_are_said() -> None:
    placement, ids, gates = setting()
    with pytest.raises(InputError, match="2 ranks need as many GPUs, torch sees"):
        execute_processes(placement, 0, ids, gates, device="cuda", **SIZES)
