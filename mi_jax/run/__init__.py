"""Runs experiments: the folder they write, their stages, progress, the compilation cache and several processes."""

from mi_jax.run.bar import Bar as Bar
from mi_jax.run.cache import enable_compilation_cache as enable_compilation_cache
from mi_jax.run.distributed import maybe_initialize as maybe_initialize
from mi_jax.run.files import WorkdirError as WorkdirError
from mi_jax.run.progress import RunProgress as RunProgress
from mi_jax.run.stages import Progress as Progress
from mi_jax.run.stages import Stage as Stage
from mi_jax.run.stages import peak_rss_gb as peak_rss_gb
from mi_jax.run.stages import run_stages as run_stages
from mi_jax.run.workdir import Workdir as Workdir
