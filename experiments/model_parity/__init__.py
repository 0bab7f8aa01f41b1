"""Whether every model family computes what `transformers` computes from the same checkpoint."""
