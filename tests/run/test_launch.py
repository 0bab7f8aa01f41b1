"""The command line as a user meets it: values arrive, mistakes cost one line."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import dataclasses
from mi_jax.core.errors import InputError
from mi_jax.run.launch import launch

@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1
    smoke: bool = False
    text: str = ""
    inner: Inner = Inner()

def main(config, workdir):
    if config.text == "bad":
        raise InputError("the text is bad; give another")
    print(config, workdir)

launch(main, Config(), workdir="runs/here")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch") / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    return run


def test_fields_are_flags_and_the_config_is_the_frozen_one(program):
    code, out, _ = program("--config.steps=7", "--config.smoke=true", "--config.inner.rate=2.5", "--workdir=w")
    assert code == 0
    assert out == "Config(steps=7, smoke=True, text='', inner=Inner(rate=2.5)) w"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.step=7"], 2, "Field step not found"),
        (["--steps=7"], 2, "Unknown command line flag 'steps'"),
        (["--config.steps=many"], 2, "invalid literal for int"),
        (["report"], 2, "unexpected argument 'report'"),
        (["--config.text=bad"], 1, "the text is bad; give another"),
    ],
)
def test_a_mistake_costs_one_line(program, arguments, code, message):
    got, out, err = program(*arguments)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    if code == 2 and "unexpected" not in message:
        assert "--config.inner.rate" in err
