"""The page: every figure's range over machines and seeds."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from experiments.header import report_header
from experiments.stability.movement import Movement
from experiments.stability.runs import Done
from mi_jax import report
from mi_jax.report.charts import interval_chart
from mi_jax.report.charts.intervals import gauge
from mi_jax.report.figures import figures
from mi_jax.report.text import interval, is_number, number, printable
from mi_jax.run import Workdir

LIMITS = (
    "Another instruction set changes the order of sums, as another machine does; other versions of the libraries, "
    "other precisions and accelerators are not tried.",
    "A range over so many runs is no bound: one more run can leave it.",
)


def write_page(
    folder: Workdir, config: Any, moves: Sequence[Movement], done: Sequence[Done], bars: Mapping[str, str]
) -> None:
    """Writes report.html into the workdir."""
    results = folder.results
    shown = {key: value for key, value in results.items() if key in bars}
    rows = figures(shown, bars)
    header = report_header(f"How the figures of {config.experiment} move", folder)
    document = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=header,
            missing=results["stability.missing_instruction_sets"],
            groups_of_moves=[
                (name, list(part)) for name, part in groupby(moves, key=lambda m: m.key.partition(".")[0])
            ],
            chart=_chart(done),
            runs=[(d, d.results.get("run.bars_failed")) for d in done],
            data={"limits": LIMITS},
            groups=[(name, list(members)) for name, members in groupby(rows, key=lambda row: row.group)],
            has_bars=bool(bars),
        )
    )
    folder.write_bytes("report.html", printable(document).encode())


def _chart(done: Sequence[Done]) -> Any:
    """The F1 of every run of the pipeline's validation; nothing for other experiments."""
    key = "organism.edge_f1_worst"
    rows = [
        {"name": d.run.place, "value": d.results[key], "null": d.results.get(f"{key}_null")}
        for d in done
        if d.run.part == "validation" and key in d.results
    ]
    return interval_chart(rows, label="F1 of every run", include=(0, 1), axis="F1 of the edges that were found")


def _environment() -> jinja2.Environment:
    folders = [Path(__file__).parent, Path(report.__file__).parent / "templates"]
    environment = jinja2.Environment(
        # this page first, then the styles and sections of the pipeline's report
        loader=jinja2.ChoiceLoader([jinja2.FileSystemLoader(folder) for folder in folders]),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.tests["figure"] = is_number
    environment.globals |= {"interval": interval, "gauge": gauge, "json": str}
    return environment
