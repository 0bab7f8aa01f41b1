"""Prompts of one length, enough of them for tests over prompts."""

import jax.numpy as jnp

from mi_jax.data.task import Task
from tests.models.tiny import prompts

N, N_POS = 6, 4


def task() -> Task:
    """Random pairs of prompts, each with an answer and a distractor that differ."""
    clean, corrupt = prompts(3, N, N_POS), prompts(4, N, N_POS)
    answers = prompts(5, N, 2)
    answers = jnp.where(answers[:, :1] == answers[:, 1:], jnp.array([[0, 1]], jnp.int32), answers)
    position = jnp.full((N,), N_POS - 1, jnp.int32)
    return Task("wide", clean, corrupt, jnp.ones(clean.shape, bool), answers[:, 0], answers[:, 1], position)
