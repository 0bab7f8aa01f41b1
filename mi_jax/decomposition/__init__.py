"""Sparse dictionaries and their null baselines."""
