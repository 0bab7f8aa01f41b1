"""What the experiment can be asked."""

import dataclasses

from experiments.sae_synthetic.methods import METHODS
from experiments.sae_synthetic.settings import SETTINGS
from mi_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Settings.

    Attributes:
      smoke: sizes so small that it runs in seconds; its figures mean nothing.
      settings: names separated by commas; empty means all of `SETTINGS`, one more than the default.
      architectures: names separated by commas; empty means all of `METHODS`, one more than the default.
      seeds: trainings of every architecture in every setting.
      n_features, d_model: of the known dictionary.
      d_sae: latents of a dictionary.
      train_samples, test_samples: what dictionaries are trained on and scored on.
      steps, batch_size: of every training.
      rates: learning rates to choose from, as many as seeds or fewer.
      null_samples: what independent components and the non-negative factors are fitted to.
      pursuit_samples: what orthogonal matching pursuit is scored on, where it has few codes to find.
      transformer: the second part of the experiment as well.
      transformer_steps: of the transformer's own training.
      transformer_sequences: whose activations the dictionaries learn from; half as many others are scored.
      transformer_d_sae: latents of the transformer's dictionaries.
    """

    smoke: bool = False
    seed: int = 0
    settings: str = "independent,zipf,hierarchy,correlated,dense"
    architectures: str = "relu,gated,jumprelu,topk,batchtopk,matryoshka,hierarchical_topk,matching_pursuit"
    seeds: int = 3
    n_features: int = 256
    d_model: int = 128
    d_sae: int = 256
    train_samples: int = 65536
    test_samples: int = 8192
    steps: int = 400
    batch_size: int = 1024
    rates: str = "0.005,0.01,0.02"
    null_samples: int = 8192
    pursuit_samples: int = 1024
    transformer: bool = True
    transformer_steps: int = 4000
    transformer_sequences: int = 4096
    transformer_d_sae: int = 128

    def resolved(self) -> "SyntheticConfig":
        """The config with the sizes of a smoke run, if it is one."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            settings="independent,dense",
            architectures="batchtopk,jumprelu",
            seeds=2,
            n_features=64,
            d_model=48,
            d_sae=64,
            train_samples=2048,
            test_samples=512,
            steps=20,
            batch_size=128,
            rates="0.005,0.01",
            null_samples=512,
            pursuit_samples=64,
            transformer_steps=20,
            transformer_sequences=256,
            transformer_d_sae=64,
        )

    def check(self) -> None:
        """Finds what cannot work before anything is written.

        Raises:
          InputError: a setting or an architecture that there is not, or sizes that do not fit each other.
        """
        _ = self.chosen_settings, self.chosen_architectures, self.learning_rates
        if self.seeds < 2:
            raise InputError(f"config.seeds={self.seeds}: intervals and consistency need two seeds or more")
        if self.d_sae < self.n_features:
            raise InputError(
                f"config.d_sae={self.d_sae} latents cannot hold config.n_features={self.n_features} features"
            )
        if self.batch_size > self.train_samples:
            raise InputError(
                f"config.train_samples={self.train_samples} do not fill a batch of config.batch_size={self.batch_size}"
            )

    @property
    def chosen_settings(self) -> tuple[str, ...]:
        return _chosen("settings", self.settings, tuple(SETTINGS))

    @property
    def chosen_architectures(self) -> tuple[str, ...]:
        return _chosen("architectures", self.architectures, tuple(METHODS))

    @property
    def learning_rates(self) -> tuple[float, ...]:
        try:
            rates = tuple(float(rate) for rate in self.rates.split(","))
        except ValueError:
            rates = ()
        if not rates or min(rates) <= 0:
            raise InputError(f"config.rates={self.rates!r}: give learning rates over 0, such as 0.005,0.01")
        return rates


def _chosen(field: str, names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names given, each once, or all that are known."""
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip())) or known
    if unknown := [name for name in chosen if name not in known]:
        raise InputError(f"config.{field}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return chosen
