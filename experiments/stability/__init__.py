"""How the figures of an experiment move over instruction sets and seeds; see `experiments.stability.__main__`."""
