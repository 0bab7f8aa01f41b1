"""The run: checkpoints made by `transformers`, every family measured, and the saved models loaded back by it."""

import contextlib
import dataclasses
import functools
import os
import runpy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from rich.console import Console

from experiments.bench.peer import PeerError, interpreter, run_script
from experiments.header import report_header
from experiments.model_parity.controls import with_other_setting
from experiments.model_parity.family import PARTS, roundtrip, write_back
from experiments.model_parity.golden import Golden
from experiments.model_parity.table import bars_of, family_table
from mi_jax.core.errors import InputError
from mi_jax.core.transforms import jit
from mi_jax.data import tokenizer_from_gguf
from mi_jax.models import load_gguf, open_gguf, smollm2_path
from mi_jax.models.checkpoints.huggingface import load
from mi_jax.models.oracle import Oracle
from mi_jax.report import terminal_table, write_report
from mi_jax.run import Progress, Stage, Workdir, run_stages

SCRIPTS = Path(__file__).parents[2] / "tests" / "reference" / "families"
MAKE, CHECK = SCRIPTS / "make_golden.py", SCRIPTS / "check_saved.py"
# the folder that make_golden.py writes beside that of another family
WRITTEN_WITH = {"llama_sharded": "llama"}
SECONDS_EACH = 12
ENOUGH_FOR_MEAN = 12
PROMPTS = ("The keys to the cabinet are on the table.", "1, 2, 3, 4, 5,", "The capital of France is")
LIMITS = (
    "Tiny models with random weights: that a family is computed right, not that a large checkpoint fits in memory.",
    "Prompts of at most 12 tokens, in contexts of 64: positions beyond, where rotary scaling matters most, are not "
    "visited, except that the scaled models were given short original contexts.",
    "Attention sinks and other settings that none of these configurations has are not tested; loading refuses them.",
)


@dataclasses.dataclass(frozen=True)
class ParityConfig:
    """Settings.

    Attributes:
      families: names separated by commas; empty means all.
      seed: of the random weights and prompts.
      peer_python: an interpreter that has torch and transformers; empty means an environment made for it.
      gguf: compare SmolLM2's GGUF file with the oracle too.
    """

    families: str = ""
    seed: int = 0
    peer_python: str = ""
    gguf: bool = True


def known_families() -> tuple[str, ...]:
    """The families that make_golden.py can make."""
    return (*runpy.run_path(str(SCRIPTS / "settings.py"))["FAMILIES"], *WRITTEN_WITH)


def chosen_families(names: str) -> tuple[str, ...]:
    """The families named, each once, or all.

    Raises:
      InputError: a name that there is not.
    """
    known = known_families()
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip())) or known
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"config.families: no family is called {', '.join(unknown)}; there are {', '.join(known)}")
    return chosen


