"""The traces in traces/: whole, of every domain and phase, routing that specialised; and the program that makes them."""

from __future__ import annotations

import hashlib
import json
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moesim.demo import shipped
from moesim.demo.manpages import page_files, plain
from moesim.errors import InputError
from moesim.trace import NO_EXPERT, Trace, drift_bits, load_trace

HOME = Path(__file__).resolve().parent.parent / "traces" / "qwen3-moe-8x64"
TRAINED = ("train-part", "held-out")
COLUMNS = ("step", "sequence", "position", "token_id", "phase", "domain")
Read = tuple[NDArray[np.uint16], NDArray[np.float16], dict[str, NDArray[Any]]]


def read(name: str) -> Read:
    batches = list(load_trace(HOME / name).batches(weights=True, columns=COLUMNS))
    columns = {key: np.concatenate([batch.columns[key] for batch in batches]) for key in COLUMNS}
    weights = [batch.weights_TLK for batch in batches if batch.weights_TLK is not None]
    return np.concatenate([batch.experts_TLK for batch in batches]), np.concatenate(weights), columns


@pytest.fixture(scope="module")
def traces() -> dict[str, Read]:
    return {name: read(name) for name in ("training", *TRAINED)}


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return dict(json.loads((HOME / "run.json").read_text()))


def test_they_are_small_enough_for_a_repository() -> None:
    files = [path for path in HOME.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 10**6
    assert len(files) <= 20


@pytest.mark.parametrize("name", ["training", *TRAINED])
def test_parts_are_the_ones_their_manifest_names(name: str) -> None:
    manifest = json.loads((HOME / name / "manifest.json").read_text())
    parts = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in (HOME / name).glob("part-*")}
    assert parts == manifest["parts"]
    assert manifest["rows"] == load_trace(HOME / name).tokens


@pytest.mark.parametrize("name", ["training", *TRAINED])
def test_every_token_chose_four_different_experts_with_weights_that_sum_to_one(traces: dict[str, Read], name: str) -> None:
    ids, weights, _ = traces[name]
    model = load_trace(HOME / name).model
    assert (len(model.moe_layers), model.experts, model.top_k) == (8, 64, 4)
    assert ids.shape == weights.shape
    assert ids.max() < 64 < NO_EXPERT
    assert (np.diff(np.sort(ids, axis=2), axis=2) > 0).all()
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.astype(np.float64).sum(axis=2), 1, atol=3e-3)


@pytest.mark.parametrize("name", ["training", *TRAINED])
def test_sequences_are_whole_windows_of_one_domain(traces: dict[str, Read], name: str) -> None:
    columns = traces[name][2]
    for sequence in np.unique(columns["sequence"]):
        here = columns["sequence"] == sequence
        assert columns["position"][here].tolist() == list(range(256))
        assert len(np.unique(columns["domain"][here])) == 1


def test_every_domain_is_there_in_every_phase(traces: dict[str, Read], run: dict[str, Any]) -> None:
    assert set(run["corpus"]) == set(shipped.DOMAINS)
    for name in TRAINED:
        columns = traces[name][2]
        for domain in shipped.DOMAINS:
            for phase, least in (("prefill", 2000), ("decode", 1000)):
                assert ((columns["domain"] == domain) & (columns["phase"] == phase)).sum() >= least
    columns = traces["training"][2]
    assert set(columns["phase"]) == {"train"}
    firsts = shipped.snapshot_steps(run["steps"])
    assert np.unique(columns["step"]).tolist() == sorted(step + i for step in firsts for i in (0, 1))
    for step in firsts:
        assert set(columns["domain"][columns["step"] == step]) == set(shipped.DOMAINS)


def test_tokens_are_bytes_of_the_domain_they_are_labelled_with(traces: dict[str, Read]) -> None:
    beyond_ascii = {"python": (0, 0.02), "english": (0, 0.02), "german": (0.005, 0.1), "french": (0.01, 0.15), "russian": (0.5, 0.95)}
    for ids, _, columns in traces.values():
        for domain, (low, high) in (beyond_ascii | {"japanese": (0.5, 0.95), "chinese": (0.4, 0.95), "cpp": (0, 0.02)}).items():
            text = columns["token_id"][(columns["domain"] == domain) & (columns["phase"] != "decode")]
            assert low <= (text > 127).mean() <= high, domain
        assert len(ids) == len(columns["token_id"])


def load(ids_TLK: NDArray[np.uint16]) -> NDArray[np.int64]:
    return np.stack([np.bincount(ids_TLK[:, layer].ravel(), minlength=64) for layer in range(ids_TLK.shape[1])])


