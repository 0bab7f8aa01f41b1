"""Stage 1: what the raw model can do, and that it is the model it should be."""

import jax
import jax.numpy as jnp
import numpy as np

import mi_jax as mi
from experiments.estimates import mean, proportion
from experiments.pipeline.config import PipelineConfig
from experiments.pipeline.subject import Outcome, Subject
from mi_jax.data import Task
from mi_jax.data.tasks import indirect_object_identification, repeated_tokens, subject_verb_agreement
from mi_jax.features import next_token_nll
from mi_jax.models.oracle import Oracle
from mi_jax.run import Progress

PARITY_PROMPTS = (
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is",
    "def add(a, b):\n    return a +",
    "In 1987 the company sold 12345 units, which",
    "Water boils at 100 degrees Celsius because",
    "To be, or not to be, that is the",
    "import numpy as np\nx = np.",
    "The keys to the cabinet near the door",
    "She opened the window and looked at the",
    "1, 2, 3, 4, 5, 6, 7,",
    "Die Katze sitzt auf dem",
    "<html>\n<head>\n<title>",
    "Once upon a time, there was a little",
    "The derivative of x squared is",
    "Q: What is the largest planet?\nA:",
    "the the the the cat cat cat",
)
# ids below are the special tokens of SmolLM2
FIRST_ORDINARY_TOKEN = 17


def raw_model(subject: Subject, config: PipelineConfig, progress: Progress) -> Outcome:
    """Parity with an independent forward pass, IOI, subject–verb agreement, and induction."""
    results: dict = {}
    progress(0.1, "an independent forward pass")
    results |= _parity(subject)

    progress(0.5, "indirect objects")
    ioi = indirect_object_identification(subject.tokenizer, config.prompts, seed=config.seed)
    third = indirect_object_identification(subject.tokenizer, config.prompts, seed=config.seed, counterfactual="third")
    logits = _at_answer(subject, ioi, ioi.clean)
    difference = np.asarray(ioi.logit_difference(logits))
    null = np.asarray(third.logit_difference(_at_answer(subject, third, third.corrupt)))
    results |= proportion("model.ioi_accuracy", difference > 0) | {"model.ioi_accuracy_null": float((null > 0).mean())}
    results |= mean("model.ioi_logit_difference", difference) | {"model.ioi_logit_difference_null": float(null.mean())}
    results |= proportion("model.ioi_top1", np.asarray(logits[:, 0].argmax(-1) == ioi.answer))

    progress(0.7, "agreement")
    for name, task in subject_verb_agreement(subject.tokenizer)._asdict().items():
        difference = np.asarray(task.logit_difference(_at_answer(subject, task, task.clean)))
        # verbs of a random other prompt's number: what a preference for some verb forms alone would score
        flip = np.random.default_rng(config.seed).random(len(difference)) < 0.5
        results |= proportion(f"model.agreement_{name}", difference > 0)
        results[f"model.agreement_{name}_null"] = float((np.where(flip, -difference, difference) > 0).mean())

    progress(0.8, "induction")
    half = 50
    n, d_vocab = (2 if config.smoke else 8), subject.model.config.d_vocab
    nll = {}
    for repeat in (True, False):
        tokens = repeated_tokens(n, half, d_vocab=d_vocab, seed=config.seed, first=FIRST_ORDINARY_TOKEN, repeat=repeat)
        nll[repeat] = np.asarray(_nll(subject.model, tokens))
    results |= mean("model.induction_nll_first", nll[True][:, : half - 1])
    # the first token of the second half cannot be known
    results |= mean("model.induction_nll_second", nll[True][:, half:])
    results["model.induction_nll_second_null"] = float(nll[False][:, half:].mean())

    figures = {
        "tasks": _task_rows(results),
        "examples": _examples(subject, ioi, logits),
        "induction": {
            "positions": list(range(1, 2 * half)),
            "nll": nll[True].mean(0).round(3).tolist(),
            "half": half,
        },
    }
    return Outcome(results, figures)


@jax.jit
def _nll(model, tokens):
    return next_token_nll(model(tokens), tokens)


def _at_answer(subject: Subject, task: Task, tokens) -> jax.Array:
    return mi.jit(subject.model)(tokens, task.mask, output_pos=task.position)


def _parity(subject: Subject) -> dict:
    tokens, mask = subject.tokenizer.batch(PARITY_PROMPTS)
    logits = np.asarray(mi.jit(subject.model)(jnp.asarray(tokens), jnp.asarray(mask)))
    reference = Oracle(subject.file.path).many([row[m] for row, m in zip(tokens, mask, strict=True)])
    ours = [row[m] for row, m in zip(logits, mask, strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).all() for a, b in zip(ours, reference, strict=True)]
    return {
        "model.parity_max_abs": max(float(np.abs(a - b).max()) for a, b in zip(ours, reference, strict=True)),
        "model.parity_same_top1": bool(all(same)),
        "model.name": f"{subject.model.config.name}, dequantised from {subject.file.path.rsplit('/', 1)[-1]}",
    }


def _task_rows(results: dict) -> list[dict]:
    names = {
        "model.ioi_accuracy": ("IOI, the answer above the other name", "accuracy"),
        "model.ioi_logit_difference": ("IOI", "logit difference"),
        "model.agreement_simple": ("Agreement", "accuracy"),
        "model.agreement_attractor": ("Agreement with an attractor", "accuracy"),
        "model.induction_nll_second": ("Induction", "NLL of repeated tokens, nats"),
    }
    return [
        {
            "name": name,
            "metric": metric,
            "value": results[key],
            "ci_low": results[f"{key}_ci_low"],
            "ci_high": results[f"{key}_ci_high"],
            "null": results[f"{key}_null"],
        }
        for key, (name, metric) in names.items()
    ]


def _examples(subject: Subject, task: Task, logits) -> list[dict]:
    probabilities = np.asarray(jax.nn.softmax(logits[:4, 0]))
    rows = []
    for i, p in enumerate(probabilities):
        top = [(subject.tokenizer.decode([j]), float(p[j])) for j in np.argsort(-p)[:5]]
        prompt = subject.tokenizer.decode(np.asarray(task.clean[i])[np.asarray(task.mask[i])].tolist())
        rows.append({"prompt": prompt, "expected": subject.tokenizer.decode([int(task.answer[i])]), "top": top})
    return rows