class Run:
    """The stages. What fails for one family is said and recorded, and everything else goes on."""

    def __init__(self, workdir: Workdir, config: ParityConfig, families: Sequence[str], console: Console):
        self.workdir, self.config, self.families, self.console = workdir, config, families, console
        path = Path(os.fspath(workdir.path)).absolute()
        self.made, self.saved, self.controls = path / "transformers", path / "saved", path / "controls"

    def stages(self) -> list[Stage]:
        n = len(self.families)
        measured = [
            Stage(f"family.{name}", name, functools.partial(self._measure, name), SECONDS_EACH)
            for name in self.families
        ]
        gguf = [Stage("gguf", "SmolLM2's GGUF file and the oracle", self._gguf, 20)] if self.config.gguf else []
        return [
            Stage("checkpoints", "checkpoints made by transformers", self._make, 10 + 2 * n),
            *measured,
            Stage("roundtrip", "saved models loaded by transformers", self._roundtrip, 15 + n),
            *gguf,
        ]

    def _make(self, progress: Progress) -> None:
        python = interpreter(MAKE, self.config.peer_python)
        sources = list(dict.fromkeys(WRITTEN_WITH.get(name, name) for name in self.families))

        def make(*names: str) -> dict[str, Any]:
            options = (f"--out={self.made}", f"--families={','.join(names)}", f"--seed={self.config.seed}")
            return run_script(python, MAKE, *options)

        progress(0.1, "all families")
        try:
            made = make(*sources)
        except PeerError as error:
            # one family may be what keeps the others from being made
            self._say("all families at once", error)
            made = {}
            for number, name in enumerate(sources):
                progress(0.2 + 0.8 * number / len(sources), name)
                with self._recorded(f"family.{name}", "checkpoint"):
                    made |= make(name)
        for name, report in made.items():
            # how far the reference in float32 is from itself in float64
            self.workdir.add_results({f"family.{name}.reference_float64_max_abs": report["float64"]})

    def _measure(self, name: str, progress: Progress) -> None:
        family = f"family.{name}"
        with self._recorded(family, "loading"):
            golden = Golden.read(self.made / name)
            self.workdir.add_results({f"peer.{v.split()[0]}": v.split()[1] for v in golden.arrays["versions"].tolist()})
            model = load(golden.folder)
            for number, (part, measure) in enumerate(PARTS.items()):
                progress((number + 0.5) / (len(PARTS) + 1), part)
                with self._recorded(family, part):
                    self._add(family, measure(model, golden))
            progress(len(PARTS) / (len(PARTS) + 1), "saving")
            with self._recorded(family, "saving"):
                for folder in (self.saved, self.controls):
                    # left by a run that was interrupted
                    shutil.rmtree(folder / name, ignore_errors=True)
                self._add(family, write_back(model, self.saved / name, self.controls / name))

    def _roundtrip(self, progress: Progress) -> None:
        # the two scripts need the same, and one environment is large enough
        python, found = interpreter(MAKE, self.config.peer_python), []
        for number, folder in enumerate((self.saved, self.controls)):
            progress(number / 2, folder.name)
            folder.mkdir(exist_ok=True)
            found.append(run_script(python, CHECK, f"--models={folder}", f"--goldens={self.made}"))
        for name in self.families:
            # what could not be loaded was not saved
            if name in found[0] and name in found[1]:
                with self._recorded(f"family.{name}", "roundtrip"):
                    equal = self.workdir.results.get(f"family.{name}.roundtrip_parameters_equal", False)
                    self._add(f"family.{name}", roundtrip(found[0][name], found[1][name], parameters_equal=bool(equal)))

    def _gguf(self, progress: Progress) -> None:
        with self._recorded("gguf.smollm2", "oracle"):
            self._add("gguf.smollm2", oracle_difference(progress))

    def _add(self, group: str, results: Mapping[str, Any]) -> None:
        self.workdir.add_results({f"{group}.{name}": value for name, value in results.items()})

    @contextlib.contextmanager
    def _recorded(self, group: str, part: str) -> Iterator[None]:
        """Says and records an error instead of raising it; the figures that it leaves out miss their bars."""
        try:
            yield
        except Exception as error:
            self._say(f"{group}, {part}", error)
            self._add(group, {f"failure.{part}": f"{type(error).__name__}: {error}"})

    def _say(self, what: str, error: Exception) -> None:
        self.console.print(f"{what} failed: {type(error).__name__}: {error}", markup=False, soft_wrap=True)


def oracle_difference(progress: Progress) -> dict[str, Any]:
    """SmolLM2's logits from its GGUF file, and with another base of the rotary positions, beside the numpy oracle.

    Raises:
      CheckpointError: the package with the file is not installed.
    """
    file = open_gguf(smollm2_path())
    tokens, mask = tokenizer_from_gguf(file).batch(PROMPTS)
    model = load_gguf(file)
    progress(0.3, "the oracle")
    rows = [row[real] for row, real in zip(tokens, mask, strict=True)]
    expected = np.concatenate(Oracle(smollm2_path()).many(rows))
    changed, other = with_other_setting(model)
    progress(0.6, "the decoder")
    found, wrong = (np.asarray(jit(each)(tokens, mask))[mask] for each in (model, other))
    return {
        "oracle_max_abs": np.abs(found - expected).max(),
        "oracle_max_abs_null": np.abs(wrong - expected).max(),
        "null_setting": changed,
        "same_tokens": bool((found.argmax(-1) == expected.argmax(-1)).all()),
    }


def run_parity(config: ParityConfig, workdir: str, *, console: Console | None = None) -> dict[str, Any]:
    """Runs what the workdir does not have yet, writes report.html, prints the table; returns the results.

    Raises:
      InputError: a family that there is not.
      PeerError: there is no environment with `transformers`, or a script in it failed.
      WorkdirError: the workdir holds another experiment or another config.
    """
    families = chosen_families(config.families)
    console = console or Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="model_parity")
    run_stages(folder, Run(folder, config, families, console).stages(), console=console)
    ratios = [folder.results.get(f"family.{name}.bfloat16_vs_reference") for name in families]
    if known := [float(ratio) for ratio in ratios if ratio is not None]:
        folder.add_results({"families.bfloat16_vs_reference_mean": geometric_mean(known)})
    results = folder.results
    others = {"families.bfloat16_vs_reference_mean": "≤ 1.08"} if len(families) >= ENOUGH_FOR_MEAN else {}
    others |= {"gguf.smollm2.oracle_max_abs": "≤ 0.001"} if config.gguf else {}
    header = report_header(
        "Every model family beside transformers", folder, model=f"{len(families)} tiny random models"
    )
    report = folder.path / "report.html"
    write_report({"run": header, "limits": list(LIMITS)}, results, report, bars=bars_of(families) | others)
    console.print(family_table(results, families))
    # the figures with a bar; the report has all of them
    asked = {key: results[key] for bar in others for key in (bar, f"{bar}_null") if key in results}
    if others:
        console.print(terminal_table(asked, others))
    console.print(f"{report}\n{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    return results
