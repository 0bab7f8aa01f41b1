"""Writes a run as one HTML file that needs nothing but itself."""

import functools
import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from etils import epath

from mi_jax.report import charts
from mi_jax.report.charts.intervals import gauge
from mi_jax.report.charts.svg import extent
from mi_jax.report.figures import Figure, figures
from mi_jax.report.text import crop, interval, is_number, number, printable, running_text, visible

STAGES = {
    "raw_model": "Raw model",
    "decomposition": "Decomposition",
    "features": "Features",
    "circuit": "Circuit",
    "validation": "Validation",
    "application": "Application",
}
SECTIONS = ("run", *STAGES, "limits")

# key, what it is called at the top of the page, and which way is better
HEADLINE = (
    ("model.ioi_accuracy", "IOI accuracy", "higher"),
    ("decomposition.fvu", "Variance unexplained", "lower"),
    ("decomposition.ce_recovered", "Loss recovered", "higher"),
    ("features.detection_score", "Explanation detection", "higher"),
    ("circuit.cmd", "Circuit–model distance", "lower"),
    ("organism.edge_f1_worst", "Known edges found (worst F1)", "higher"),
    ("monitor.auroc", "Monitor AUROC", "higher"),
)


def write_report(
    data: Mapping[str, Any], results: Mapping[str, Any], path: Any, *, bars: Mapping[str, str] | None = None
) -> None:
    """Draws a run to `path`, one HTML file with its styles, charts and script inside.

    A section is drawn only where `data` has it.

    Args:
      data: sections `run`, `raw_model`, `decomposition`, `features`, `circuit`, `validation`, `application` and
        `limits`. JSON values; arrays and their scalars count as lists and numbers.
      results: flat, dotted names to numbers, strings or booleans, as in `results.json`. A figure is shown beside its
        siblings `_null`, `_ci_low` and `_ci_high`.
      path: where to write; missing folders are made.
      bars: what figures must meet, `{"model.ioi_accuracy": "≥ 0.95"}`; shown in the closing table.

    Raises:
      ValueError: a section of another name, or one whose lists do not fit each other.
      TypeError: a value that JSON has no form for.
    """
    document = render(data, results, bars=bars)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document, encoding="utf-8")


def render(data: Mapping[str, Any], results: Mapping[str, Any], *, bars: Mapping[str, str] | None = None) -> str:
    """The document that `write_report` writes."""
    unknown = sorted(set(data) - set(SECTIONS))
    if unknown:
        raise ValueError(f"a report has no section {unknown}; its sections are {list(SECTIONS)}")
    data = {name: section for name, section in _plain(data).items() if section}
    results = _plain(results)
    rows = figures(results, bars)
    by_key = {row.key: row for row in rows}
    document = (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            run=data.get("run", {}),
            stages=[(key, name, _seconds(data, key, name)) for key, name in STAGES.items() if key in data],
            headline=[(by_key[key], name, better) for key, name, better in HEADLINE if _has_value(by_key.get(key))],
            groups=[(name, list(members)) for name, members in groupby(rows, key=lambda row: row.group)],
            has_bars=bool(bars),
        )
    )
    return printable(document)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "visible": visible}
    environment.tests["figure"] = is_number
    environment.globals |= {
        "charts": charts,
        "gauge": gauge,
        "interval": interval,
        "running_text": running_text,
        "crop": crop,
        "extent": extent,
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    return environment


def _plain(tree: Any) -> Any:
    """The tree as JSON would give it back, arrays and array scalars as lists and numbers."""

    def convert(leaf: Any) -> Any:
        if hasattr(leaf, "tolist"):
            return leaf.tolist()
        if hasattr(leaf, "__fspath__"):
            return str(leaf)
        raise TypeError(f"a report is drawn from JSON data; it got a {type(leaf).__name__}: {leaf!r:.80}")

    return json.loads(json.dumps(tree, default=convert))


def _seconds(data: Mapping[str, Any], key: str, name: str) -> float | None:
    """The run time of a stage; the run may call it `raw_model` or `Raw model`."""
    for stage in data.get("run", {}).get("stages", []):
        if str(stage.get("name", "")).lower().replace(" ", "_") in (key, name.lower().replace(" ", "_")):
            return stage.get("seconds")
    return None


def _has_value(row: Figure | None) -> bool:
    return row is not None and row.value is not None
