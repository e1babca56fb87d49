"""Arrivals: logs as they are published, broken ones, and generators that keep their promises."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.serving import Arrivals, generate, load_arrivals, lognormal
from moesim.serving.opening import open_arrivals

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:18:04,110,27\n"
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,1087,230,1317,API log\n118,ChatGPT,417,0,417,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3052, "input_length": 7322, "output_length": 490, "hash_ids": [0]}\n'
)


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# logs ----------------------------------------------------------------------------------------------


def test_azure_counts_from_its_first_request(tmp_path: Path) -> None:
    found = load_arrivals(written(tmp_path / "a.csv", AZURE))
    assert found.arrival_s_R == pytest.approx([0, 0.052, 60.02004], abs=1e-9)
    assert found.prompt_R.tolist() == [4808, 3180, 110] and found.output_R.tolist() == [10, 8, 27]
    assert found.made_from["form"] == "azure" and not found.notes


def test_azure_with_time_zones_and_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n2024-05-10 00:00:00.009930+00:00,2162,5\r\n2024-05-10 00:00:01.009930+00:00,2399,6\r\n"
    found = load_arrivals(written(tmp_path / "a.csv", text))
    assert found.arrival_s_R == pytest.approx([0, 1]) and found.output_R.tolist() == [5, 6]


def test_burstgpt_leaves_failed_requests_out_and_says_so(tmp_path: Path) -> None:
    found = load_arrivals(written(tmp_path / "b.csv", BURST))
    assert found.arrival_s_R.tolist() == [0, 40] and found.prompt_R.tolist() == [472, 1087]
    assert any("1 of 3 rows have 0" in note for note in found.notes)


def test_mooncake_is_json_lines_zipped_or_not(tmp_path: Path) -> None:
    plain = load_arrivals(written(tmp_path / "m.jsonl", MOONCAKE))
    zipped = load_arrivals(written(tmp_path / "m.jsonl.gz", gzip.compress(MOONCAKE.encode())))
    assert plain.arrival_s_R == pytest.approx([0, 3.052]) and plain.digest == zipped.digest
    assert plain.prefixes is not None and zipped.prefixes is not None


def test_requests_out_of_order_are_sorted_and_said(tmp_path: Path) -> None:
    found = load_arrivals(written(tmp_path / "r.csv", "arrival_s,input_toks,output_toks\n2.5,1,2\n0.5,3,4\n\n"))
    assert found.arrival_s_R.tolist() == [0, 2] and found.prompt_R.tolist() == [3, 1]
    assert any("sorted" in note for note in found.notes)


def test_rows_beyond_the_limit_are_not_read_and_said(tmp_path: Path) -> None:
    path = written(tmp_path / "r.csv", "arrival_s,input_toks,output_toks\n" + "1.0,2,3\n" * 50)
    found = load_arrivals(path, most=20)
    assert len(found) == 20 and any("first 20 requests" in note for note in found.notes)


def test_a_large_log_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is lost or doubled at the seams, and a bad cell beyond them is found by its line."""
    monkeypatch.setattr("moesim.serving.formats._BLOCK_B", 1000)
    count = 3000
    rows = [f"{i / 10:.1f},{i % 97 + 1},{i % 13 + 1}" for i in range(count)]
    path = written(tmp_path / "r.csv", "arrival_s,input_toks,output_toks\n" + "\n".join(rows) + "\n")
    found = load_arrivals(path)
    assert found.arrival_s_R == pytest.approx(np.arange(count) / 10) and np.array_equal(found.prompt_R, np.arange(count) % 97 + 1)
    rows[-5] = "7,many,3"
    with pytest.raises(InputError, match=f"line {count - 3}: input_toks is 'many'"):
        load_arrivals(written(path, "arrival_s,input_toks,output_toks\n" + "\n".join(rows)))


