"""The real layer: equal to float64 in every back-end and dtype, and invariant under placement, replication and slots."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import clustered_routing, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, ValidationError
from moesim.plan import Placement, slots_per_device
from moesim.plan.placement import DISPATCH_RULES
from moesim.trace import NO_EXPERT
from moesim.validate import backends
from moesim.validate.backends import BACKENDS, expert_rows, pick_backend
from moesim.validate.layer import choose, moe_layer, routed_layer, selected_outputs, slots_layer
from moesim.validate.ranks import check_equal, in_order, run, same_output, shares
from moesim.validate.tiles import tile_rows, tile_schedule
from moesim.validate.weights import ACTIVATIONS, DTYPES, ExpertWeights, to_fp8

MODEL = tiny_model(layers=2, experts=16, top_k=2, hidden=32, intermediate=24)
LIMIT = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3, "fp8": 2e-2}  # relative to the largest output


def reference(hidden: torch.Tensor, ids: np.ndarray, gates: np.ndarray, weights: ExpertWeights) -> torch.Tensor:
    """Token by token in float64."""
    x = hidden.double()
    out = torch.zeros_like(x)
    for token in range(len(ids)):
        for expert, gate in zip(ids[token], gates[token], strict=True):
            if expert == NO_EXPERT:
                continue
            up, down = weights.expert(int(expert), torch.float64)
            wide = up @ x[token]
            if weights.gated:
                a, b = wide.chunk(2)
                wide = torch.nn.functional.silu(a) * b
            else:
                wide = torch.relu(wide) ** 2
            out[token] += float(gate) * (down @ wide)
    return out


def selections(ids: np.ndarray, gates: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = np.nonzero(ids != NO_EXPERT)
    return torch.as_tensor(ids[rows, columns].astype(np.int64)), torch.as_tensor(rows), torch.as_tensor(gates[rows, columns])


def apart(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-20))


@given(
    seed=st.integers(0, 2**31),
    backend=st.sampled_from(["loop", "grouped"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    gated=st.booleans(),
    case=st.sampled_from(["random", "one hot expert", "empty experts", "no selection"]),
)
def test_the_layer_equals_float64(seed: int, backend: str, dtype: str, gated: bool, case: str) -> None:
    if dtype == "fp8" and backend == "grouped":
        backend = "loop"  # fp8 products need a GPU; the loop widens
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((40, 8)), axis=1)[:, :2].astype(np.uint16)
    if case == "one hot expert":
        ids[:, 0], ids[:, 1] = 3, NO_EXPERT
    elif case == "empty experts":
        ids = ids % 2
        ids[:, 1] = 1 - ids[:, 0]
    elif case == "no selection":
        ids[:] = NO_EXPERT
    gates = rng.random(ids.shape).astype(np.float32)
    weights = ExpertWeights.random(experts=8, hidden=32, intermediate=16, gated=gated, dtype=DTYPES[dtype], seed=seed % 1000)
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)).to(ACTIVATIONS[dtype])
    out = moe_layer(hidden, *selections(ids, gates), weights, backend=backend)  # type: ignore[arg-type]
    truth = reference(hidden, ids, gates, weights)
    assert out.dtype == hidden.dtype
    assert apart(out, truth) <= LIMIT[dtype]
    table = torch.as_tensor(np.where(ids == NO_EXPERT, -1, ids.astype(np.int64)))
    assert apart(slots_layer(hidden, table, torch.as_tensor(gates), weights, backend=backend), truth) <= LIMIT[dtype]  # type: ignore[arg-type]


def test_the_router_chooses_the_largest_and_refuses_more_than_there_are() -> None:
    hidden, router = torch.randn(20, 16), torch.randn(6, 16)
    experts, gates = choose(hidden, router, 3)
    logits = hidden @ router.T
    assert (experts == logits.argsort(dim=1, descending=True)[:, :3]).all()
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(20))
    torch.testing.assert_close(gates[:, 0] / gates[:, 1], torch.exp(logits.gather(1, experts)[:, 0] - logits.gather(1, experts)[:, 1]))
    for wrong in (0, 7):
        with pytest.raises(InputError, match=rf"top_k\(={wrong}\) of 6 experts"):
            choose(hidden, router, wrong)
    weights = ExpertWeights.random(experts=6, hidden=16, intermediate=8)
    truth = reference(hidden, experts.numpy().astype(np.uint16), gates.numpy(), weights)
    assert apart(routed_layer(hidden, router, 3, weights), truth) < 1e-5


def random_placement(rng: np.random.Generator, devices: int = 4, dispatch: str = "even", extra: int | None = None) -> Placement:
    more = (int(rng.integers(0, 3)) if extra is None else extra) * devices
    rows = np.stack([rng.permutation(np.concatenate([np.arange(16), rng.integers(0, 16, more)])) for _ in range(2)])
    return Placement(slots_LP=rows, slots_G=slots_per_device(16 + more, devices), experts=16, layers=MODEL.moe_layers, dispatch=dispatch)


@given(seed=st.integers(0, 2**31), dispatch=st.sampled_from(DISPATCH_RULES), backend=st.sampled_from(["loop", "grouped"]))
def test_no_placement_or_replication_changes_an_output(seed: int, dispatch: str, backend: str) -> None:
    rng = np.random.default_rng(seed)
    placement = random_placement(rng, dispatch=dispatch)
    ids = clustered_routing(MODEL, 30, seed=seed % 1000)
    gates = rng.random(ids.shape).astype(np.float32)
    hidden = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    weights = ExpertWeights.random(experts=16, hidden=32, intermediate=24)
    parts = shares(placement, ids, gates, node_G=np.array([0, 0, 1, 1]))
    assert sum(len(part.slots_N) for part in parts) == ids.size
    for layer in range(2):
        whole = moe_layer(hidden, *selections(ids[:, layer], gates[:, layer]), weights)
        mine = [part for part in parts if part.layer == layer]
        outputs = [(part, run(part, hidden[part.received_R], weights.take(part.experts), backend)) for part in mine]  # type: ignore[arg-type]
        same_output(outputs, whole)
        broken = [(part, run(part, hidden[part.received_R], weights.take([(e + 1) % 16 for e in part.experts]), "loop")) for part in mine]
        with pytest.raises(ValidationError, match="moved tokens to wrong experts"):
            same_output(broken, whole)


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(["fp32", "bf16", "fp16", "fp8"]))
def test_moving_experts_changes_no_bit(seed: int, dtype: str) -> None:
    """Without replicas every expert's GEMM sees the same rows, and the sum at the source has an order of its own."""
    rng = np.random.default_rng(seed)
    ids = clustered_routing(MODEL, 30, seed=seed % 1000)
    gates = rng.random(ids.shape).astype(np.float32)
    weights = ExpertWeights.random(experts=16, hidden=32, intermediate=24, dtype=DTYPES[dtype])
    hidden = torch.randn(30, 32, generator=torch.Generator().manual_seed(seed)).to(ACTIVATIONS[dtype])
    table, gate = torch.as_tensor(ids[:, 0].astype(np.int64)), torch.as_tensor(gates[:, 0])
    whole = slots_layer(hidden, table, gate, weights)
    for _ in range(2):
        parts = [part for part in shares(random_placement(rng, extra=0), ids, gates, node_G=np.zeros(4, int)) if part.layer == 0]
        placed = in_order(parts, [weights.take(part.experts) for part in parts], hidden, gate)
        assert torch.equal(placed, whole)
        order = rng.permutation(16)
        where = torch.as_tensor(np.argsort(order))
        assert torch.equal(slots_layer(hidden, where[table], gate, weights.take(order.tolist())), whole)