@pytest.mark.parametrize("name", TRAINED)
def test_every_pair_of_domains_is_routed_differently_beyond_noise(traces: dict[str, Read], name: str) -> None:
    """Permutation test: noise is the divergence when the sequences of two domains change places at random, 99 times."""
    ids, _, columns = traces[name]
    rng = np.random.default_rng(0)
    loads: dict[str, NDArray[np.int64]] = {}
    for domain in shipped.DOMAINS:
        sequences = [ids[columns["sequence"] == s] for s in np.unique(columns["sequence"][columns["domain"] == domain])]
        loads[domain] = np.stack([load(sequence) for sequence in sequences])
    between = []
    for a, b in combinations(loads.values(), 2):
        pool, half = np.concatenate([a, b]), len(a)
        mixed = [pool[rng.permutation(len(pool))] for _ in range(99)]
        noise = [drift_bits(m[:half].sum(axis=0), m[half:].sum(axis=0)).mean() for m in mixed]
        between.append(drift_bits(a.sum(axis=0), b.sum(axis=0)).mean())
        assert between[-1] > max(noise)
    assert np.mean(between) > 0.15


def test_routing_drifts_early_and_settles_late(traces: dict[str, Read], run: dict[str, Any]) -> None:
    ids, _, columns = traces["training"]
    loads = [load(ids[np.isin(columns["step"], (step, step + 1))]) for step in shipped.snapshot_steps(run["steps"])]
    drift = [drift_bits(a, b).mean() for a, b in pairwise(loads)]
    assert max(drift[:7]) > 3 * drift[-1]


def test_the_model_learnt(run: dict[str, Any]) -> None:
    losses, after = run["loss_nats_per_byte"], run["trained_model_loss_nats_per_byte"]
    assert len(losses) == run["steps"]
    assert losses[0] == pytest.approx(np.log(256), abs=0.2)
    assert np.mean(losses[-50:]) < 0.35 * losses[0]
    assert np.mean(list(after["held-out"].values())) < 0.45 * losses[0]


# --- the program --------------------------------------------------------------------------------------------------


def test_roff_becomes_prose() -> None:
    page = r""".\" a comment
.TH LS 1
.SH NAME
ls \- list \fBdirectory\fR contents
.nf
int code(void);
.fi
.BR printf (3)
.B "two words"
.PP
It\(aqs 5\ m\" trailing"""
    assert plain(page) == "NAME\nls - list directory contents\nprintf(3)\ntwo words\nIt's 5 m\n"


def test_a_missing_package_is_named() -> None:
    with pytest.raises(InputError, match="apt-get install manpages-klingon"):
        page_files("manpages-klingon")


def test_held_out_documents_are_never_trained_on(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 40)
    domain = shipped.Domain(documents=lambda: list(tmp_path.iterdir()), read=Path.read_text, source=lambda: "made up")
    train, held_out = (set(bytes(part).decode().replace("\n", "").split("document ")) for part in shipped.split_documents(domain))
    assert len(held_out - {""}) == 10
    assert not (train & held_out) - {""}


def tiny(seed: int) -> Any:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(vocab_size=256, num_experts=8, num_experts_per_tok=2, head_dim=8, output_router_logits=True, dtype="float32", **sizes)
    return Qwen3MoeForCausalLM(config)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(shipped, "build_model", tiny)
    monkeypatch.setattr(shipped, "CHECKPOINT_EVERY", 3)
    monkeypatch.setattr(shipped, "SNAPSHOTS", (0, 4))
    texts = {"a": np.frombuffer(b"one and two " * 90, np.uint8), "b": np.frombuffer(b"7,8,9;" * 200, np.uint8)}
    for work in ("whole", "killed"):
        (tmp_path / work).mkdir()
    whole = shipped.train(texts, tmp_path / "whole", steps=9, seed=0)[1]

    rate = shipped.learning_rate
    monkeypatch.setattr(shipped, "learning_rate", lambda step, steps: 1 / 0 if step == 5 else rate(step, steps))
    with pytest.raises(ZeroDivisionError):
        shipped.train(texts, tmp_path / "killed", steps=9, seed=0)
    monkeypatch.setattr(shipped, "learning_rate", rate)
    assert shipped.train(texts, tmp_path / "killed", steps=9, seed=0)[1] == whole
    traces: list[Trace] = []
    for work in ("whole", "killed"):
        shipped.join_snapshots(tmp_path / work, tmp_path / work / "training", 9)
        traces.append(load_trace(tmp_path / work / "training"))
    np.testing.assert_array_equal(traces[0].experts(), traces[1].experts())
    steps = np.concatenate([batch.columns["step"] for batch in traces[0].batches(columns=("step",))])
    assert np.unique(steps).tolist() == [0, 1, 4, 5, 7, 8]
    with pytest.raises(InputError, match="belongs to a run of 9 steps"):
        shipped.train(texts, tmp_path / "whole", steps=10, seed=0)
