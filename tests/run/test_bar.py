"""The bar draws every report of a sweep, whatever their order, and opens again for the next one."""

import io

from rich.console import Console

from mi_jax.run import Bar


def _bar():
    out = io.StringIO()
    return Bar("patching", console=Console(file=out, force_terminal=True, width=80)), out


def test_counts_up_to_the_total_in_any_order():
    bar, out = _bar()
    for done in (2, 1, 3):
        bar(done, 3)
    assert "patching" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_serves_several_computations():
    bar, out = _bar()
    for done in (1, 2):
        bar(done, 2)
    first = len(out.getvalue())
    for done in range(1, 6):
        bar(done, 5)
    assert "2/2" in out.getvalue()[:first]
    assert "5/5" in out.getvalue()[first:]
