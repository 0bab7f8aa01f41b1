"""One command takes a real language model through all six stages to a report.

    python -m experiments.pipeline --workdir=runs/pipeline

About 5 minutes and 4 GB on 2 CPU cores. The same command again resumes after the last
finished stage. It writes `results.json` and `report.html` into the workdir; the figures to expect are those of the
README's table. It exits with 3 where a figure misses its bar (`experiments.pipeline.run.BARS`), after the report is
written. `--config.stages=validation` runs some stages only; `--config.smoke=true` runs everything at sizes that mean
nothing.
"""

from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.run import run_pipeline
from mi_jax.run import enable_compilation_cache, maybe_initialize
from mi_jax.run.launch import launch


def main(config: PipelineConfig, workdir: str) -> None:
    """Runs the experiment."""
    maybe_initialize()
    enable_compilation_cache()
    run_pipeline(config, workdir)


if __name__ == "__main__":
    launch(main, PipelineConfig(), workdir="runs/pipeline")
