"""A random two-layer decoder with grouped heads, and a random task for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mi_jax.data.task import Task
from mi_jax.models import Decoder, init_decoder
from tests.models.tiny import CONFIGS, prompts

CONFIG = dataclasses.replace(CONFIGS["llama"], name="tiny", n_layers=2, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=6)
ATTENTION_ONLY = dataclasses.replace(CONFIG, d_mlp=0, n_kv_heads=2)


@functools.cache
def model(attention_only: bool = False) -> Decoder:
    made = init_decoder(ATTENTION_ONLY if attention_only else CONFIG, key=jax.random.key(1))
    # larger than at initialisation, so that edges have effects well above rounding
    return jax.tree.map(lambda x: 1.5 * x, made)


def task() -> Task:
    """Pairs that differ in one token, the second pair padded by one position."""
    clean = prompts(5, 2, 4)
    corrupt = clean.at[:, 1].set((clean[:, 1] + 5) % 13)
    mask = jnp.array([[True] * 4, [True] * 3 + [False]])
    answers = jnp.array([[3, 7], [2, 9]], jnp.int32)
    return Task("tiny", clean, corrupt, mask, answers[:, 0], answers[:, 1], jnp.array([3, 2], jnp.int32))


def random_task(seed: int) -> Task:
    """Four pairs of random prompts of four tokens, the last two padded by one."""
    keys = jax.random.split(jax.random.key(seed), 3)
    clean = jax.random.randint(keys[0], (4, 4), 0, 13)
    corrupt = jnp.where(jax.random.uniform(keys[1], (4, 4)) < 0.5, clean, (clean + 5) % 13).at[:, 0].set(clean[:, 0])
    mask = jnp.ones((4, 4), bool).at[2:, 3].set(False)
    answers = jax.random.randint(keys[2], (4,), 0, 13)
    return Task(f"random {seed}", clean, corrupt, mask, answers, (answers + 6) % 13, jnp.array([3, 3, 2, 2], jnp.int32))
