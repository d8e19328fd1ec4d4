"""Parallelism, applied to the model from outside: one file for each dimension."""
