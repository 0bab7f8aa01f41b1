"""A workdir describes itself, resumes, refuses what is not its own, and never shows half a file."""

import dataclasses
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mi_jax.core.dtypes import SAFETENSORS_DTYPES
from mi_jax.run import Workdir, WorkdirError


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    width: int = 64
    learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    layers: tuple[int, ...] = (1, 2)
    model: str | None = None
    sae: SAEConfig = dataclasses.field(default_factory=SAEConfig)


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_describes_itself(tmp_path):
    Workdir.open(tmp_path / "deep" / "run", Config(), experiment="pipeline")
    assert json.loads((tmp_path / "deep" / "run" / "config.json").read_text()) == {
        "experiment": "pipeline",
        "config": {"seed": 0, "layers": [1, 2], "model": None, "sae": {"width": 64, "learning_rate": 1e-3}},
    }


def test_the_same_config_resumes_and_keeps_what_is_there(tmp_path):
    Workdir.open(tmp_path, Config()).save_stage("model", {"loss": 0.5})
    resumed = Workdir.open(str(tmp_path), Config())
    assert resumed.stage_done("model")
    assert resumed.load_stage("model") == {"loss": 0.5}
    assert not resumed.stage_done("circuit")
    assert resumed.config["sae"]["width"] == 64


def test_another_config_is_refused_with_every_differing_field_and_nothing_is_written(tmp_path):
    Workdir.open(tmp_path, Config()).add_results({"a": 1})
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError) as error:
        Workdir.open(tmp_path, Config(layers=(1,), sae=SAEConfig(width=128)))
    message = str(error.value)
    assert "config.layers: [1, 2] in the workdir, [1] asked for" in message
    assert "config.sae.width: 64 in the workdir, 128 asked for" in message
    assert "seed" not in message
    assert "another workdir" in message
    assert snapshot(tmp_path) == before


def test_another_experiment_is_refused(tmp_path):
    Workdir.open(tmp_path, Config(), experiment="pipeline")
    with pytest.raises(WorkdirError, match="holds a run of experiment 'pipeline', and 'probes' was asked for"):
        Workdir.open(tmp_path, Config(), experiment="probes")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"experiment": "Config", "con', r"config\.json is not valid JSON"),
        ("config.json", "[]", "not a config that this program wrote"),
        ("results.json", "{}", "has results.json but no config.json"),
    ],
)
def test_a_folder_that_cannot_be_told_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(WorkdirError, match=message):
        Workdir.open(tmp_path, Config())
    assert snapshot(tmp_path) == before


def test_a_job_log_in_a_new_folder_does_no_harm(tmp_path):
    (tmp_path / "slurm-1.out").write_text("starting")
    Workdir.open(tmp_path, Config())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "slurm-1.out"]
    assert (tmp_path / "slurm-1.out").read_text() == "starting"


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(WorkdirError, match="run is a file"):
        Workdir.open(tmp_path / "run", Config())


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Config(model=object()), r"config\.model holds a object"),
        (Config(sae=SAEConfig(learning_rate=float("nan"))), r"config\.sae\.learning_rate is nan"),
        (7, "a config is a dataclass instance or a mapping"),
    ],
)
def test_a_config_that_json_cannot_hold_names_the_field(tmp_path, value, field):
    with pytest.raises(TypeError, match=field):
        Workdir.open(tmp_path / "run", value)
    assert not (tmp_path / "run").exists()


def test_results_merge_into_one_flat_object(tmp_path):
    workdir = Workdir.open(tmp_path, Config())
    assert workdir.results == {}
    workdir.add_results({"circuit.faithfulness": 0.5, "circuit.edges": 10})
    workdir.add_results({"circuit.faithfulness": jnp.float32(0.75), "ok": np.bool_(True), "by": "eap-ig"})
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "circuit.faithfulness": 0.75,
        "circuit.edges": 10,
        "ok": True,
        "by": "eap-ig",
    }


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a.loss": float("nan")}, "result 'a.loss' is nan"),
        ({"a.loss": np.float32("inf")}, "result 'a.loss' is inf"),
        ({"a loss": 1.0}, "result name 'a loss' is not words joined by dots"),
        ({"a..b": 1.0}, "is not words joined by dots"),
        ({"a": {"b": 1.0}}, "'a' is a dict; a number"),
        ({"a": np.zeros(3)}, r"'a' is a ndarray of shape \(3,\)"),
        ({"a": None}, "'a' is a NoneType"),
    ],
)
def test_a_result_that_is_not_a_finite_scalar_is_refused_whole(tmp_path, results, message):
    workdir = Workdir.open(tmp_path, Config())
    workdir.add_results({"before": 1})
    with pytest.raises(ValueError, match=message):
        workdir.add_results({"good": 2} | results)
    assert workdir.results == {"before": 1}


