"""A comparison of methods on a tiny model: its figures beside their nulls, its files, and what it refuses."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.discover_circuit import run
from experiments.discover_circuit.config import DiscoverCircuitConfig
from experiments.discover_circuit.method import Comparison, file_name, prefix_of
from mi_jax.circuits import edge_scores
from mi_jax.circuits.formats import read_eap_ig
from mi_jax.circuits.metrics import per_prompt_scores
from mi_jax.core.errors import InputError
from tests.circuits.tiny_task import model, task

METHODS = "eap-ig,atp+qk,ifr,acdc"
CONFIG = DiscoverCircuitConfig(methods=METHODS, circuit_fraction=0.2, null_curves=1, acdc_threshold=1e-4)


def comparison(config):
    pairs = task()
    return Comparison(config, model(), pairs[:2], pairs[len(pairs) - 2 :])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discover") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_comparison", comparison)
        results = run.run_discovery(CONFIG, str(folder), console=Console(file=io.StringIO()))
        again = run.run_discovery(CONFIG, str(folder), console=Console(file=io.StringIO()))
    assert again == results
    return folder, results


def test_every_method_has_its_figures_beside_their_nulls(done):
    _, results = done
    for name in ("eap-ig", "atp+qk", "ifr"):
        for figure in (*run.FIGURES, "stability_bootstrap_jaccard", "faithfulness"):
            key = f"{prefix_of(name)}.{figure}"
            assert results[f"{key}_ci_low"] <= results[key] <= results[f"{key}_ci_high"]
            assert f"{key}_null" in results
    # ACDC gives a circuit and no order of edges
    assert "discover_circuit.acdc.cmd" not in results
    assert "discover_circuit.acdc.faithfulness_null" in results


def test_circuits_are_written_in_eap_igs_format(done):
    folder, results = done
    for name in CONFIG.names:
        read = read_eap_ig(folder / "circuits" / f"{file_name(name)}.json", model().config)
        assert read.circuit.sum() == results[f"{prefix_of(name)}.edges"]


def test_the_report_has_every_method(done):
    folder, _ = done
    text = (folder / "report.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in text for name in CONFIG.names)
    assert json.loads((folder / "results.json").read_text())["discover_circuit.pairs"] == 2


@pytest.mark.parametrize("name", DiscoverCircuitConfig().names)
def test_scores_are_means_over_prompts(name):
    pairs = task()

    def score(model, task):
        return edge_scores(model, task, method=name, steps=2)

    each = per_prompt_scores(score, model(), pairs)
    whole = score(model(), pairs)
    np.testing.assert_allclose(each.mean(0), whole, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": "eap,magic"}, "no method magic; eap, eap-ig"),
        ({"methods": " "}, "no method named"),
        ({"task": "chess"}, "there are ioi, greater-than"),
        ({"held_out": 1}, "two or more"),
        ({"circuit_fraction": 0.0}, "between 0 and 1"),
    ],
)
def test_settings_that_no_run_can_have(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(CONFIG, **change).resolved()
