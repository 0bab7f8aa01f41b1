"""Runs of circuits: the masked forward, resumed where it can be, and what many circuits do on the prompts of a task."""
