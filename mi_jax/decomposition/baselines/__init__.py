"""What a dictionary must beat: other linear decompositions, and directions that were never trained."""

from mi_jax.decomposition.baselines.base import Baseline as Baseline
from mi_jax.decomposition.baselines.ica import ICA as ICA
from mi_jax.decomposition.baselines.ica import fit_ica as fit_ica
from mi_jax.decomposition.baselines.k_sparse import KSparse as KSparse
from mi_jax.decomposition.baselines.nmf import NMF as NMF
from mi_jax.decomposition.baselines.nmf import fit_nmf as fit_nmf
from mi_jax.decomposition.baselines.pca import PCA as PCA
from mi_jax.decomposition.baselines.pca import fit_pca as fit_pca
from mi_jax.decomposition.baselines.random_decoder import fit_random_decoder as fit_random_decoder
from mi_jax.decomposition.baselines.random_directions import RandomDirections as RandomDirections
from mi_jax.decomposition.baselines.random_directions import fit_random_directions as fit_random_directions
