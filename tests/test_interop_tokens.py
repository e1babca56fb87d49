"""Other tools' tokens become traces: nothing is gained or lost, and what is left out is counted."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.errors import InputError, TraceError
from moesim.interop import FORMATS, OnlyCounts, import_loads, import_trace, load_loads
from moesim.model import ModelSpec
from moesim.trace import TraceStats, load_trace

MODEL = tiny_model()  # 4 decoder layers, the first dense; 3 MoE layers x 16 experts, top-2
Ids = NDArray[np.int64]


def random_ids(seed: int, tokens: int, width: int = 2) -> Ids:
    return np.argsort(np.random.default_rng(seed).random((tokens, 3, 16)), axis=2)[:, :, :width]


def write_safetensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """The documented form: header length, JSON header, raw little-endian bytes."""
    names = {"i4": "I32", "i8": "I64"}
    header, body = {}, b""
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": names[array.dtype.str[1:]], "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_npz(folder: Path, ids: Ids) -> Path:
    np.savez(folder / "ids.npz", ids=ids.astype(np.uint8))
    return folder / "ids.npz"


def write_sglang(folder: Path, ids: Ids) -> Path:
    """Two ranks; 18 physical slots: the map names expert (slot + 5) % 16 and two replicas."""
    import torch

    where = (np.arange(18) + 5) % 16
    physical_of = np.argsort(where[:16], kind="stable")
    for rank, part in enumerate(np.array_split(ids, 2)):
        topk = np.full((4, len(part), 8), -1, np.int32)
        topk[1:, :, :2] = physical_of[part].transpose(1, 0, 2)
        half = len(part) // 2
        records = []
        for number, rows in enumerate((slice(0, half), slice(half, None))):
            tokens = topk[:, rows]
            count = np.stack([np.bincount(layer[layer >= 0].ravel(), minlength=18) for layer in tokens])
            records.append(
                {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary", "input_ids": list(range(tokens.shape[1])),
                 "positions": list(range(tokens.shape[1])), "extend_seq_lens": [tokens.shape[1]], "forward_mode": 1 + number,
                 "topk_ids_of_layer": torch.from_numpy(tokens.copy()), "misc_objects": [], "global_physical_count": torch.from_numpy(count)}
            )  # fmt: skip
        dump = {"records": records, "last_physical_to_logical_map": torch.from_numpy(np.stack([where] * 4))}
        torch.save(dump, folder / f"expert_distribution_recorder_17.5_{rank}.pt")
    return folder


def write_vllm(folder: Path, ids: Ids) -> Path:
    half = len(ids) // 2
    np.savez(folder / "a.npz", prompt_routed_experts=ids[: half // 2].astype(np.int16), routed_experts=ids[half // 2 : half].astype(np.int16))
    tail = ids[half:].astype(np.int16)
    tokens = np.arange(len(tail) + 1)  # the last generated token was never routed
    np.savez(folder / "b.npz", request_id=np.array("r1"), prompt_token_ids=tokens[:1], output_token_ids=tokens[1:], routed_experts=tail)
    return folder


def write_megatron(folder: Path, ids: Ids) -> Path:
    for rank, part in enumerate(np.array_split(ids, 2)):
        lines = []
        for step, rows in enumerate(np.array_split(part, 2)):
            for index, layer in enumerate(MODEL.moe_layers):
                lines.append({"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank, "num_tokens": len(rows),
                              "topk": 2, "top_indices": rows[:, index].tolist(), "logit_offset": 0})  # fmt: skip
        lines.append({**lines[0], "block": "mtp", "mtp_idx": 0})
        (folder / f"router_trace_rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "logits_rank0.bin").write_bytes(b"\0" * 16)
    return folder


def write_flame(folder: Path, ids: Ids) -> Path:
    for index, layer in enumerate(MODEL.moe_layers):
        columns = {
            "scores": pa.array(np.full((len(ids), 2), 0.5, np.float16).tolist(), pa.list_(pa.float16())),
            "indices": pa.array(ids[:, index].tolist(), pa.list_(pa.int16())),
        }
        pq.write_table(pa.table(columns), folder / f"layer_{layer:02d}.parquet", row_group_size=5 + index)
    return folder


def write_moe_balance(folder: Path, ids: Ids) -> Path:
    lines = []
    for index, layer in enumerate(MODEL.moe_layers):  # layer by layer, so batches interleave
        for batch, rows in enumerate(np.array_split(ids, 3)):
            if len(rows):
                lines.append({"layer": layer, "batch_id": batch, "origin_rows": [t % 2 for t in range(len(rows))],
                              "topk_experts": rows[:, index].tolist(), "topk_weights": [[0.6, 0.4]] * len(rows), "request_id": batch,
                              "source_file": "a.npz"})  # fmt: skip
    (folder / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "routing.jsonl"


def write_esft(folder: Path, ids: Ids) -> Path:
    for index, layer in enumerate(MODEL.moe_layers):
        lines = []
        for rows in np.array_split(ids[:, index], 2):
            lines.append("\t".join(map(str, rows.ravel().tolist())) + "\t\t" + "\t".join(["0.25"] * rows.size))
        (folder / f"expert_weights_{layer}.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_tensorrt(folder: Path, ids: Ids) -> Path:
    (folder / "meta_info.json").write_text('{"num_experts": 16, "num_experts_per_token": 2}')
    for rank, part in enumerate(np.array_split(ids, 2)):
        raw = {f"{100 + step}_{layer}": rows[:, index].astype(np.int32) for step, rows in enumerate(np.array_split(part, 2))
               for index, layer in enumerate(MODEL.moe_layers)}  # fmt: skip
        write_safetensors(folder / f"rank{rank}_raw.safetensors", raw)
        write_safetensors(folder / f"rank{rank}.safetensors", {key: np.bincount(rows.ravel(), minlength=16) for key, rows in raw.items()})
    return folder


WRITERS: dict[str, Callable[[Path, Ids], Path]] = {
    "npz": write_npz, "sglang-recorder": write_sglang, "vllm-routed-experts": write_vllm, "megatron": write_megatron, "flame": write_flame,
    "moe-balance": write_moe_balance, "esft": write_esft, "tensorrt-llm-statistics": write_tensorrt,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(6, 60))
def test_every_token_and_selection_arrives_and_no_other(name: str, seed: int, tokens: int) -> None:
    ids = random_ids(seed, tokens)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "in"
        folder.mkdir()
        done = import_trace(name, WRITERS[name](folder, ids), Path(place) / "trace", model=MODEL)
        trace = load_trace(Path(place) / "trace")
        got = trace.experts()
        assert done.tokens == trace.tokens == tokens
        assert done.tally.selections == ids.size
        assert done.tally.pad_tokens == done.tally.dropped_selections == done.tally.doubled == 0
        assert sorted(map(bytes, got.astype(np.uint8))) == sorted(map(bytes, ids.astype(np.uint8)))  # as sets of tokens: ranks may be reordered
        load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=16) for layer in range(3)])
        assert np.array_equal(TraceStats.of(trace).load_LE, load)
        if FORMATS[name].loads:
            assert np.array_equal(import_loads(name, folder, model=MODEL).load_LE, load)
        bare = (
            import_trace(name, folder if name != "npz" else folder / "ids.npz", Path(place) / "bare") if name not in ("esft", "moe-balance") else done
        )
        assert bare.tokens == tokens


def test_exflow_is_top_1(tmp_path: Path) -> None:
    ids = random_ids(3, 40, width=1)
    np.save(tmp_path / "x.npy", ids[:, :, 0])
    done = import_trace("exflow", tmp_path / "x.npy", tmp_path / "t", model=tiny_model(top_k=1))
    assert np.array_equal(load_trace(tmp_path / "t").experts(), ids)
    assert done.tally.selections == 120


def test_row_groups_of_any_size_stay_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.interop.flame.CHUNK", 4)
    ids = random_ids(4, 23)
    import_trace("flame", write_flame(tmp_path, ids), tmp_path / "t", model=MODEL)
    assert np.array_equal(load_trace(tmp_path / "t").experts(), ids)


def test_columns_keep_their_meaning(tmp_path: Path) -> None:
    for name in ("sglang-recorder", "vllm-routed-experts", "megatron"):
        folder = tmp_path / name
        folder.mkdir()
        import_trace(name, WRITERS[name](folder, random_ids(0, 16)), tmp_path / f"{name}.t", model=MODEL)
    names = ("rank", "step", "phase", "sequence", "position", "token_id")
    read = {name: [b.columns for b in load_trace(tmp_path / f"{name}.t").batches(columns=names)] for name in ("sglang-recorder", "megatron")}
    for parts in read.values():
        assert np.concatenate([part["rank"] for part in parts]).tolist() == [0] * 8 + [1] * 8
        assert np.concatenate([part["step"] for part in parts]).tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert read["sglang-recorder"][0]["phase"].tolist() == ["prefill"] * 4 + ["decode"] * 4
    assert read["sglang-recorder"][0]["sequence"].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert set(read["megatron"][0]["phase"]) == {"train"}
    (vllm,) = (b.columns for b in load_trace(tmp_path / "vllm-routed-experts.t").batches(columns=names))
    assert vllm["phase"].tolist() == ["prefill"] * 4 + ["decode"] * 4 + ["prefill"] + ["decode"] * 7
    assert vllm["token_id"].tolist() == [-1] * 8 + list(range(8))
    assert vllm["position"].tolist() == [*range(8), *range(8)]


def test_physical_ids_are_mapped_and_the_reader_warned(tmp_path: Path) -> None:
    done = import_trace("sglang-recorder", write_sglang(tmp_path, random_ids(1, 12)), tmp_path / "t", model=MODEL)
    said = " ".join(done.notes)
    assert "mapped through the last map" in said
    assert "passes before the last rebalance are mapped wrongly" in said
    assert "6 of 8 selection columns are unused" in said
    with pytest.raises(TraceError, match="keeps 8 selections per token, 'tiny' makes 9"):
        import_trace("sglang-recorder", tmp_path, tmp_path / "t9", model=tiny_model(top_k=9))


def test_documented_megatron_and_moe_balance_lines(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(
        '{"step":0,"stage":"forward","block":"decoder","layer":3,"rank":0,"num_tokens":2,"topk":2,"top_indices":[[5,1],[0,7]]}\n'
    )
    import_trace("megatron", tmp_path / "m.jsonl", tmp_path / "m")
    trace = load_trace(tmp_path / "m")
    assert trace.experts().tolist() == [[[5, 1]], [[0, 7]]]
    assert trace.model.moe_layers == (3,)
    (tmp_path / "b.jsonl").write_text(
        '{"layer":0,"batch_id":12,"origin_rows":[0,1],"topk_experts":[[3,7],[7,2]],"topk_weights":[[0.6,0.4],[0.9,0.1]],"request_id":12,'
        '"source_file":"a.npz"}\n'
    )
    import_trace("moe-balance", tmp_path / "b.jsonl", tmp_path / "b")
    (first, second) = load_trace(tmp_path / "b").batches(weights=True, columns=("rank",))
    assert first.experts_TLK.tolist() == [[[3, 7]]]
    assert second.columns["rank"].tolist() == [1]
    assert np.allclose(np.asarray(second.weights_TLK, float), [[[0.9, 0.1]]], atol=1e-3)


def test_llama_cpp_counts_are_loads_and_never_a_trace(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("layer,expert,count\n# total,100\n0,1,30\n0,0,70\n1,2,100\n")
    with pytest.raises(OnlyCounts, match="counts per expert and no tokens.*--as-loads"):
        import_trace("llama-cpp", tmp_path / "c.csv", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    loads = import_loads("llama-cpp", tmp_path / "c.csv")
    assert loads.load_LE.tolist() == [[70, 30, 0], [0, 0, 100]]
    assert loads.tokens == 100
    saved = load_loads(loads.save(tmp_path / "loads.json"))
    assert np.array_equal(saved.load_LE, loads.load_LE)
    assert (saved.layers, saved.tokens, saved.notes) == (loads.layers, loads.tokens, loads.notes)
    (tmp_path / "i.csv").write_text("layer_id,expert_ids\n0,1 3\n0,1 2\n")
    assert import_loads("llama-cpp", tmp_path / "i.csv").load_LE.tolist() == [[0, 2, 1, 1]]


def test_loads_feed_eplb(tmp_path: Path) -> None:
    """The golden vector of EPLB's README, through its own input file."""
    from moesim_solvers.placement.eplb import rebalance_experts

    weight = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    np.savez(tmp_path / "w.npz", weight=np.asarray(weight, np.float32))
    slots, _, _ = rebalance_experts(import_loads("eplb", tmp_path / "w.npz").load_LE, 16, 4, 2, 8)
    assert slots[0].tolist() == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]


