"""The page with the ranking: tables, and charts of every architecture beside its nulls."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from experiments.header import report_header
from experiments.sae_synthetic.tables import NULLS, Ranking, chance
from mi_jax import report
from mi_jax.report.charts import interval_chart
from mi_jax.report.charts.intervals import gauge
from mi_jax.report.figures import figures
from mi_jax.report.text import interval, is_number, number, printable
from mi_jax.run import Workdir

CAPTIONS = {
    "mcc": "MCC: mean cosine of each true feature with its own latent, one to one",
    "f1": "F1: whether the latent fires when its feature is there",
    "fvu": "FVU: the share of the variance that the reconstruction leaves out",
    "l0": "L0: codes per sample",
    "consistency": "PW-MCC: whether trainings that differ in their seed find the same directions",
    "amortisation_gap": "Amortisation gap: what orthogonal matching pursuit gains in F1 over the encoder at its L0",
}
LIMITS = (
    "Synthetic features are as linear as can be; what holds here need not hold in a language model.",
    "Small dictionaries and short trainings, all at the true mean L0, which nobody knows of a real model.",
    "Learning rates were chosen by reconstruction on another draw of one setting, and nothing else was searched in the "
    "run; an architecture with its own tuning may do better.",
    "Intervals are over seeds of the training by Student's t; the true dictionary and its samples are one draw.",
    "Where k is fixed, the amortisation gap holds too that every sample gets as many codes, whatever is in it.",
    "PCA and independent components have as many directions as there are dimensions, fewer than features.",
    "Non-negative factors count from the least value of every coordinate, so that few of them reconstruct badly.",
    "The transformer's directions are least-squares fits to known attributes; what the model adds of its own to its "
    "stream counts as error.",
)


def write_page(folder: Workdir, rankings: Sequence[Ranking], facts: Mapping[str, str], bars: Mapping[str, str]) -> None:
    """Writes report.html into the workdir."""
    results = folder.results
    rows = figures(results, bars)
    best = (
        f"{results.get('sae_synthetic.best_architecture', '')} is first by mean MCC over the settings." if bars else ""
    )
    header = report_header("Sparse dictionaries beside features that are known", folder)
    tables = [
        {
            "caption": CAPTIONS[found.figure],
            "places": [(place, facts.get(place, "")) for place in found.places],
            "rows": found.rows,
            "chance": chance(found),
        }
        for found in rankings
    ]
    document = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=header,
            lead=f"{best} Every figure is a mean over seeds with its 95 % interval, beside its null: random "
            "directions for MCC, the codes of other samples for F1.".strip(),
            tables=tables,
            plates=list(_plates(rankings[0], facts)),
            data={"limits": LIMITS},
            groups=[(name, list(members)) for name, members in groupby(rows, key=lambda row: row.group)],
            has_bars=bool(bars),
        )
    )
    folder.write_bytes("report.html", printable(document).encode())


def _plates(found: Ranking, facts: Mapping[str, str]) -> list[tuple[Any, str]]:
    """For every place a chart of its architectures, the best first, then of its nulls."""
    plates = []
    for i, place in enumerate(found.places):
        cells = [(name, cell) for name, row in found.rows if (cell := row[i]) is not None]
        cells.sort(key=lambda pair: (pair[0] in NULLS, -pair[1].value))
        rows = [{"name": n, "value": c.value, "low": c.low, "high": c.high, "null": c.null} for n, c in cells]
        chart = interval_chart(rows, label=f"MCC, {place}", include=(0, 1), axis="MCC (higher is better)")
        plates.append((chart, f"{place}: {facts.get(place, '')}. The diamond is the MCC of random directions."))
    return plates


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
    environment.globals |= {"interval": interval, "gauge": gauge, "json": _indented}
    return environment


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
