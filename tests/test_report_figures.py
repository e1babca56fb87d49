"""Figures of reports: preparation of data holds its promises, names are text, drawings touch nothing global."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.report.blocks import Drawing, change, column
from moesim.report.plots import COLOURS, LIMITS, Dots, cloud, draw_cloud, draw_dots, draw_heat, heat_limit, label, log_ticks, relative
from moesim.report.svg import inline_svg
from moesim.report.text import named, percent, sentence

NBSP = "\N{NO-BREAK SPACE}"


@given(st.lists(st.lists(st.floats(0, 1e9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_relative_load_has_mean_one_in_every_row(load: list[list[float]]) -> None:
    ratio = relative(load)
    assert np.allclose(ratio.mean(axis=1), 1)
    assert (ratio >= 0).all()


@given(st.floats(0.01, 100))
def test_heat_scale_holds_the_highest_ratio_or_saturates_at_eight(ratio: float) -> None:
    limit = heat_limit([np.asarray([[1.0, ratio]])])
    assert limit in LIMITS
    assert limit == 8 or max(1.0, ratio) <= limit
    assert limit == LIMITS[0] or LIMITS[LIMITS.index(limit) - 1] < ratio


@given(st.floats(1e-7, 10), st.floats(1.05, 1e4))
def test_log_ticks_are_at_least_two_increasing_and_inside(low: float, spread: float) -> None:
    ticks = log_ticks(low, low * spread)
    assert len(ticks) >= 2
    assert all(a < b for a, b in pairwise(ticks))
    assert low * (1 - 1e-9) <= ticks[0] <= ticks[-1] <= low * spread * (1 + 1e-9)
    assert len(ticks) <= 6


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_only_the_smallest_values_are_marked_and_a_column_of_equals_has_no_best(values: list[float]) -> None:
    cells = column(values, "{:.2f}".format)
    shown = [cell.text for cell in cells]
    marked = [cell.text for cell in cells if cell.best]
    assert set(marked) <= {f"{min(values):.2f}"}
    assert bool(marked) == (len(set(shown)) > 1)
    assert len(marked) in (0, shown.count(f"{min(values):.2f}"))


@given(st.text(max_size=60))
def test_labels_are_short_printable_and_one_line(text: str) -> None:
    assert len(label(text)) <= 22
    assert label(text).isprintable()


@settings(max_examples=20, deadline=None)
@given(st.text(min_size=1, max_size=30), st.sampled_from(["$\\frac$", "<", "&", "]]>", "\x00", "日", '"']))
def test_any_name_is_text_inside_a_figure(name: str, nasty: str) -> None:
    text = nasty + name
    dots = Dots(plans=[text, "b"], parts=[text], hollow=[True], values=[[1.0, 2.0]], unit="s")
    svg = inline_svg(Drawing(caption="c", alt="alt", draw=partial(draw_dots, dots=dots)), key="k")
    root = ElementTree.fromstring(svg)
    assert {element.tag for element in root.iter()} <= {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect"}
    words = " ".join("".join(element.itertext()) for element in root.iter("text"))
    assert label(text).split() == [] or label(text).split()[0] in words


def test_percent_keeps_its_sign_its_unit_and_no_minus_zero() -> None:
    assert percent(-0.1234, signed=True) == f"−12.3{NBSP}%"
    assert percent(0.1, signed=True) == f"+10.0{NBSP}%"
    assert percent(-1e-9, signed=True) == f"0.0{NBSP}%"
    assert percent(12.0) == f"1200{NBSP}%"
    assert percent(math.nan) == "–"
    assert change(2.0, 4.0) == -0.5
    assert named("memory_B", 8e9) == ("memory", f"8.00{NBSP}GB")
    assert named("sm_clock", 3) == ("sm clock", "3")
    assert sentence("it holds.") == "It holds."


def test_cloud_encloses_every_case() -> None:
    data = cloud([("a", 1.0, 2.0), ("b", 3.0, 0.5), ("a", 1.5, 1.5)])
    assert data.points == {"a": ([2.0, 1.5], [1.0, 1.5]), "b": ([0.5], [3.0])}
    assert data.low < 0.5
    assert data.high > 3.0


def test_drawing_functions_give_back_their_axes_and_leave_global_state_alone() -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    before = dict(mpl.rcParams)
    axes = Figure().add_subplot()
    assert draw_cloud(axes, cloud=cloud([("a", 1.0, 2.0)])) is axes
    heat = partial(draw_heat, ratio_RC=np.ones((2, 2)), rows=[1, 2], xlabel="expert", limit=2.0)
    svg = inline_svg(Drawing(caption="c", alt="a & b", draw=heat), key="k7")
    assert dict(mpl.rcParams) == before
    assert svg == inline_svg(Drawing(caption="c", alt="a & b", draw=heat), key="k7")
    assert 'aria-label="a &amp; b"' in svg
    assert all(found.startswith("k7-") for found in re.findall(r'\bid="([^"]+)"', svg))
    assert set(re.findall(r"var\(--(\w+)", svg)) <= set(COLOURS.values())
    assert "#4c5560" not in re.sub(r"var\([^)]*\)", "", svg)
