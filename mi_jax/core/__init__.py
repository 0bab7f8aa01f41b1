"""The activation pytree: sites, edits, transforms, sweeps. Imports jax and nothing else of this project."""

from mi_jax.core import sharding as sharding
from mi_jax.core.conformance import check_sites as check_sites
from mi_jax.core.edits import Edit as Edit
from mi_jax.core.edits import ablate as ablate
from mi_jax.core.edits import add as add
from mi_jax.core.edits import noise as noise
from mi_jax.core.edits import patch as patch
from mi_jax.core.edits import scale as scale
from mi_jax.core.edits import transform as transform
from mi_jax.core.files import load_edits as load_edits
from mi_jax.core.files import save_edits as save_edits
from mi_jax.core.index import each as each
from mi_jax.core.sites import At as At
from mi_jax.core.sites import Site as Site
from mi_jax.core.sites import SiteError as SiteError
from mi_jax.core.sites import SiteTable as SiteTable
from mi_jax.core.sites import at as at
from mi_jax.core.subspaces import project_out as project_out
from mi_jax.core.subspaces import swap_subspace as swap_subspace
from mi_jax.core.sweeps import sweep as sweep
from mi_jax.core.transforms import SiteModel as SiteModel
from mi_jax.core.transforms import capture as capture
from mi_jax.core.transforms import intervene as intervene
from mi_jax.core.transforms import jit as jit
