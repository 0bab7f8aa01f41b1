"""Which architectures find features that are known: in synthetic superposition and in a trained transformer."""
