"""Killing a training and resuming it."""
