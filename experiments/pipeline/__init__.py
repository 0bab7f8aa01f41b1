"""One command from a raw language model through all six stages to a report; see `experiments.pipeline.__main__`."""
