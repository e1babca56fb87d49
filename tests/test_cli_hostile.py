"""The command line against files that mislead: names that steer a terminal, absurd numbers, outputs that are inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli.screen import MOST_LINE, line, plain, table
from moesim.errors import InputError, ProfileError, SpecError
from moesim.files import read_json, read_text
from moesim.hardware import load_cluster
from moesim.interop import load_loads
from moesim.model import ModelSpec
from moesim.trace import Trace

Run = Callable[..., tuple[int, str, str]]
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2))
objects = anything | st.dictionaries(st.text(max_size=3), anything, max_size=2)


@given(st.text())
def test_nothing_printed_steers_a_terminal(text: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in plain(text))
    assert line(text).isprintable()
    plain(text).encode()  # lone surrogates, too
    assert text.replace("\n", "").isprintable() <= (plain(text) == text)
    assert len(line(text * 100)) <= MOST_LINE + 40


def test_names_with_brackets_and_escapes_stay_names_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    table("[/x] \x1b[2J", ["[red]plan"], [["[/red]\x1b[31mx"]])
    shown = capsys.readouterr().out
    assert "[/x] \\x1b[2J" in shown
    assert "[red]plan" in shown
    assert "[/red]\\x1b[31mx" in shown
    assert "\x1b" not in shown


def test_an_error_about_a_hostile_name_is_one_line(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.json"
    path.write_text(json.dumps({f"\x1b[{i}m": 1 for i in range(5000)}))
    code, _, err = moesim("score", trace.path, path)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "\x1b" not in err
    assert "more" in err  # not 5,000 mistakes
    assert len(err) < MOST_LINE + 100


@given(st.sampled_from(sorted(CONFIG)), objects)
def test_a_config_with_any_value_anywhere_is_read_or_refused(key: str, value: Any) -> None:
    for dense in (False, True):
        try:
            spec = ModelSpec.from_hf({**CONFIG, key: value}, dense=dense)
        except SpecError:
            continue
        assert spec.layers <= 2**14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2**62}, "num_hidden_layers is '4611686018427387904'; expected a whole number"),
        ({"num_hidden_layers": 10**9}, "1,000,000,000 layers"),
        ({"hidden_size": float("inf")}, "hidden_size is 'inf'"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is '3'; expected a list"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; expected an object"),
    ],
)
def test_a_damaged_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ModelSpec.from_hf({**CONFIG, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1e999}', "non-number 1e999"),
        ('{"a": -1e999}', "non-number -1e999"),
        ('{"a": NaN}', "non-number NaN"),
        ('{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
    ],
)
def test_json_that_reads_as_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json", InputError)


def test_a_device_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(InputError, match="more than 256 MiB"):
        read_text(Path("/dev/zero"), InputError)


def test_loads_of_layer_infinity_are_refused(tmp_path: Path) -> None:
    loads = {"schema_version": 1, "kind": "loads", "moe_layers": [1.5e308], "experts": 2, "tokens": 1, "source": "x", "notes": [], "load": [[1, 2]]}
    for layer in ("1e400", "[]"):
        (tmp_path / "loads.json").write_text(json.dumps(loads).replace("1.5e+308", layer))
        with pytest.raises(InputError):
            load_loads(tmp_path / "loads.json")


def test_a_cluster_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    for count in (2**17, 10**22):
        (tmp_path / "c.toml").write_text(f'name = "c"\ntitle = "c"\n[[nodes]]\ndevice = "cpu"\ndevices = {count}\nlink = "shared-memory"\n')
        with pytest.raises(ProfileError, match="devices in all"):
            load_cluster(tmp_path / "c.toml")


def test_an_output_is_never_an_input_even_by_force(moesim: Run, trace: Trace, tmp_path: Path) -> None:
    plan, result = tmp_path / "plan.json", tmp_path / "result.json"
    assert moesim("place", trace.path, "--solver", "linear", "-o", plan)[0] == 0
    before = plan.read_bytes()
    (tmp_path / "other.json").symlink_to(plan)
    for target in (plan, tmp_path / "other.json", tmp_path / "." / "plan.json"):
        for verb in (
            ("simulate", trace.path, plan, "-o", target),
            ("simulate", trace.path, plan, "--timeline", target),
            ("export", "sglang", plan, "-o", target),
        ):
            code, _, err = moesim(*verb, "--force")
            assert code == 2
            assert "is also what is read" in err
    code, _, err = moesim("simulate", trace.path, plan, "-o", result, "--timeline", result)
    assert code == 2
    assert "is also where --output goes" in err or "is also where --timeline goes" in err
    assert plan.read_bytes() == before
    assert not result.exists()
