"""Finds the circuit of a task by several methods and compares them."""
