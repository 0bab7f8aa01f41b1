"""The estimate of time left against its definition, and what a terminal and a log file are shown."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mi_jax.run.progress import RunProgress, estimate, format_seconds


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def log_console():
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def test_before_anything_is_known_the_expected_seconds_stand():
    e = estimate([10, 30, 60], [None] * 3, current=0, fraction=0.0, elapsed=0.0)
    assert (e.fraction, e.seconds_left) == (0.0, 100.0)


def test_a_machine_that_is_twice_as_slow_doubles_what_is_left():
    e = estimate([10, 30, 60], [20.0, None, None], current=1, fraction=0.0, elapsed=0.0)
    assert e.fraction == pytest.approx(0.1)
    assert e.seconds_left == pytest.approx(180.0)


def test_a_stage_that_reports_is_believed_more_the_further_it_is():
    # 40 s at a quarter says 160 s in all; the expectation says 100. Weighted, 0.25·160 + 0.75·100 = 115; 3/4 are left.
    e = estimate([100], [None], current=0, fraction=0.25, elapsed=40.0)
    assert e.seconds_left == pytest.approx(0.75 * 115)


def test_stages_of_an_earlier_run_count_as_done_and_do_not_rescale():
    e = estimate([50, 50], [None, None], current=1, fraction=0.0, elapsed=10.0)
    assert (e.fraction, e.seconds_left) == (0.5, 40.0)


@given(
    st.lists(st.floats(0.1, 1e4), min_size=1, max_size=5),
    st.integers(0, 5),
    st.floats(0, 1),
    st.floats(0, 1e5),
    st.data(),
)
def test_an_estimate_is_always_a_fraction_and_no_negative_time(expected, current, fraction, elapsed, data):
    current = min(current, len(expected))
    taken = [data.draw(st.none() | st.floats(0, 1e5)) if i < current else None for i in range(len(expected))]
    e = estimate(expected, taken, current, fraction, elapsed)
    assert 0.0 <= e.fraction <= 1.0 + 1e-9
    assert 0.0 <= e.seconds_left < float("inf")


def test_seconds_read_as_a_clock():
    assert [format_seconds(s) for s in (0, 9.6, 75, 3700)] == ["0:00", "0:10", "1:15", "1:01:40"]


def test_a_log_file_gets_a_line_per_stage_and_one_every_ten_seconds_between():
    clock, console = Clock(), log_console()
    with RunProgress(["raw model", "decomposition"], [10, 90], console=console, clock=clock) as progress:
        progress.start(0)
        clock.now = 10.0
        progress.finish()
        progress.start(1)
        for second in range(11, 56):
            clock.now = float(second)
            progress.update((second - 10) / 90, f"step {second - 10} of 90, a note that is longer than the log is wide")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "1/2 raw model · 0% · 0:00 elapsed, about 1:40 left"
    assert lines[1] == "1/2 raw model done in 0:10"
    assert lines[2].startswith("2/2 decomposition · 20% · 0:20 elapsed, about 1:20 left · step 10 of 90, a note that")
    assert len(lines) == 2 + 4
    assert "\x1b" not in console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_one_line_that_redraws_itself_and_always_shows_the_time(width):
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False, _environ={})
    with RunProgress(["raw model", "decomposition"], [10, 90], console=console, clock=clock) as progress:
        progress.skip(0)
        progress.start(1)
        clock.now = 45.0
        progress.update(0.5, "step 45 " + "and more words than any terminal is wide " * 5)
    shown = console.file.getvalue()
    assert "1/2 raw model done by an earlier run" in shown
    for part in ("2/2 decomposition", "━", "55%", "0:45 elapsed, about 0:45 left", "step"):
        assert part in shown
