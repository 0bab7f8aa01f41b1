"""What to run, under which instruction sets and seeds."""

import dataclasses
import re
import shlex

from mi_jax.core.errors import InputError

# the names that XLA has for what a CPU can do, and how /proc/cpuinfo calls it
INSTRUCTION_SETS = {
    "SSE4_2": "sse4_2",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX": "amx_tile",
    "AMX_FP16": "amx_fp16",
}


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Settings.

    Attributes:
      experiment: a package of `experiments` that is run as a program.
      instruction_sets: names that `--xla_cpu_max_isa` takes, separated by commas.
      seeds: how many seeds, from `first_seed` on; 0 runs an experiment that has none, once per instruction set.
      flags: more flags for the experiment, as on a command line.
      whole: the pipeline only: beside the validation stage over all seeds, every stage with the first one.
    """

    experiment: str = "pipeline"
    instruction_sets: str = "SSE4_2,AVX2,AVX512"
    seeds: int = 5
    first_seed: int = 0
    flags: str = ""
    whole: bool = True

    @property
    def chosen_sets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.instruction_sets.split(",") if name.strip()))

    def check(self) -> None:
        """Raises InputError for names or numbers that make no sense."""
        if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", self.experiment) or self.experiment == "stability":
            raise InputError(f"config.experiment={self.experiment!r}: give a package of experiments, such as pipeline")
        if unknown := [name for name in self.chosen_sets if name not in INSTRUCTION_SETS]:
            raise InputError(f"no instruction set {unknown[0]!r}; XLA has {', '.join(INSTRUCTION_SETS)}")
        if not self.chosen_sets or self.seeds < 0:
            raise InputError("give at least one instruction set, and seeds from 0 on")
        try:
            shlex.split(self.flags)
        except ValueError as error:
            raise InputError(f"config.flags={self.flags!r}: {error}") from error