def test_outputs_that_are_no_numbers_are_refused() -> None:
    whole = torch.ones(3, 4)
    broken = whole.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ValidationError, match="1 of 12 outputs are NaN or infinite"):
        check_equal(broken, whole, tolerance=1.0)
    assert check_equal(whole, whole, tolerance=0) == 0


@given(st.lists(st.integers(0, 70), min_size=1, max_size=12), st.sampled_from([1, 4, 16, 32]))
def test_tiles_cover_every_row_once_and_never_two_experts(counts: list[int], rows: int) -> None:
    found = tile_schedule(torch.tensor(counts), rows, total=sum(counts))
    used = int(found.tiles)
    assert used == sum(-(-count // rows) for count in counts)
    assert len(found.expert_M) == -(-sum(counts) // rows) + len(counts) >= used
    owner = np.repeat(np.arange(len(counts)), counts)
    seen = []
    for expert, start, end in zip(found.expert_M[:used].tolist(), found.start_M[:used].tolist(), found.end_M[:used].tolist(), strict=True):
        assert 0 < end - start <= rows
        assert (owner[start:end] == expert).all()
        seen += range(start, end)
    assert seen == list(range(sum(counts)))
    assert (found.end_M[used:] <= found.start_M[used:]).all()  # the rest computes nothing


def test_tiles_are_as_high_as_the_mean_expert_within_what_tensor_cores_take() -> None:
    assert [tile_rows(n, 8) for n in (1, 100, 128, 300, 10_000)] == [16, 16, 16, 64, 128]


def test_the_tile_schedule_computes_the_layer() -> None:
    """The kernel's walk in numpy: tile by tile, block of columns by block, block of depth by block."""
    rng = np.random.default_rng(0)
    counts = [5, 0, 37, 1]
    a, w, rows = rng.normal(size=(20, 24)), rng.normal(size=(4, 10, 24)), rng.integers(0, 20, 43)
    found = tile_schedule(torch.tensor(counts), 16, total=43)
    out = np.full((43, 10), np.nan)
    for tile in range(int(found.tiles)):
        expert, start, end = (int(x[tile]) for x in (found.expert_M, found.start_M, found.end_M))
        for column in range(0, 10, 4):
            sums = np.zeros((end - start, min(4, 10 - column)))
            for depth in range(0, 24, 16):
                sums += a[rows[start:end], depth : depth + 16] @ w[expert, column : column + 4, depth : depth + 16].T
            out[start:end, column : column + 4] = sums
    owner = np.repeat(np.arange(4), counts)
    np.testing.assert_allclose(out, np.einsum("nk,nok->no", a[rows], w[owner]))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernel_interpreted() -> None:
    script = (
        "import torch; from moesim.validate.backends import pick_backend\n"
        "assert [pick_backend('triton', device='cpu', dtype=d, gated=g) for d in (torch.float32, torch.float16) for g in (True, False)]"
        " == [('triton', ())] * 4"
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_fp8_keeps_values_to_three_bits_of_mantissa() -> None:
    values = torch.randn(5, 7, 64)
    found, scale = to_fp8(values)
    error = (found.float() * scale[..., None] - values).abs() / values.abs().amax(dim=-1, keepdim=True)
    assert float(error.max()) <= 1 / 16
    weights = ExpertWeights.random(experts=3, hidden=16, intermediate=8, dtype=DTYPES["fp8"])
    again = weights.take([2, 0])
    assert torch.equal(again.expert(0, torch.float32)[0], weights.expert(2, torch.float32)[0])
    assert weights.expert_B == 3 * 16 * 8 + 4 * (16 + 16)
    with pytest.raises(ValidationError, match="fp8 ones need both scales"):
        ExpertWeights(up=weights.up, down=weights.down, gated=True)


def test_weights_of_wrong_shape_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"expected \(2, 8, 4\)"):
        ExpertWeights(up=torch.zeros(2, 8, 8), down=torch.zeros(2, 8, 8), gated=True)


def test_a_back_end_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("loop", "grouped"):
        assert pick_backend(backend, device="cpu", dtype=torch.float32) == (backend, ())  # type: ignore[arg-type]
    used, notes = pick_backend("triton", device="cpu", dtype=torch.float32)
    assert used == "loop"
    assert "back-end triton cannot run here, loop was used" in notes[0]
    used, notes = pick_backend("grouped", device="cpu", dtype=DTYPES["fp8"])
    assert used == "loop"
    assert len(notes[0]) < 300
    monkeypatch.setattr(backends, "_grouped", lambda rows, counts, weights: backends._loop(rows, counts, weights) * 1.5)
    used, notes = pick_backend("grouped", device="cpu", dtype=torch.float32)
    assert (used, len(notes)) == ("loop", 1)
    assert "deviates from float64" in notes[0]
    monkeypatch.setattr(backends, "_grouped", lambda rows, counts, weights: torch.full((len(rows), 64), float("nan")))
    assert pick_backend("grouped", device="cpu", dtype=torch.float32)[0] == "loop"

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(backends, "_grouped", full)
    with pytest.raises(torch.OutOfMemoryError):  # no reason to use another back-end
        pick_backend("grouped", device="cpu", dtype=torch.float32)


def test_grouped_mm_constraints_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides must be whole 16 bytes: a hidden size of 63 bf16 values is refused with the remedy."""
    weights = ExpertWeights.random(experts=2, hidden=63, intermediate=16, dtype=torch.bfloat16)
    rows, counts = torch.arange(4), torch.tensor([2, 2])
    with pytest.raises(ValidationError, match="use the loop back-end"):
        expert_rows(torch.zeros(4, 63, dtype=torch.bfloat16), rows, counts, weights, "grouped")
    assert expert_rows(torch.zeros(4, 63, dtype=torch.bfloat16), rows, counts, weights, "loop").shape == (4, 63)
    even, tokens = ExpertWeights.random(experts=2, hidden=64, intermediate=16, dtype=torch.bfloat16), torch.randn(4, 64).bfloat16()
    found = expert_rows(tokens, rows, counts, even, "grouped")
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    if hasattr(torch, "_grouped_mm"):  # its name before torch 2.10
        torch.testing.assert_close(expert_rows(tokens, rows, counts, even, "grouped"), found)
        monkeypatch.delattr(torch, "_grouped_mm")
    with pytest.raises(ValidationError, match="has no grouped_mm"):
        expert_rows(tokens, rows, counts, even, "grouped")
    with pytest.raises(InputError, match=f"use one of {', '.join(BACKENDS)}"):
        expert_rows(torch.zeros(4, 63), rows, counts, weights, "magic")  # type: ignore[arg-type]


def test_selected_outputs_keep_the_order_they_are_asked_in() -> None:
    weights = ExpertWeights.random(experts=4, hidden=16, intermediate=8)
    hidden, slots = torch.randn(6, 16), torch.tensor([3, 0, 3, 1, 0, 2])
    found = selected_outputs(hidden, slots, torch.arange(6), weights)
    for token in range(6):
        alone = selected_outputs(hidden[token : token + 1], slots[token : token + 1], torch.zeros(1, dtype=torch.int64), weights)
        torch.testing.assert_close(found[token], alone[0])