HEAD = "arrival_s,input_toks,output_toks\n"
LINE = '{"timestamp": %s, "input_length": %s, "output_length": %s}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests; it is empty"),
        (HEAD, "holds no requests"),
        (HEAD + "1,0,0\n", "all 1 rows have 0 tokens"),
        (HEAD + "1,2,3\n-1,2,3\n", "line 3: arrival_s is '-1'; expected a time >= 0"),
        (HEAD + "nan,2,3\n", "line 2: arrival_s is 'nan'"),
        (HEAD + "inf,2,3\n", "line 2: arrival_s"),
        (HEAD + "1e999,2,3\n", "line 2: arrival_s is '1e999'"),
        (HEAD + "1,1e999,3\n", "line 2: input_toks is '1e999'"),
        (HEAD + "1,2,NaN\n", "line 2: output_toks is 'NaN'"),
        ("\ufeff", "it is empty"),
        ("\ufeff" + HEAD, "holds no requests"),
        ((HEAD + "1,2,3\n").encode("utf-16"), "cannot be read"),
        (HEAD + "0,2,3\n1e30,2,3\n", "request 1 arrives at 1e\\+30 s"),
        (HEAD + "1,2\n", "line 2 has 2 cells, the header names 3"),
        (HEAD + "1,,3\n", "line 2: input_toks is ''"),
        ("arrival_s,arrival_s,input_toks,output_toks\n1,1,2,3\n", "uplicate"),
        (HEAD + "1,2.5,3\n", "line 2: input_toks is '2.5'"),
        (HEAD + "1,-2,3\n", "line 2: input_toks"),
        (HEAD + "1,99999999999,3\n", "line 2: input_toks"),
        (HEAD + "1,2,3,4,5,6,7\n1,2,3\n", "line 2 has 7 cells"),
        ("a,b,c\n1,2,3\n", "columns a, b, c are not those of a request log"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2: TIMESTAMP is 'yesterday'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01,1,1\n1500-01-01,1,2\n", "line 3: TIMESTAMP is '1500-01-01'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n9999-01-01 00:00:00,1,2\n", "line 2: TIMESTAMP is '9999-01-01"),
        (LINE % ("1e999", "1", "2"), "line 1: timestamp is 'inf'"),
        (LINE % ("Infinity", "1", "2"), "line 1: timestamp is 'inf'"),
        (LINE % ("NaN", "1", "2"), "line 1: timestamp is 'nan'"),
        (LINE % ("-5", "1", "2"), "line 1: timestamp is '-5'"),
        (LINE % ("0", "Infinity", "2"), "line 1: input_length is 'inf'"),
        (LINE % ("0", "1", "1e999"), "line 1: output_length is 'inf'"),
        (LINE % ("1" + "0" * 5000, "1", "2"), "line 1 is not JSON"),
        (LINE % ("true", "1", "2"), "line 1: timestamp is 'True'"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 2, "hash_ids": [1e999]}\n', "line 1: hash_ids"),
        ('{"timestamp": 0, "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1 is not JSON"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 2}\n{"timestamp": 5, "input_length": 1}\n', "line 2: output_length"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 2}\n[1]\n', "line 2 holds list"),
        ('{"timestamp": 0,\n', "line 1 is not JSON"),
        ('{"x": 1}\n', "columns|not those"),
        ("{" * 100_000, "line 1 is not JSON"),
        (b"\xff\xfe\x00\x01" * 10, "cannot be read"),
        (b"arrival_s,input_toks,output_toks\n1,2,3\x00\n", "NUL"),
    ],
)
def test_broken_logs_are_named_by_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_arrivals(written(tmp_path / "broken.csv", text))


def test_a_file_without_lines_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    with path.open("wb") as stream:
        stream.write(HEAD.encode())
        stream.truncate(10 * 2**30)  # a sparse file of 10 GiB
    with pytest.raises(InputError, match="longer than 8 MiB|NUL"):
        load_arrivals(path)


