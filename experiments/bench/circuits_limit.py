"""The limit of speed of EAP-IG: the fewest operations over the measured rate of matmuls.

With S steps, F operations of a forward and R of a backward with respect to activations alone, B prompts of T tokens,

    (S + 1) F + S R + 2 B d_model Σ_{edges s→r} t(r)

The forwards are those of the steps, of which the first is the corrupt run, and the clean one. The backward does every
product with weights once more, transposed (no gradient of a weight is needed), and four products where attention has
two: the gradients of queries, keys, values and pattern. The last term joins each source's difference with the mean of
each reader's gradients over the steps, where t(r) is the number of positions that reader r has a gradient at. The
metric reads one position, so in the last layer only that position's queries, MLP and output are needed, and all its
keys and values; t is 1 for the queries and the MLP of the last layer and for the logits, and T for other readers.
Of the unembedding only the logits that the metric reads are counted.

Norms, softmax, activation functions and sums are taken to be free, as in `limit.py`.
"""

from experiments.bench import limit
from mi_jax.circuits.graph import Graph
from mi_jax.models import DecoderConfig


def activation_backward_flops(config: DecoderConfig, batch: int, n_pos: int) -> int:
    """Operations of a backward pass with respect to activations, read at the last position, without the logits."""
    attention = sum(limit.attention_flops(config, t + 1) for t in range(n_pos))
    last = limit.attention_flops(config, n_pos)
    # two products of attention are four in the backward pass; all others stay as many
    more = (config.n_layers - 1) * attention + last
    return _forward_flops(config, batch, n_pos) + batch * more


def joining_flops(config: DecoderConfig, batch: int, n_pos: int) -> int:
    """Operations of all edges' products of a difference and a gradient."""
    graph = Graph.of(config)
    edges = graph.edges.sum(0)
    at = [n_pos] * graph.n_readers
    begin = (graph.n_layers - 1) * graph.layer_readers
    alone = [*range(begin, begin + graph.n_heads), *([graph.n_readers - 2] if graph.has_mlp else []), -1]
    for reader in alone:
        at[reader] = 1
    return 2 * batch * config.d_model * sum(int(n) * t for n, t in zip(edges, at, strict=True))


def eap_ig_flops(config: DecoderConfig, batch: int, n_pos: int, *, steps: int, logits: int) -> int:
    """Fewest operations of the scores of all edges.

    Args:
      config: the model's shape.
      batch: pairs.
      n_pos: tokens of each prompt.
      steps: of the integral.
      logits: how many logits of a prompt the metric reads.
    """
    forward, backward = _forward_flops(config, batch, n_pos), activation_backward_flops(config, batch, n_pos)
    read = steps * 2 * 2 * batch * logits * config.d_model
    return (steps + 1) * forward + steps * backward + read + joining_flops(config, batch, n_pos)


def _forward_flops(config: DecoderConfig, batch: int, n_pos: int) -> int:
    whole = limit.forward_flops(config, batch, n_pos, layers=config.n_layers - 1)
    return whole + limit.last_layer_flops(config, batch, n_pos)