def test_metrics_are_lines_and_a_line_cut_short_by_a_kill_is_dropped_on_resume(tmp_path):
    workdir = Workdir.open(tmp_path, Config())
    workdir.log(0, loss=jnp.float32(2.0), l0=3)
    workdir.log(1, loss=float("nan"))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    resumed = Workdir.open(tmp_path, Config())
    resumed.log(2, loss=1.0)
    assert resumed.metrics() == [{"step": 0, "loss": 2.0, "l0": 3}, {"step": 1, "loss": None}, {"step": 2, "loss": 1.0}]


def test_a_damaged_metrics_line_is_named(tmp_path):
    workdir = Workdir.open(tmp_path, Config())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n')
    with pytest.raises(WorkdirError, match="line 2 is not valid JSON"):
        workdir.metrics()


@pytest.mark.parametrize("content", ['{"loss": 0.', "", "[1]"])
def test_a_damaged_stage_file_is_named(tmp_path, content):
    workdir = Workdir.open(tmp_path, Config())
    workdir.save_stage("circuit", {"loss": 0.5})
    (tmp_path / "stages" / "circuit.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"circuit\.json"):
        workdir.load_stage("circuit")


def test_a_stage_that_is_not_done_is_named(tmp_path):
    with pytest.raises(WorkdirError, match=r"circuit\.json does not exist"):
        Workdir.open(tmp_path, Config()).load_stage("circuit")


@pytest.mark.parametrize("data", [{"x": float("inf")}, {"x": np.zeros(2)}])
def test_stage_data_that_json_cannot_hold_leaves_the_stage_undone(tmp_path, data):
    workdir = Workdir.open(tmp_path, Config())
    with pytest.raises(ValueError, match=r"circuit\.json cannot be written"):
        workdir.save_stage("circuit", data)
    assert not workdir.stage_done("circuit")


dtypes = st.sampled_from([dtype.type for dtype in SAFETENSORS_DTYPES.values()])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text("abc./_", min_size=1, max_size=6), st.tuples(dtypes, shapes), max_size=4))
def test_arrays_come_back_bit_for_bit(tmp_path, specs):
    workdir = Workdir.open(tmp_path, Config())
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in specs.items()}
    workdir.save_arrays("dictionary", arrays)
    loaded = workdir.load_arrays("dictionary")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()


def test_a_transposed_array_and_a_jax_array_are_saved_as_they_read(tmp_path):
    workdir = Workdir.open(tmp_path, Config())
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    workdir.save_arrays("w", {"a": transposed, "b": jnp.arange(3, dtype=jnp.int32)})
    loaded = workdir.load_arrays("w")
    np.testing.assert_array_equal(loaded["a"], transposed)
    np.testing.assert_array_equal(loaded["b"], [0, 1, 2])


def test_every_truncation_of_a_checkpoint_is_an_error_that_names_it(tmp_path):
    workdir = Workdir.open(tmp_path, Config())
    workdir.save_arrays("w", {"a": np.arange(4, dtype=np.float32)})
    file = tmp_path / "checkpoints" / "w.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(WorkdirError, match=r"w\.safetensors is not a whole safetensors file"):
            workdir.load_arrays("w")


def test_a_checkpoint_that_is_absent_lists_what_exists(tmp_path):
    workdir = Workdir.open(tmp_path, Config())
    workdir.save_arrays("w", {"a": np.zeros(1, np.float32)})
    assert workdir.has_arrays("w")
    assert not workdir.has_arrays("v")
    with pytest.raises(WorkdirError, match=r"v\.safetensors does not exist; the checkpoints are: w"):
        workdir.load_arrays("v")


def test_what_is_not_an_array_is_named(tmp_path):
    with pytest.raises(ValueError, match="checkpoint 'w': 'step' is a int, not an array"):
        Workdir.open(tmp_path, Config()).save_arrays("w", {"step": 3})


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    workdir = Workdir.open(tmp_path, Config())
    workdir.write_bytes("figures/a.svg", b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        workdir.write_bytes("figures/a.svg", b"new and longer")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["../a", "/etc/a", "", "a//b", ".hidden"])
def test_a_name_outside_the_workdir_is_refused(tmp_path, name):
    workdir = Workdir.open(tmp_path / "run", Config())
    with pytest.raises(ValueError, match="is not a file name relative to the workdir"):
        workdir.write_json(name, {})
    with pytest.raises(ValueError, match="cannot name a file"):
        workdir.save_stage(name, {})