def test_missing_files_damaged_gzip_and_unknown_forms_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_arrivals(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="cannot be read"):
        load_arrivals(written(tmp_path / "x.csv.gz", gzip.compress(AZURE.encode())[:-20]))
    with pytest.raises(InputError, match="form 'vidur' is unknown"):
        load_arrivals(written(tmp_path / "a.csv", AZURE), form="vidur")
    with pytest.raises(InputError, match="not those of a request log"):
        load_arrivals(written(tmp_path / "a.csv", AZURE), form="burstgpt")


@given(data=st.binary(max_size=300), name=st.sampled_from(["x.csv", "x.jsonl", "x.csv.gz"]))
def test_no_bytes_do_worse_than_an_input_error(tmp_path_factory: Any, data: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("any") / name
    with pytest.raises(InputError):
        load_arrivals(written(path, data))


@given(rows=st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**5), st.integers(1, 10**4)), min_size=1, max_size=30))
def test_every_form_tells_the_same_story(tmp_path_factory: Any, rows: list[tuple[int, int, int]]) -> None:
    folder = tmp_path_factory.mktemp("forms")
    rows = sorted(rows)
    first = rows[0][0]
    lines = {
        "m.jsonl": "".join(json.dumps({"timestamp": ms - first, "input_length": p, "output_length": o}) + "\n" for ms, p, o in rows),
        "r.csv": HEAD + "".join(f"{1.7e9 + ms / 1000},{p},{o}\n" for ms, p, o in rows),
        "a.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "".join(f"{np.datetime64('2024-01-01T00:00:00.000') + np.timedelta64(ms, 'ms')},{p},{o}\n" for ms, p, o in rows),
    }
    one, two, three = (load_arrivals(written(folder / name, text)) for name, text in lines.items())
    for other in (two, three):
        assert one.arrival_s_R == pytest.approx(other.arrival_s_R, abs=1e-6) and np.array_equal(one.prompt_R, other.prompt_R)


# arrivals ------------------------------------------------------------------------------------------


def test_parts_and_factors_keep_the_requests() -> None:
    whole = Arrivals.of([0.0, 1.0, 2.0, 5.0], [1, 2, 3, 4], [5, 6, 7, 8])
    part = whole.between(1, 3)
    assert part.arrival_s_R.tolist() == [0, 1] and part.prompt_R.tolist() == [2, 3]
    assert whole.times(4).arrival_s_R.tolist() == [0, 0.25, 0.5, 1.25] and whole.times(4).notes
    assert whole.first(2).output_R.tolist() == [5, 6]
    assert whole.per_second(2.0).tolist() == [1.0, 0.5, 0.5]
    assert whole.per_second(2.0).sum() * 2 == len(whole)
    with pytest.raises(InputError, match="no request arrives"):
        whole.between(3, 4)
    with pytest.raises(InputError, match="arrives before"):
        Arrivals(arrival_s_R=np.asarray([1.0, 0.5]), prompt_R=np.asarray([1, 1]), output_R=np.asarray([1, 1]))


# generators ----------------------------------------------------------------------------------------

SPAN = 20_000.0


@pytest.mark.parametrize(
    ("process", "shape"), [("poisson", {}), ("gamma", {"cv": 3.0}), ("markov", {"burst": 8.0}), ("diurnal", {"period_s": 5000.0})]
)
def test_processes_keep_their_rate_and_their_seed(process: str, shape: dict[str, float]) -> None:
    def made(seed: int) -> Arrivals:
        return generate(process, requests_per_s=5.0, span_s=SPAN, prompt=100, output=lognormal(50), seed=seed, **shape)

    found = made(3)
    assert len(found) / SPAN == pytest.approx(5.0, rel=0.12 if process == "markov" else 0.05)
    assert found.arrival_s_R[-1] < SPAN and found.digest == made(3).digest != made(4).digest


