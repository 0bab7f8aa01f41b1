"""Numbers, tokens, the rows of results and the table in the terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mi_jax.report import terminal_table
from mi_jax.report.figures import figures, meets
from mi_jax.report.text import crop, number, running_text, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.97215, "0.972"),
        (0, "0"),
        (0.0, "0"),
        (-12.34, "−12.3"),
        (3.14159, "3.14"),
        (512.4, "512"),
        (1234567.0, "1,234,567"),
        (0.00012, "1.2×10⁻⁴"),
        (True, "yes"),
        ("eap-ig", "eap-ig"),
        (None, "n/a"),
        (float("nan"), "n/a"),
        (float("inf"), "n/a"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@given(st.text(max_size=12))
def test_no_token_is_invisible(token):
    shown = visible(token)
    assert shown
    assert shown == shown.strip(" ")
    assert not any(ord(c) < 32 for c in shown)


def test_running_text_highlights_by_activation_and_escapes():
    text = running_text([" the", "<b>", "\n", " end"], [0.0, 2.0, 4.0, float("nan")], 4.0, focus=2)
    assert text == (
        ' the<wbr><b style="--a:0.50" data-tip="activation 2.00">&lt;b&gt;</b>'
        '<wbr><b class="focus" style="--a:1.00" data-tip="activation 4.00">⏎</b> end'
    )


@given(st.lists(st.text(max_size=9), min_size=1, max_size=40), st.integers(0, 39))
def test_crop_keeps_the_focus_and_the_alignment(tokens, focus):
    focus = min(focus, len(tokens) - 1)
    cut = crop({"tokens": tokens, "activations": list(range(len(tokens))), "focus": focus}, before=10, after=5)
    assert cut["tokens"][cut["focus"]] == tokens[focus]
    assert cut["activations"][cut["focus"]] == focus
    assert [tokens[i] for i in cut["activations"]] == cut["tokens"]
    assert sum(map(len, cut["tokens"])) <= 15 + len(tokens[focus])


def test_rows_take_up_their_siblings():
    rows = figures(
        {
            "a.x": 0.9,
            "b.y": 1,
            "a.x_null": 0.5,
            "a.x_ci_low": 0.8,
            "a.x_ci_high": 0.95,
            "a.lone_null": 0.1,
            "seconds": 3.0,
        }
    )
    assert [(r.group, r.name, r.value) for r in rows] == [
        ("a", "x", 0.9),
        ("a", "lone_null", 0.1),
        ("b", "y", 1),
        ("run", "seconds", 3.0),
    ]
    assert (rows[0].null, rows[0].low, rows[0].high) == (0.5, 0.8, 0.95)


@pytest.mark.parametrize(
    ("value", "bar", "null", "met"),
    [
        (0.95, "≥ 0.95", None, True),
        (0.94, ">= 0.95", None, False),
        (0.1, "≤ 0.1", None, True),
        (0.2, "< 20%", None, False),
        (0.7, "> null", 0.5, True),
        (0.7, "> null", None, False),
        (None, "≥ 0", None, False),
        (float("nan"), "≥ 0", None, False),
        (True, "= 1", None, True),
        (-0.5, "< −0.2", None, True),
        (0.7, "well above chance", None, None),
    ],
)
def test_bars(value, bar, null, met):
    assert meets(value, bar, null) is met


def rendered(table):
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


def test_terminal_table_shows_value_null_interval_and_bar(results, bars):
    lines = rendered(terminal_table(results, bars)).splitlines()
    row = next(line for line in lines if "ioi_accuracy" in line)
    assert row.split() == ["ioi_accuracy", "0.972", "0.500", "[0.951,", "0.986]", "✓", "≥", "0.95"]
    assert any("fvu" in line and "✗ ≤ 0.15" in line for line in lines)
    assert not any("_null" in line or "_ci_" in line for line in lines)


def test_terminal_table_does_not_read_markup_in_keys():
    assert "[bold]x" in rendered(terminal_table({"run.[bold]x": "[red]y"}))


def test_a_bar_without_its_figure_is_shown_as_not_met():
    text = rendered(terminal_table({"a.x": 1.0}, {"monitor.auroc": "≥ 0.9"}))
    assert "✗ ≥ 0.9" in text
    assert "n/a" in text


def test_terminal_table_has_no_column_that_nothing_is_in():
    first = rendered(terminal_table({"a.x": 1.0, "a.y": 2.0})).splitlines()[0]
    assert first.split() == ["figure", "value"]
    first = rendered(terminal_table({"a.x": 1.0, "a.x_null": 0.5}, {"a.x": "> null"})).splitlines()[0]
    assert first.split() == ["figure", "value", "null", "bar"]
