"""Training sparse dictionaries of any model's activations."""
