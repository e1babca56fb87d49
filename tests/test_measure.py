"""One command that measures everything a GPU is needed for: in pieces, kept as they end. Tried on this CPU, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesim.demo import measure as gpu
from moesim.errors import ValidationError
from moesim.validate.score import rescore_file


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_plan_is_as_wide_as_promised() -> None:
    full = gpu.FULL
    assert len(gpu.MODELS) >= 2
    assert full.domains >= 3
    assert full.placements >= 8
    assert full.shrink == 1
    assert set(full.per_rank) >= {1, 256, 1024, 16384}


def test_one_command_measures_everything_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.toml").write_text('name = "two"\ntitle = "two"\n[[nodes]]\ndevice = "cpu"\ndevices = 2\nlink = "shared-memory"\n')
    size = gpu.Size(domains=1, placements=3, per_rank=(8,), cluster=str(tmp_path / "two.toml"), experts=8, shrink=64, steps=1, loads=4, repeats=3,
                    solver_s=0.2, cache_tokens=8, new_tokens=2)  # fmt: skip
    out = tmp_path / "measured"
    monkeypatch.setattr(gpu, "MODELS", ("qwen3-30b-a3b",))
    arguments = ["--device", "cpu", "--out", str(out)]
    assert gpu.main([*arguments, "--minutes", "0"], size=size) == 0
    assert "run the same command again" in capsys.readouterr().out
    assert gpu.main(arguments, size=size) == 0
    (path,) = out.glob("*.json")
    assert not rescore_file(path)["worse"]
    found = json.loads(path.read_text())["validation"]
    assert [one["kind"] for one in found["executions"]] == ["cache", "migration", "processes", "in a model"]
    assert all(one["predicted_s"] > 0 and one["measured_s"] > 0 for one in found["executions"][:3])
    assert "hot together" in {case["plan"] for case in found["cases"]}
    assert not (out / ".unfinished").exists()


def test_what_fails_after_the_ranks_takes_nothing_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing piece is named in the file and tried again; the others are kept."""
    (tmp_path / "two.toml").write_text('name = "two"\ntitle = "two"\n[[nodes]]\ndevice = "cpu"\ndevices = 2\nlink = "shared-memory"\n')
    size = gpu.Size(domains=1, placements=2, per_rank=(8,), cluster=str(tmp_path / "two.toml"), experts=8, shrink=64, steps=1, loads=4, repeats=2,
                    solver_s=0.2, cache_tokens=4, new_tokens=2)  # fmt: skip
    monkeypatch.setattr(gpu, "MODELS", ("qwen3-30b-a3b",))
    out, right, calls = tmp_path / "measured", gpu._Run.executions, []

    def pieces(self: Any, *arguments: Any) -> Any:
        def counted() -> list[dict[str, Any]]:
            calls.append("cache")
            return [{"kind": "cache"}]

        def broken() -> list[dict[str, Any]]:
            calls.append("model")
            if calls.count("model") == 1:
                raise ValidationError("other tokens")
            return [{"kind": "in a model"}]

        assert set(right(self, *arguments)) == {"cache", "migration", "processes", "in a model"}
        return {"cache": counted, "in a model": broken}

    monkeypatch.setattr(gpu._Run, "executions", pieces)
    arguments = ["--device", "cpu", "--out", str(out)]
    assert gpu.main(arguments, size=size) == 1
    assert "in a model failed: other tokens" in capsys.readouterr().out
    (path,) = out.glob("*.json")
    found = json.loads(path.read_text())["validation"]
    assert [one["kind"] for one in found["executions"]] == ["cache"]
    assert any("other tokens" in note for note in found["notes"])
    assert gpu.main(arguments, size=size) == 0
    assert calls == ["cache", "model", "model"]
    assert [one["kind"] for one in json.loads(path.read_text())["validation"]["executions"]] == ["cache", "in a model"]