def test_gaps_vary_as_asked() -> None:
    for process, shape, variation in (("poisson", {}, 1.0), ("gamma", {"cv": 2.5}, 2.5), ("gamma", {"cv": 0.5}, 0.5)):
        found = generate(process, requests_per_s=5.0, span_s=SPAN, prompt=1, output=1, **shape)
        assert found.summary()["gap_variation"] == pytest.approx(variation, rel=0.03)


def test_a_modulated_process_spreads_counts_as_its_theory_says() -> None:
    """Index of dispersion of counts over long windows: 1 + 2*q*(rate difference)^2*p*(1-p)/(mean rate*(sum of switch rates))."""
    quiet_s, burst_s, burst = 20.0, 5.0, 6.0
    found = generate("markov", requests_per_s=2.0, span_s=400_000.0, prompt=1, output=1, quiet_s=quiet_s, burst_s=burst_s, burst=burst)
    window = 1000.0
    counts = np.bincount((found.arrival_s_R // window).astype(int))[:-1]
    p = burst_s / (quiet_s + burst_s)
    quiet = 2.0 / (1 - p + burst * p)
    expected = 1 + 2 * (quiet * (burst - 1)) ** 2 * p * (1 - p) / (2.0 * (1 / quiet_s + 1 / burst_s))
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.15)


def test_a_day_has_its_peak_where_it_was_put() -> None:
    found = generate("diurnal", requests_per_s=3.0, span_s=86_400.0, prompt=1, output=1, swing=0.8, peak_s=54_000.0)
    hours = found.per_second(3600.0)
    assert hours[14:16].mean() == pytest.approx(3.0 * 1.8, rel=0.05) and hours[2:4].mean() == pytest.approx(3.0 * 0.2, rel=0.2)


def test_lengths_are_drawn_from_their_laws() -> None:
    log = Arrivals.of(np.arange(3.0), [10, 20, 30], [1, 2, 3])
    both = generate("poisson", requests_per_s=50, span_s=200, prompt=log, output=log)
    assert np.array_equal(both.prompt_R, both.output_R * 10)
    law = generate("poisson", requests_per_s=500, span_s=200, prompt=lognormal(300, cv=0.8), output=lognormal(50, cv=2, most=400))
    assert law.prompt_R.mean() == pytest.approx(300, rel=0.02) and law.prompt_R.std() == pytest.approx(240, rel=0.05)
    assert law.output_R.max() == 400 and law.output_R.min() >= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"process": "weibull"}, "unknown; use one of poisson"),
        ({"cv": 2.0}, "'cv' is no number of it"),
        ({"requests_per_s": 0.0}, "requests_per_s=0.0"),
        ({"span_s": float("nan")}, "span_s=nan"),
        ({"requests_per_s": 1e9}, "more than 20,000,000"),
        ({"process": "gamma", "cv": 0.0}, "cv=0.0 must be > 0"),
        ({"process": "diurnal", "swing": 2.0}, "swing=2.0"),
        ({"prompt": 0}, "lengths 0"),
        ({"requests_per_s": 1e-9}, "gave no request"),
    ],
)
def test_impossible_processes_are_refused(values: dict[str, Any], message: str) -> None:
    given = {"process": "poisson", "requests_per_s": 1.0, "span_s": 10.0, "prompt": 10, "output": 10} | values
    with pytest.raises(InputError, match=message):
        generate(given.pop("process"), **given)


def test_one_text_opens_a_file_or_a_process(tmp_path: Path) -> None:
    assert len(open_arrivals(str(written(tmp_path / "a.csv", AZURE)), seed=0)) == 3
    made = open_arrivals("gamma:rate=5,span=2min,prompt==100,output=50,cv=3", seed=1)
    assert set(made.prompt_R) == {100} and made.made_from["span_s"] == 120 and made.made_from["cv"] == 3
    for text, message in (
        ("poisson:rate=5", "span is missing"),
        ("poisson:rate", "'rate' is not understood"),
        ("gamma:rate=x,span=1,prompt=1,output=1", "x"),
    ):
        with pytest.raises(InputError, match=message):
            open_arrivals(text, seed=0)
