"""Pallas kernels for accelerators, each beside the plain XLA function that defines what it computes.

The package imports nothing of `mi_jax`: a kernel takes and returns arrays. There is none yet; on CPU, GPU and TPU
`mi_jax` runs what XLA compiles. A kernel belongs here when a measurement shows that it beats its XLA twin.
"""
