"""Files that lie, are cut, or carry code: refused with a message, nothing run, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interop_placements import ENGINES, a_plan
from test_interop_placements import MODEL as PLACED
from test_interop_tokens import MODEL, WRITERS, random_ids

from moesim.errors import InputError
from moesim.interop import FORMATS, Wanted, check, engine, export_plan, import_loads, import_plan, import_trace


class Bomb:
    """Unpickling this makes a file: if it exists, code was run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    import torch

    marker = tmp_path / "boom"
    bomb = Bomb(marker)
    torch.save({"records": bomb, "logical_count": bomb}, tmp_path / "expert_distribution_recorder_1.pt")
    np.save(tmp_path / "b.npy", np.asarray([[bomb]], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", ids=np.asarray([bomb]), phy2log=np.asarray([bomb]), routed_experts=np.asarray([bomb]), weight=np.asarray([bomb]))
    shutil.rmtree(marker, ignore_errors=True)
    with pytest.raises(InputError, match="nothing of it was run"):
        import_loads("sglang-recorder", tmp_path)
    for name, file in (("exflow", "b.npy"), ("npz", "b.npz"), ("vllm-routed-experts", "b.npz"), ("vllm-routed-experts", "b.npy")):
        with pytest.raises(InputError, match="Python objects"):
            import_trace(name, tmp_path / file, tmp_path / "t")
    with pytest.raises(InputError, match="Python objects"):
        import_plan("eplb", tmp_path / "b.npz", model=PLACED, devices=1)
    assert not marker.exists()
    assert not (tmp_path / "t").exists()


def test_absurd_sizes_cost_nothing(tmp_path: Path) -> None:
    import torch

    def header(shape: tuple[int, ...]) -> bytes:
        text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    (tmp_path / "x.npy").write_bytes(header((2**50, 26)))
    with pytest.raises(InputError, match="but the file holds"):
        import_trace("exflow", tmp_path / "x.npy", tmp_path / "t")
    (tmp_path / "meta_info.json").write_text('{"num_experts": 16, "num_experts_per_token": 2}')
    file = tmp_path / "rank0.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="states a header of 1,152,921,504,606,846,976 bytes"):
        import_loads("tensorrt-llm-statistics", tmp_path)
    entry = json.dumps({"1_1": {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}}).encode()
    file.write_bytes(len(entry).to_bytes(8, "little") + entry)
    with pytest.raises(InputError, match="states shape"):
        import_loads("tensorrt-llm-statistics", tmp_path)
    (tmp_path / "dump").mkdir()
    torch.save({"logical_count": torch.zeros(1, dtype=torch.int64).expand(1, 2**30, 2**10)}, tmp_path / "dump/expert_distribution_recorder_1.pt")
    with pytest.raises(InputError, match="a tensor of shape"):
        import_loads("sglang-recorder", tmp_path / "dump")
    (tmp_path / "c.csv").write_text("layer,expert,count\n" + "9" * 5000 + ",1,1\n")
    with pytest.raises(InputError, match="no whole number"):
        import_loads("llama-cpp", tmp_path / "c.csv")
    (tmp_path / "n.json").write_text("[" * 200_000)
    for name in ("sglang", "vllm-ascend", "vllm-experimental"):
        with pytest.raises(InputError):
            import_plan(name, tmp_path / "n.json", model=PLACED, devices=1)
    np.savez(tmp_path / "big.npz", phy2log=np.asarray([[0, 2**31 - 2]]), logcnt=np.zeros((1, 2)))
    assert any(f.level == "fail" for f in check("eplb", tmp_path / "big.npz", Wanted(devices=1)))


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", ids=np.zeros((2**15, 8, 8), np.int64))
    np.savez_compressed(tmp_path / "real.npz", ids=random_ids(0, 2**13))
    monkeypatch.setattr("moesim.interop.opening.MAX_PACKED_B", 2**16)
    with pytest.raises(InputError, match="a zip bomb or a mistake"):
        import_trace("npz", tmp_path / "bomb.npz", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    assert import_trace("npz", tmp_path / "real.npz", tmp_path / "t").tokens == 2**13


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good file or folder of every format."""
    root = tmp_path_factory.mktemp("valid")
    made = {}
    for name, write in WRITERS.items():
        (root / name).mkdir()
        made[name] = write(root / name, random_ids(0, 12))
    for name in ENGINES:
        (root / name).mkdir()
        export_plan(name, a_plan(dispatch=engine(name, "exported").default or "even"), root / name / "p.json", model=PLACED)
        made[name] = root / name / "p.json"
    (root / "c.csv").write_text("layer,expert,count\n1,0,30\n2,15,70\n3,2,100\n")
    np.save(root / "x.npy", random_ids(0, 12)[:, :, 0])
    return made | {"llama-cpp": root / "c.csv", "exflow": root / "x.npy"}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=20)
@given(data=st.data())
def test_damage_is_refused_or_harmless(valid: dict[str, Path], name: str, data: st.DataObject) -> None:
    """Cut anywhere or flip any bytes: an InputError, or a result; never another exception, never half a trace."""
    with tempfile.TemporaryDirectory() as place:
        source = valid[name]
        copy = Path(place) / source.name
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        files = sorted(copy.rglob("*")) if copy.is_dir() else [copy]
        file = data.draw(st.sampled_from([file for file in files if file.is_file()]))
        content = bytearray(file.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(bytes(content))
        form, output = FORMATS[name], Path(place) / "out"
        for act in (
            lambda: form.tokens and import_trace(name, copy, output, model=MODEL),
            lambda: form.tokens and import_trace(name, copy, Path(place) / "bare"),
            lambda: form.loads and import_loads(name, copy),
            lambda: form.engine and import_plan(name, copy, model=PLACED, devices=4),
            lambda: check(name, copy, Wanted(model=PLACED if form.engine else MODEL, devices=4)),
        ):
            try:
                act()
            except InputError as problem:
                assert str(problem)
        assert not list(Path(place).glob(".*importing*"))


def test_nothing_there(tmp_path: Path) -> None:
    for name, form in FORMATS.items():
        (tmp_path / "empty").mkdir(exist_ok=True)
        for source in (tmp_path / "missing", tmp_path / "empty"):
            with pytest.raises(InputError, match="no such file|holds no|not a folder|cannot be read|not a readable|not valid|no such"):
                check(name, source, Wanted(model=MODEL))
            if form.tokens:
                with pytest.raises(InputError):
                    import_trace(name, source, tmp_path / "t", model=MODEL)
