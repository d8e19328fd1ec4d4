"""The recipe and every kernel on real GPUs: `python -m tests.gpu` (see __main__.py)."""