def test_stat_dumps_sum_to_loads_without_dense_rows(tmp_path: Path) -> None:
    import torch

    count = np.random.default_rng(0).integers(1, 9, (3, 4, 16))
    count[:, 0] = 0
    count[2] = 0
    dump = {"rank": 0, "logical_count": torch.from_numpy(count), "average_utilization_rate_over_window": None}
    torch.save(dump, tmp_path / "expert_distribution_recorder_1.0.pt")
    with pytest.raises(OnlyCounts, match="per_token"):
        import_trace("sglang-recorder", tmp_path, tmp_path / "t", model=MODEL)
    for model in (MODEL, None):
        loads = import_loads("sglang-recorder", tmp_path, model=model)
        assert loads.layers == (1, 2, 3)
        assert np.array_equal(loads.load_LE, count.sum(axis=0)[1:])
    assert "1 of 3 buffered steps are empty" in " ".join(loads.notes)


def test_physical_load_statistics_are_mapped_by_their_own_map(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(
        '{"record_type":"eplb_load_stats","version":1,"step":7,"num_ranks":2,"expert_load":[[10,1,5,2],[2,8,1,3]],"p2l_map":[[0,1,2,0],[3,2,1,0]]}\n'
        '{"record_type":"eplb_load_stats","version":1,"step":8,"num_ranks":2,"expert_load":[[1,1,1,1],[1,1,1,1]],"p2l_map":[[0,1,2,3],[0,1,2,3]]}\n'
    )
    assert import_loads("vllm-experimental", tmp_path / "s.jsonl").load_LE.tolist() == [[13, 2, 6, 1], [4, 2, 9, 3]]


@pytest.mark.parametrize(("pads", "dense"), [(4, True), (0, True), (4, False)])
def test_what_is_left_out_is_counted(tmp_path: Path, pads: int, dense: bool) -> None:
    """Pad rows of -1 go, dense layers filled with zeros go, expert 0 stays."""
    ids = np.concatenate([random_ids(5, 20), np.full((pads, 3, 2), -1)])
    if dense:
        ids = np.concatenate([np.zeros((len(ids), 1, 2), int), ids], axis=1)
    np.save(tmp_path / "r.npy", ids.astype(np.int16))
    if dense and pads:
        with pytest.raises(TraceError, match=r"layers \[0\] hold nothing but expert 0"):
            import_trace("vllm-routed-experts", tmp_path / "r.npy", tmp_path / "t")
    done = import_trace("vllm-routed-experts", tmp_path / "r.npy", tmp_path / "t", model=MODEL)
    assert done.tokens == 20
    assert done.tally.pad_tokens == pads
    assert done.tally.dropped_selections == (2 * (20 + pads) if dense else 0)
    assert any("padding" in note for note in done.notes) == bool(pads)
    assert any("were dropped" in note and "no MoE layer" in note for note in done.notes) == dense


def test_a_recorder_that_saw_nothing_is_an_error(tmp_path: Path) -> None:
    for value in (0, -1):
        np.save(tmp_path / "z.npy", np.full((10, 3, 2), value, np.int16))
        with pytest.raises(TraceError, match="nothing was recorded|no token with a selection"):
            import_trace("vllm-routed-experts", tmp_path / "z.npy", tmp_path / "t", model=MODEL)
        assert not (tmp_path / "t").exists()


def test_megatron_drops_what_is_no_second_token(tmp_path: Path) -> None:
    """Recomputed microbatches, multi-token prediction and a cut last step; pipeline stages are refused."""
    write_megatron(tmp_path, random_ids(2, 20))
    file = tmp_path / "router_trace_rank1.jsonl"
    lines = file.read_text().splitlines()[:6]
    again = lines[:3] + lines[:3] + lines[3:] + [json.dumps({**json.loads(lines[0]), "step": 9})]
    file.write_text("\n".join(again) + "\n")
    done = import_trace("megatron", tmp_path, tmp_path / "t", model=MODEL)
    assert done.tokens == 20
    said = " ".join(done.notes)
    for words in (
        "3 records of microbatches routed exactly like",
        "1 records of microbatches that lack layers",
        "1 records of multi-token-prediction",
    ):
        assert words in said
    file.write_text(lines[0] + "\n")
    with pytest.raises(TraceError, match="pipeline stages"):
        import_trace("megatron", tmp_path, tmp_path / "t2", model=MODEL)


def test_layers_must_be_those_of_the_model(tmp_path: Path) -> None:
    folder = write_flame(tmp_path, random_ids(0, 10))
    bigger = ModelSpec(name="big", layers=9, moe_layers=tuple(range(2, 9)), hidden=8, intermediate=8, experts=16, top_k=2)
    with pytest.raises(TraceError, match=r"holds layers 1..3, 'big' has MoE layers 2..8; missing \[4, 5, 6, 7, 8\]"):
        import_trace("flame", folder, tmp_path / "t", model=bigger)
    shifted = ModelSpec(name="shifted", layers=3, moe_layers=(0, 1, 2), hidden=8, intermediate=8, experts=16, top_k=2)
    done = import_trace("flame", folder, tmp_path / "s", model=shifted)
    assert "layers 1..3 of the file were taken in order for MoE layers 0..2 of 'shifted'" in done.notes
    with pytest.raises(InputError, match="give --model"):
        import_trace("esft", write_esft(tmp_path, random_ids(0, 4)), tmp_path / "e")
    with pytest.raises(InputError, match="often physical slots"):
        import_trace("flame", folder, tmp_path / "few", model=tiny_model(experts=8))
    assert not (tmp_path / "few").exists()
    assert not list(tmp_path.glob(".*importing*"))
